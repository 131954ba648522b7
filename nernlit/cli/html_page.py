"""HTML pages that need no other file: tables that a click sorts, and embedded pictures."""

import base64
import html
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem;border-bottom:1px solid #ccc}
table{border-collapse:collapse;margin:.8rem 0}th,td{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
th:first-child,td:first-child{text-align:left}th{cursor:pointer;background:#f4f4f4}th:hover{background:#e4e4e4}
img{max-width:100%}pre{background:#f7f7f7;padding:.8rem;overflow-x:auto;font-size:12px}p.note{color:#666}
"""

#: Sorts a table by the column whose head is clicked: numbers by the value in data-v, other cells by their text.
_SCRIPT = """
for(const head of document.querySelectorAll('th'))head.onclick=()=>{
 const table=head.closest('table'),column=[...head.parentNode.children].indexOf(head),up=head.dataset.up!=='1';
 const value=row=>{const cell=row.children[column];return cell.dataset.v===undefined?cell.textContent:+cell.dataset.v};
 const rows=[...table.tBodies[0].rows].sort((a,b)=>{const x=value(a),y=value(b);return(x>y)-(x<y)});
 if(!up)rows.reverse();
 for(const other of head.parentNode.children)delete other.dataset.up;
 head.dataset.up=up?'1':'0';table.tBodies[0].append(...rows)};
"""


def document(title: str, parts: Sequence[str]) -> str:
    """A page with this title and these pieces of HTML."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{_STYLE}</style>'
    body = "\n".join([f"<h1>{html.escape(title)}</h1>", *parts, f"<script>{_SCRIPT}</script>"])
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table that is sorted by a click on a column's head."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in rows[0])
    lines = ("".join(_cell(value) for value in row.values()) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if isinstance(value, str):
        return f"<td>{html.escape(value)}</td>"
    if not math.isfinite(value):
        return "<td data-v=-1e999>-</td>"
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"
    return f"<td data-v={json.dumps(value)}>{shown}</td>"


def picture(figure: Figure, description: str) -> str:
    """A figure as an embedded PNG."""
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    encoded = base64.b64encode(content.getvalue()).decode()
    return f'<p><img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}"></p>'
