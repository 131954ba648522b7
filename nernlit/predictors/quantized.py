"""Quantization of any predictor: its parameters are multiples of learned step sizes.

Shapes: n numbers of a parameter, G groups, N addresses, K kernel side.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nernlit.errors import LayoutError, UsageError, require_at_least, require_one_of
from nernlit.predictors.base import Predictor
from nernlit.predictors.grid import LIMIT, Counts, repeat_per_group, round_ste, round_to_half, sum_per_group
from nernlit.storage.entropy import Part, decode_weights, encode_weights

Per = Literal["tensor", "row"]


@dataclass(frozen=True)
class Quantize:
    """How a predictor's parameters are quantized; see `Quantized`.

    Args:
        bits: Bits per number at the start.
        per: Which numbers have the same step size, `tensor` or `row`.
        step_rate: Learning rate of the step sizes' logarithms, as a share of the optimizer's.
    """

    bits: float = 4.0
    per: Per = "tensor"
    step_rate: float = 0.2


#: Largest allowed number of bits per value.
MAX_BITS = 12
#: Smallest step size: the smallest normal float16 number.
_MIN_STEP = 2.0**-14
#: The largest entropy that is measured, as a share of that of groups in which no two integers are equal. Near that one
#: it hardly depends on the step sizes.
_MEASURABLE = 0.6
#: The differential entropy of a normal distribution with variance 1, in bits.
_NORMAL_ENTROPY = math.log2(2 * math.pi * math.e) / 2
#: Values per group from which the entropy is estimated when step sizes are chosen.
_SAMPLE_SIZE = 2**17


@final
class Quantized(Predictor):
    """A predictor with quantized parameters: integers times learned step sizes (LSQ, arXiv 1902.08153).

    The forward pass rounds; the backward pass uses the straight-through estimator. Parameters without parts
    (`Predictor.quantized_parts`), such as biases and scales, are rounded to half precision. The .nern file holds the
    integers in an entropy code, and the step sizes.

    A step size is learned as its ratio to the root mean square of its group. So it follows parameters that grow, and a
    predictor can be quantized from its random start on.

    `Representation(..., quantize=Quantize(...))` puts it around any predictor.

    Args:
        predictor: The predictor.
        bits: Entropy per value at the start. All step sizes are the same multiple of the root mean square of their
            group; the multiple is chosen to reach this entropy. Training may change it. Above 0, at most 12.
        per: Which numbers have the same step size: those of a part of a parameter (`tensor`), such as a layer, or
            those of a row of a part (`row`), such as a filter; see `Predictor.quantized_parts`.
        step_rate: Learning rate of the step sizes' logarithms, as a share of the optimizer's; 0 keeps the ratios. An
            `MLP` needs a far smaller one than a `Table`.
    """

    def __init__(self, predictor: Predictor, bits: float = 4.0, per: Per = "tensor", step_rate: float = 0.2) -> None:
        super().__init__(predictor.kernel_size)
        if not 0 < bits <= MAX_BITS:
            raise UsageError(f"quantize.bits={bits}; expected above 0 and at most {MAX_BITS}.")
        require_one_of(Per, **{"quantize.per": per})
        if isinstance(predictor, Quantized):
            raise UsageError("the predictor is already a Quantized; pass its inner predictor (`.predictor`).")
        require_at_least(0, **{"quantize.step_rate": step_rate})
        self.predictor, self.bits, self.per, self.step_rate = predictor, bits, per, step_rate

    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        self.predictor.crops = self.crops
        self.predictor.bind(layers)
        self.parts_of = self.predictor.quantized_parts()
        self.sizes = {
            name: [size for part in parts for size in _group_sizes(part, self.per)]
            for name, parts in self.parts_of.items()
        }
        if not self.sizes:
            raise UsageError(
                f"{type(self.predictor).__name__} has no parameters that can be quantized; leave quantize out."
            )
        count = sum(len(sizes) for sizes in self.sizes.values())
        self.log_ratios = nn.Parameter(torch.zeros(count))
        if self.log_ratios.device.type != "meta":
            for name, used in self.predictor.used_masks().items():
                self.set_constant(f"used_{name}", used)

    @property
    def all_sizes(self) -> list[int]:
        """The sizes of the groups of all parameters, one parameter after the other."""
        return [size for sizes in self.sizes.values() for size in sizes]

    @property
    def all_parts(self) -> list[Part]:
        """The shapes of the parts of all parameters, one parameter after the other."""
        return [part for parts in self.parts_of.values() for part in parts]

    def reset_parameters(self) -> None:
        """Choose the step sizes for the current values of the parameters."""
        self.restart(self.bits)

    def restart(self, bits: float) -> None:
        """Choose the step sizes for the current parameters so that their entropy is `bits` per value."""
        with torch.no_grad():
            values_n = self._values()
            multiple = _step_to_rms_ratio(values_n, self.all_sizes, bits)
            self.log_ratios.fill_(math.log(multiple))

    @torch.no_grad()
    def fit(self, blocks_NKK: Tensor, addresses_N3: Tensor, weights_NKK: Tensor) -> None:
        self.predictor.fit(blocks_NKK, addresses_N3, weights_NKK)
        self.reset_parameters()

    @property
    def unquantized(self) -> Predictor:
        return self.predictor

    @property
    def num_params(self) -> int:
        return self.predictor.num_params + self.log_ratios.numel()

    @property
    def is_fitted(self) -> bool:
        return self.predictor.is_fitted

    @property
    def code_bits(self) -> int:
        """Bits of the coded numbers, and of the predictor's own integers."""
        return self.stored_code_bits(self.stored())

    def stored_code_bits(self, stored: Mapping[str, Tensor]) -> int:
        return self.predictor.code_bits + 8 * len(stored["integers"])

    def lr_multipliers(self) -> dict[str, float]:
        inner = {f"predictor.{name}": rate for name, rate in self.predictor.lr_multipliers().items()}
        return {**inner, "log_ratios": self.step_rate}

    def frozen_forward(self) -> Callable[[Tensor], Tensor]:
        return partial(functional_call, self.predictor, self.rounded_parameters())

    def forward(self, addresses_N3: Tensor) -> Tensor:
        return self.frozen_forward()(addresses_N3)

    @property
    def changes_after_steps(self) -> bool:
        return self.predictor.changes_after_steps

    def after_step(self, relative_rate: float, mean: Callable[[Tensor], Tensor] = torch.positive) -> dict[str, float]:
        if not self.changes_after_steps:
            return self.predictor.after_step(relative_rate, mean)
        # Codes are chosen for the rounded codewords, which predictions are made of.
        latent = {name: self.predictor.get_parameter(name).detach().clone() for name in self.sizes}
        rounded = self.rounded_parameters()
        with torch.no_grad():
            for name in latent:
                self.predictor.get_parameter(name).copy_(rounded[name])
            try:
                return self.predictor.after_step(relative_rate, mean)
            finally:
                for name, value in latent.items():
                    self.predictor.get_parameter(name).copy_(value)

    @torch.no_grad()
    def start_stage(self) -> None:
        """Move the numbers to the multiples of their step sizes that they are rounded to.

        Training leaves many of them beside a rounding threshold. The first steps of another objective would carry all
        of those over it at once, and destroy what the predictor has learned.
        """
        steps_G, values = self.steps(), self.rounded_parameters()
        for name in self.sizes:
            self.predictor.get_parameter(name).copy_(values[name])
        self.log_ratios.copy_((steps_G / _rms(self._values(), self.all_sizes)).log())
        self.predictor.start_stage()

    def training_state(self) -> dict[str, Tensor]:
        return self.predictor.training_state()

    def load_training_state(self, state: Mapping[str, Tensor]) -> None:
        self.predictor.load_training_state(state)

    def _values(self) -> Tensor:
        """All numbers that are rounded, (n,), at least in float32: integers and step sizes need its precision."""
        values = {name: self.predictor.get_parameter(name) for name in self.sizes}
        values_n = torch.cat(
            [value.flatten() if (used := self._used(name)) is None else value[used] for name, value in values.items()]
        )
        return values_n.to(torch.promote_types(values_n.dtype, torch.float32))

    def _used(self, name: str) -> Tensor | None:
        """The numbers of a parameter that are used; None for all."""
        used: Tensor | None = getattr(self, f"used_{name}", None)
        return used

    def _in_place(self, name: str, numbers: Tensor) -> Tensor:
        """A parameter from its used numbers; 0 elsewhere."""
        shape, used = self.predictor.get_parameter(name).shape, self._used(name)
        return numbers.view(shape) if used is None else numbers.new_zeros(shape).masked_scatter(used, numbers)

    def steps(self) -> Tensor:
        """The step size of each group, (G,)."""
        return self._steps(self._values())

    def _steps(self, values_n: Tensor) -> Tensor:
        """The step sizes for these numbers, (G,)."""
        return round_to_half(
            (self.log_ratios.to(values_n.dtype).exp() * _rms(values_n, self.all_sizes)).clamp_min(_MIN_STEP)
        )

    def _units(self) -> tuple[Tensor, Tensor]:
        """All numbers in units of their step sizes, and the step size of each; both (n,)."""
        values_n = self._values()
        steps_n = repeat_per_group(self._steps(values_n), self.all_sizes)
        return values_n / steps_n, steps_n

    def _parts(self, numbers_n: Tensor) -> dict[str, Tensor]:
        """Name of a rounded parameter -> its part of all rounded numbers."""
        parts = numbers_n.split([sum(sizes) for sizes in self.sizes.values()])
        return dict(zip(self.sizes, parts, strict=True))

    def step_sizes(self) -> dict[str, Tensor]:
        """The step size of each number: name of a rounded parameter -> values of its shape, 0 for unused numbers."""
        parts = self._parts(repeat_per_group(self.steps(), self.all_sizes))
        return {name: self._in_place(name, part) for name, part in parts.items()}

    def rounded_parameters(self) -> dict[str, Tensor]:
        """The predictor's parameters as it uses them: name -> value, with gradients."""
        units_n, steps_n = self._units()
        parts = self._parts(round_ste(units_n) * steps_n)
        return {
            name: self._in_place(name, parts[name]) if name in parts else round_to_half(value)
            for name, value in self.predictor.named_parameters()
        }

    def rate(self) -> tuple[Tensor, Tensor]:
        """Total bits of the quantized values: a differentiable estimate, and their entropy. Both are scalars.

        Both use how often each whole number occurs in its group now. The file's code takes fewer bits: it also uses
        what related numbers have in common.
        """
        units_n, _ = self._units()
        counts = Counts(units_n.detach().round().clamp(-LIMIT, LIMIT), self.all_sizes)
        return counts.bits(units_n).sum(), counts.entropy_bits()

    @torch.no_grad()
    def stored(self) -> dict[str, Tensor]:
        integers_n = self._units()[0].round().clamp(-LIMIT, LIMIT).int()
        others = {
            f"predictor.{name}": value.half() if value.is_floating_point() else value
            for name, value in self.predictor.stored().items()
            if name not in self.sizes
        }
        return {"integers": encode_weights(integers_n, self.all_parts), "steps": self.steps().half(), **others}

    def stored_shapes(self) -> dict[str, torch.Size | None]:
        inner = self.predictor.stored_shapes().items()
        others = {f"predictor.{name}": shape for name, shape in inner if name not in self.sizes}
        return {"integers": None, "steps": self.log_ratios.shape, **others}

    @torch.no_grad()
    def load_stored(self, tensors: Mapping[str, Tensor]) -> None:
        steps_G = tensors["steps"].float()
        if not bool(((steps_G > 0) & steps_G.isfinite()).all()):
            raise LayoutError("a step size of the predictor is not a finite number above 0.")
        numbers_n = decode_weights(tensors["integers"], self.all_parts) * repeat_per_group(
            steps_G.cpu(), self.all_sizes
        )
        inner = {
            n.removeprefix("predictor."): value.float() if value.dtype == torch.float16 else value
            for n, value in tensors.items()
            if n.startswith("predictor.")
        }
        shapes = self.predictor.stored_shapes()
        for name, part in self._parts(numbers_n).items():
            inner[name] = part.view(shapes[name] or [-1]).to(self.log_ratios.device)
        self.predictor.load_stored(inner)
        self.log_ratios.copy_((steps_G.to(self.log_ratios.device) / _rms(self._values(), self.all_sizes)).log())


