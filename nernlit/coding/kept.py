"""The tensors of a network that are not predicted (BatchNorm, biases, the classifier), as a .nern file stores them.

Constant tensors are stored in the header, integer tensors are entropy-coded, and floating-point tensors are stored as
`KeptForm` says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Self, final, get_args

import torch
from torch import Tensor

from nernlit.errors import LayoutError, UsageError, require_one_of
from nernlit.storage.entropy import decode, encode

#: How floating-point numbers are stored: as they are (`fp32`, whatever their type is), in 16 bits (`fp16`, `bf16`), or
#: as entropy-coded multiples (`int8`) of a 127th of the largest number of a vector, or of a row of a matrix. Numbers
#: far beyond the others do not count as the largest, and variances, whose ratios matter, are stored in bf16.
KeptForm = Literal["fp32", "fp16", "bf16", "int8"]
_ROUNDED = "rounded"
#: Names below `kept.` that hold tensors of several keys.
_RESERVED = {"integers", "steps"}
_STEPS = 127
#: The largest number of a row is at most this multiple of its median, in magnitudes: a channel that is always 0 has a
#: folded BatchNorm weight hundreds of times as large as the others, which its step would round to 0.
_FAR = 16
#: The largest integer that a number is rounded to.
_LARGEST = 2**24
_HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_REAL = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (*_INTEGERS, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


@final
@dataclass(frozen=True)
class Kept:
    """Kept tensors and their stored form.

    Attributes:
        described: What the header of a file says of them, in primitives; `error` is the largest change of a number,
            relative to the largest number of its tensor.
        stored: Tensors of the container.
        values: State-dict key -> tensor, as the file gives it back.
    """

    described: Mapping[str, Any]
    stored: Mapping[str, Tensor]
    values: Mapping[str, Tensor]

    @classmethod
    def from_tensors(cls, values: Mapping[str, Tensor], form: KeptForm = "fp32") -> Self:
        """The stored form of tensors.

        Raises:
            UsageError: If the form is unknown, or a number cannot be stored in it.
        """
        require_one_of(KeptForm, kept=form)
        constants: dict[str, Any] = {}
        coded: dict[str, tuple[str, list[int]]] = {}
        integers: list[Tensor] = []
        if reserved := _RESERVED & values.keys():
            raise UsageError(
                f"the network has a tensor {min(reserved)!r} of its own, a name that .nern files use; rename it, or "
                "put the network into a module."
            )
        steps: list[Tensor] = []
        stored: dict[str, Tensor] = {}
        for key, value in sorted(values.items(), key=lambda item: _group(item[0], item[1].shape)):
            kind, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
            if (constant := _constant(value)) is not None:
                constants[key] = (kind, shape, constant)
            elif value.dtype in _INTEGERS and value.numel():
                coded[key] = (kind, shape)
                integers.append(value.flatten().long())
            elif form == "int8" and key.endswith("running_var") and value.dtype == torch.float32:
                stored[f"kept.{key}"] = value.bfloat16()
            elif form == "int8" and value.is_floating_point() and value.numel() and bool(value.isfinite().all()):
                coded[key] = (_ROUNDED, shape)
                rows_RC = value.float().reshape(_rows(shape), -1)
                steps.append(_row_steps(rows_RC))
                step_R1 = steps[-1].float()[:, None]
                integers.append((rows_RC / step_R1.where(step_R1 > 0, 1)).round().long().flatten())
            else:
                in_half = form in _HALVES and value.is_floating_point()
                stored[f"kept.{key}"] = value.to(_HALVES[form]) if in_half else value
        if integers:
            stored["kept.integers"] = encode(torch.cat(integers), _counts(coded))
        if steps:
            stored["kept.steps"] = torch.cat(steps)
        described = {"form": form, "constants": constants, "coded": coded}
        decoded = _decoded(described, stored)
        changes = {key: largest_change(value, decoded[key]) for key, value in values.items()} if form != "fp32" else {}
        if wrong := [key for key, change in changes.items() if not math.isfinite(change)]:
            raise UsageError(f"kept={form!r} cannot store {wrong[0]!r}, whose numbers are too large; use bf16 or fp32.")
        return cls({**described, "error": float(f"{max(changes.values(), default=0):.1e}")}, stored, decoded)

    @classmethod
    def read(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """The kept tensors of a file.

        Raises:
            FileFormatError: If the integers are damaged.
            LayoutError: If the form is unknown, or a shape is invalid.
        """
        if described["form"] not in get_args(KeptForm):
            raise LayoutError(f"its kept tensors have an unknown form, {described['form']!r}.")
        stored = {name: value for name, value in tensors.items() if name.startswith("kept.")}
        return cls(described, stored, _decoded(described, stored))


def coded_numbers(described: Mapping[str, Any]) -> int:
    """How many numbers of a file's kept tensors are entropy-coded: they may take little of the file and much memory.

    Raises:
        LayoutError: If a shape is none.
    """
    return sum(_counts(described["coded"]))


def _decoded(described: Mapping[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    form, coded = described["form"], described["coded"]
    values = {}
    for key, (kind, shape, constant) in described["constants"].items():
        # `expand` stores one element, so that a huge shape in a forged header allocates no memory.
        values[key] = torch.full((), constant, dtype=_REAL[kind]).expand(shape)
    if coded:
        shapes = [shape for _, shape in coded.values()]
        integers = decode(stored["kept.integers"], _counts(coded)).split([math.prod(shape) for shape in shapes])
        rows = [_rows(shape) for kind, shape in coded.values() if kind == _ROUNDED]
        steps = iter(stored["kept.steps"].float().split(rows) if rows else ())
        for (key, (kind, shape)), part in zip(coded.items(), integers, strict=True):
            if kind == _ROUNDED:
                values[key] = (part.reshape(_rows(shape), -1) * next(steps)[:, None]).reshape(shape)
            else:
                values[key] = part.to(_REAL[kind]).reshape(shape)
    for name, value in stored.items():
        if name.removeprefix("kept.") not in _RESERVED:
            key = name.removeprefix("kept.")
            half = torch.bfloat16 if form == "int8" and key.endswith("running_var") else _HALVES.get(form)
            values[key] = value.float() if value.dtype == half else value
    return values


def _row_steps(rows_RC: Tensor) -> Tensor:
    """The number that each row is rounded to multiples of, (R,) bf16."""
    sizes_RC = rows_RC.abs()
    median_R1 = sizes_RC.where(sizes_RC > 0, math.nan).nanmedian(dim=1, keepdim=True).values.nan_to_num(0)
    near_RC = sizes_RC.where(sizes_RC <= _FAR * median_R1, 0)
    return (near_RC.amax(1) / _STEPS).maximum(sizes_RC.amax(1) / _LARGEST).bfloat16()


def _counts(coded: Mapping[str, tuple[str, Sequence[int]]]) -> list[int]:
    """How many integers have one model each."""
    if any(type(length) is not int or length < 0 for _, shape in coded.values() for length in shape):
        raise LayoutError("a shape of its kept tensors does not consist of integers.")
    grouped = groupby(coded.items(), key=lambda item: (item[1][0], _group(item[0], item[1][1])))
    return [sum(math.prod(shape) for _, (_, shape) in items) for _, items in grouped]


def _group(key: str, shape: Sequence[int]) -> tuple[str, int]:
    """What tensors have in common whose integers have one model: the last part of their names, and their dimensions."""
    return key.rpartition(".")[2], len(shape)


def _rows(shape: Sequence[int]) -> int:
    """How many steps a rounded tensor has."""
    return shape[0] if len(shape) > 1 else 1


def _constant(value: Tensor) -> int | float | None:
    """The number that all numbers of a tensor are, if there is one that JSON can hold."""
    is_float_scalar = value.numel() == 1 and value.is_floating_point()  # takes more bytes as JSON than as a tensor
    if not value.numel() or is_float_scalar or value.is_complex() or value.dtype not in _REAL.values():
        return None
    first = value.flatten()[0]
    number: int | float = first.item()
    # -0.0 equals 0.0, and is another number.
    is_constant = bool((value == first).all()) and math.isfinite(number) and not (number == 0 and value.signbit().any())
    return number if is_constant else None


def largest_change(before: Tensor, after: Tensor) -> float:
    """The largest change of a number, relative to the largest number of its tensor; nan if one is not finite."""
    if not before.is_floating_point() or not before.numel():
        return 0.0
    changed = before != after  # not so for the infinities of a mask
    if not bool(changed.any()):
        return 0.0
    largest = before.double().abs().max().clamp_min(torch.finfo(torch.float64).tiny)
    return float((after.double() - before.double())[changed].abs().max() / largest)
