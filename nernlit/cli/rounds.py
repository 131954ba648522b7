"""The rounds of a Progressive fit, as its folder holds them."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nernlit.errors import CheckpointError, UsageError
from nernlit.storage.file_kinds import describe_file


@final
@dataclass(frozen=True)
class EndedRound:
    """A round of a Progressive fit.

    Attributes:
        number: From 1.
        recon_rmse: RMSE of the winner's weights from the original's, in weight units.
        weights: File of its reconstructed network.
    """

    number: int
    recon_rmse: float
    weights: Path


def rounds_record(folder: Path) -> Path:
    """The file in which a fit's folder lists its rounds."""
    return folder / "rounds" / "rounds.json"


def read_rounds(folder: Path) -> list[EndedRound]:
    """The rounds of a fit, the first one first.

    Raises:
        UsageError: If the fit has none, or their record is damaged.
    """
    record = rounds_record(folder)
    if not record.is_file():
        raise UsageError(f"{folder} has no rounds/rounds.json, so it is not a Progressive run.")
    damaged = f"{record} is damaged: expected a list of rounds 1, 2, ... with a finite `recon_rmse` each"
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
        found = [(entry["round"], _number(entry["recon_rmse"])) for entry in content]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise UsageError(f"{damaged}; run the fit again.") from error
    if not found or any(type(number) is not int or number != at for at, (number, _) in enumerate(found, 1)):
        raise UsageError(f"{damaged}; it has {len(found)}. Run the fit again.")
    if not all(0 <= rmse < math.inf for _, rmse in found):
        raise UsageError(f"{damaged}; run the fit again.")
    return [EndedRound(number, rmse, record.with_name(f"round-{number:02d}.safetensors")) for number, rmse in found]


def _number(value: object) -> float:
    if type(value) not in (int, float):
        raise TypeError(f"{value!r} is no number")
    return float(value)  # type: ignore[arg-type]


def read_round(ended: EndedRound, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a round's network.

    Args:
        ended: The round.
        like: The weights that are needed, by name, as another network of the same fit has them.

    Raises:
        CheckpointError: If the file is missing or damaged, or belongs to another network.
    """
    file = ended.weights
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the network of round {ended.number}; run the fit again.")
    try:
        state = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{file} is {describe_file(file)}; expected the network of a round.") from error
    for name, weight in like.items():
        if name not in state or state[name].shape != weight.shape:
            raise CheckpointError(f"{file} belongs to another network: {name} is missing or has another shape.")
        if not state[name].isfinite().all():
            raise CheckpointError(f"{file} is damaged: {name} is not finite.")
    return {name: state[name] for name in like}
