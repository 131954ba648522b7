"""Compress a network with NNCodec 2.1.3 (ISO/IEC 15938-17, no training), for `nernlit compare --others`.

NNCodec needs numpy below 2, so it has an environment of its own, and this script imports nothing of nernlit:

    python -m venv nncodec
    nncodec/bin/pip install nncodec==2.1.3 safetensors      # compiles C++; brings torch
    nncodec/bin/python tests/benchmarks/nncodec_files.py NET.safetensors --out files
    nernlit compare NET.safetensors --data ... --out compared --others files/files.csv

`--qp` are its quantization parameters: smaller ones keep more of the weights. All other settings are its defaults.
Whole numbers, such as the counters of BatchNorm layers, are neither compressed nor counted: no evaluation reads them.
ResNet20 for CIFAR-10 takes a second per file.
"""

import argparse
import csv
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

QP = (-32, -28, -24, -20, -18, -16)
COLUMNS = ("method", "setting", "file", "weights")


def write_files(net: Path, qps: Sequence[int], out: Path) -> Path:
    """For each quantization parameter, write the compressed file and the weights that are decoded from it.

    Returns:
        A table of them.
    """
    from nncodec.nn import decode, encode

    state: Mapping[str, Any] = load_file(net)
    with safe_open(net, "numpy") as file:
        metadata = file.metadata()
    numbers = {key: value.astype(np.float32) for key, value in state.items() if value.dtype.kind == "f"}
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for qp in qps:
        compressed, weights = f"nncodec_{qp}.nnc", f"nncodec_{qp}.safetensors"
        with tempfile.TemporaryDirectory() as folder:  # it writes a copy
            content = bytes(encode(numbers, args={"qp": qp, "verbose": False, "results": folder}))
        (out / compressed).write_bytes(content)
        decoded = {key: np.ascontiguousarray(value) for key, value in decode(bytearray(content)).items()}
        save_file({**state, **decoded}, out / weights, metadata)
        rows.append(("nncodec", qp, compressed, weights))
        print(f"qp {qp}: {len(content):,} bytes ({len(content) / net.stat().st_size:.1%})", flush=True)
    table = out / "files.csv"
    with table.open("w", newline="", encoding="utf-8") as text:
        csv.writer(text).writerows([COLUMNS, *rows])
    return table


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("net", metavar="NET", type=Path, help="safetensors file of the network's weights")
    parser.add_argument("--qp", type=int, nargs="+", default=QP, help=f"default: {' '.join(map(str, QP))}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the files and of their table")
    options = parser.parse_args(args)
    print(f"table: {write_files(options.net, options.qp, options.out)}")


if __name__ == "__main__":
    main()
