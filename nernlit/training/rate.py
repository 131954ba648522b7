"""The rate term of the loss: the bits of a quantized predictor, with a weight that can reach a given file size."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nernlit.coding import KeptForm
from nernlit.errors import UsageError, require_at_least
from nernlit.predictors import MAX_BITS, Quantized
from nernlit.representation import Representation

#: Gains of the PI controller of the logarithm of the weight; its input is the relative excess of the file size. The
#: proportional part holds the size when the learning rate, and so the effect of the term, falls.
_INTEGRAL_GAIN, _PROPORTIONAL_GAIN = 0.1, 50.0
#: The initial weight with `target_bytes`, and its limits.
_INITIAL_WEIGHT, _MIN_WEIGHT, _MAX_WEIGHT = 0.3, 1e-6, 1e3
#: Smallest bits per number that a target size may leave.
_MIN_BITS = 0.1
#: Steps between two measurements of the coded size, and the share of the available bytes that is aimed at.
_MEASURE_INTERVAL, _TARGET_FRACTION = 100, 0.998
#: The step sizes of an earlier fit are kept if its file is at most this factor larger than `target_bytes`.
_MAX_EXCESS = 1.1


@dataclass(frozen=True)
class Rate:
    """Options of the rate term, and the form of the file.

    With weight 0 and without a target size there is no term.

    Args:
        weight: Weight of the bits per predicted weight in the loss; with a target size the start value, where 0 takes
            0.3.
        target_bytes: Size of the .nern file, in bytes; the step sizes start there, whatever `Quantize.bits` is, and
            the weight changes so that the file keeps it. A fit from the weights of an earlier one keeps its step
            sizes, unless its file is more than a tenth larger. None keeps the weight.
        target_bits: The same, as bits per predicted weight in addition to the rest of the file.
        kept: How the file will hold the tensors that are not predicted; see `Representation.save`.
        fold_batch_norm: See `Representation.save`.
    """

    weight: float = 0.0
    target_bytes: int | None = None
    target_bits: float | None = None
    kept: KeptForm = "fp32"
    fold_batch_norm: bool = False


class RateTerm:
    """The rate term of a fit.

    With `target_bytes`, a PI controller sets the logarithm of the weight from the relative excess of the estimated file
    size. If the file would be too small, the term is 0 in this step and the integral part decreases.

    Args:
        representation: The representation; its predictor is quantized.
        rate: The options.

    Raises:
        UsageError: If the predictor is not quantized, or an option is out of its range.
    """

    def __init__(self, representation: Representation, rate: Rate) -> None:
        require_at_least(0, **{"rate.weight": rate.weight})
        predictor = representation.predictor
        if not isinstance(predictor, Quantized):
            raise UsageError("a rate needs a quantized predictor; pass --model.representation.quantize.bits.")
        self.options = rate
        self._representation = representation
        self.predictor, self.num_weights = predictor, representation.layout.num_weights
        #: Size of the file, estimated in the last step.
        self.file_bytes = torch.zeros(())
        #: Ratio of the coded integers' bits to their entropy, as it was measured last, and the number of steps so far.
        self.coded_ratio, self.steps = 1.0, 0
        #: Bytes of the file without the coded integers, as they were measured last.
        self.fixed_bytes, coded_bits = self._measured()
        self.target_bytes = self._planned_bytes()
        self.weight = rate.weight or (0.0 if self.target_bytes is None else _INITIAL_WEIGHT)
        #: The optimizer step that runs, and the weight in it.
        self._optimizer_step, self._step_weight = -1, self.weight
        if self.target_bytes is not None and (
            representation.is_new or self.fixed_bytes + coded_bits / 8 > _MAX_EXCESS * self.target_bytes
        ):
            # A coarse start reaches a small size sooner than the term's gradient does.
            bits = 8 * (self.target_bytes - self.fixed_bytes) / sum(predictor.all_sizes)
            predictor.restart(max(_MIN_BITS, min(bits, MAX_BITS)))

    @property
    def target_bits(self) -> float | None:
        """Bits per predicted weight that the target size leaves for them, or None."""
        return None if self.target_bytes is None else self._bits_of(self.target_bytes)

    def _bits_of(self, file_bytes: float) -> float:
        """Bits per predicted weight that a size of the file leaves."""
        return 8 * (file_bytes - self.fixed_bytes) / self.num_weights

    def _planned_bytes(self) -> int | None:
        """The size of the file that the options state, or None.

        Raises:
            UsageError: If it leaves too few bits for the predicted weights, or more than the predictor can have.
        """
        target, bits = self.options.target_bytes, self.options.target_bits
        if target is None and bits is None:
            return None
        if target is not None and bits is not None:
            raise UsageError("rate.target_bytes and rate.target_bits are both given; pass one of them.")
        numbers = sum(self.predictor.all_sizes)
        least, most = (self.fixed_bytes + each * numbers / 8 for each in (_MIN_BITS, MAX_BITS))
        if self.predictor.predictor.code_bits:  # codes may change their size in the fit
            least, most = self.fixed_bytes + 1, math.inf
        asked: float
        if bits is not None:
            given, asked = f"target_bits={bits:g}", self.fixed_bytes + bits * self.num_weights / 8
        else:
            assert target is not None
            given, asked = f"target_bytes={target:,}", target
        if not least <= asked <= most:
            of_weight = f" ({self._bits_of(least):.3g} bits per predicted weight)"
            raise UsageError(
                f"rate.{given}: the file needs {self.fixed_bytes:,.0f} bytes in addition to those of {numbers:,} "
                f"quantized numbers; expected at least {least:,.0f} bytes{of_weight}"
                + ("." if most == math.inf else f" and at most {most:,.0f} ({self._bits_of(most):.3g}).")
            )
        return round(asked)

    def __call__(self, metrics: dict[str, Tensor], optimizer_step: int) -> Tensor:
        """The term of a batch; the weight changes for the next optimizer step.

        Args:
            metrics: Takes `bits_per_weight`, of the coded numbers, and the weight, `rate_weight`.
            optimizer_step: Number of optimizer steps so far: several batches may share one.
        """
        estimated, entropy = self.predictor.rate()
        if optimizer_step != self._optimizer_step:
            self._optimizer_step = optimizer_step
            self._start_step(estimated, entropy)
        metrics["bits_per_weight"] = entropy * self.coded_ratio / self.num_weights
        metrics["rate_weight"] = estimated.new_tensor(self._step_weight)
        return self._step_weight * estimated / self.num_weights

    def _start_step(self, estimated: Tensor, entropy: Tensor) -> None:
        """Estimate the size of the file, and set the weight of this step and of the next one."""
        if self.steps % _MEASURE_INTERVAL == 0 and self._is_finite(estimated):
            # The code has contexts, which the entropy of each group does not know. Codes and kept tensors may change.
            self.fixed_bytes, coded_bits = self._measured()
            self.coded_ratio = coded_bits / max(float(entropy), 1.0)
        self.steps += 1
        self.file_bytes = self.fixed_bytes + entropy * self.coded_ratio / 8
        self._step_weight = self.weight
        if self.target_bytes is None:
            return
        available = max(_TARGET_FRACTION * (self.target_bytes - self.fixed_bytes), 1.0)
        excess = float(self.file_bytes - self.fixed_bytes) / available - 1
        # A file below the target is not made smaller.
        factor = 0.0 if excess < 0 else math.exp(min(3.0, _PROPORTIONAL_GAIN * excess))
        self._step_weight = min(_MAX_WEIGHT, self.weight * factor)
        step = _INTEGRAL_GAIN * max(-1.0, min(1.0, excess))
        self.weight = min(_MAX_WEIGHT, max(_MIN_WEIGHT, self.weight * math.exp(step)))

    def _is_finite(self, estimated: Tensor) -> bool:
        """Whether a file could hold the numbers; those of a fit that has diverged are reported after the step."""
        values = [estimated, *self._representation.tuned.parameters()]
        return all(bool(value.isfinite().all()) for value in values)

    def _measured(self) -> tuple[float, float]:
        """The bytes of the file without the coded integers, and the bits of these."""
        sizes = self._representation.sizes(self.options.kept, self.options.fold_batch_norm)
        coded_bits = sizes.code_bits - self.predictor.predictor.code_bits
        return sizes.file_bytes - coded_bits / 8, coded_bits

    def state_dict(self) -> dict[str, float]:
        """What a resumed fit needs to continue in the same way."""
        return {
            "weight": self.weight,
            "target_bytes": self.target_bytes or 0,
            "fixed_bytes": self.fixed_bytes,
            "coded_ratio": self.coded_ratio,
            "steps": self.steps,
        }

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over the state of the fit that is resumed."""
        self.weight, self.fixed_bytes = state["weight"], state["fixed_bytes"]
        self._optimizer_step, self._step_weight = -1, self.weight
        self.target_bytes = int(state.get("target_bytes", self.target_bytes or 0)) or None
        self.coded_ratio, self.steps = state["coded_ratio"], int(state["steps"])