def _group_sizes(part: Part, per: Per) -> list[int]:
    """The sizes of the groups of a part with one step size each."""
    rows, size = part[0], math.prod(part)
    return [size] if per == "tensor" else [size // rows] * rows


def _rms(values_n: Tensor, sizes: Sequence[int]) -> Tensor:
    """The root mean square of each group (G,); 1 for a group of zeros."""
    power_G = sum_per_group(values_n.square(), sizes) / torch.tensor(sizes, device=values_n.device)
    return power_G.where(power_G > 0, 1).sqrt()  # the root has no gradient at 0


def _step_to_rms_ratio(values_n: Tensor, sizes: Sequence[int], bits: float) -> float:
    """The step size / RMS, equal for all groups, at which the entropy of the quantized values is `bits` per value.

    It is found by bisection. Large groups are sampled. Small groups cannot show many bits; for them it is the ratio
    that gives normally distributed values this entropy.
    """
    if bits > _MEASURABLE * sum(size * math.log2(size) for size in sizes) / sum(sizes):
        return 2 ** (_NORMAL_ENTROPY - bits)
    sizes_G = torch.tensor(sizes, device=values_n.device)
    sampled = [min(size, _SAMPLE_SIZE) for size in sizes]
    units_s = _sample(values_n, sizes) / repeat_per_group(_rms(values_n, sizes), sampled)
    low, high = -10.0, 5.0  # log2 of the ratio
    for _ in range(20):
        middle = (low + high) / 2
        counts = Counts((units_s / 2**middle).round().clamp(-LIMIT, LIMIT), sampled)
        is_finer = float(sizes_G.double() @ counts.entropies()) > bits * len(values_n)
        low, high = (middle, high) if is_finer else (low, middle)
    return float(2 ** ((low + high) / 2))


def _sample(values_n: Tensor, sizes: Sequence[int]) -> Tensor:
    """At most `_SAMPLE_SIZE` numbers of each group, chosen at random with replacement, the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    parts = [
        part[torch.randint(size, (_SAMPLE_SIZE,), generator=generator).to(part.device)] if size > _SAMPLE_SIZE else part
        for size, part in zip(sizes, values_n.split(list(sizes)), strict=True)
    ]
    return torch.cat(parts)
