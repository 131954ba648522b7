"""Calibration: fit the kept tensors so that the reconstructed network's activations match the original's.

The errors of predicted weights change the mean and the scale of each channel of activations. The scales and shifts of
normalization layers and the biases of other layers are not predicted, and stored anyway. Least squares between the
activations of both networks on a few images gives the values that undo most of this, without labels and gradients.
Layers are fitted in the order in which they run, so that each one's inputs are already corrected.

Shapes: B images; M samples of the activations of C channels or input features, D output features.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import timm.layers
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle

from nernlit.errors import DataError, DivergenceError, UsageError
from nernlit.originals import BATCH_NORMS, require_classifier, require_pixels
from nernlit.representation.representation import Representation
from nernlit.utilities.processes import ALONE, Processes
from nernlit.utilities.progress import progress
from nernlit.utilities.sharing import names_of_weights, with_versions

#: Activations of a layer that are kept for the comparison, at most (8 MiB).
_SAMPLED_VALUES = 2**21
#: Added to the covariance of a linear layer's inputs, in units of their mean variance: the weights of directions that
#: the images do not show stay near the original's.
_RIDGE = 0.01

_LAYER_NORMS = (nn.LayerNorm, timm.layers.LayerNorm, timm.layers.LayerNorm2d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@torch.no_grad()
def calibrate(representation: Representation, images: Iterable[Tensor], processes: Processes = ALONE) -> None:
    """Set the kept tensors that are trained (`tune_kept`) to those that fit the original's activations best.

    The scale and the shift of each channel of a normalization layer (BatchNorm, LayerNorm, GroupNorm) minimize the
    squared distance of its outputs from the original's; so does the bias of a layer. Linear layers that are not
    predicted (`tune_kept: all`) get the weights and bias of a ridge regression that starts from the original's. Other
    kept tensors are the original's: those with several names, and those of modules that run twice and of linear layers
    that are applied to tokens. This takes two forward passes, and the memory of one for all images at once.

    Args:
        representation: The representation, whose original is the target; its `tuned` tensors are changed in place.
        images: Batches of pixels in [0, 1], the share of this process.
        processes: The processes that share the images; all of them get the same values.

    Raises:
        DataError: If the batches are no pixels in [0, 1].
        UsageError: If there are no images, or none of the tensors can be fitted.
        DivergenceError: If activations are not finite.
    """
    original = representation.original
    require_classifier("calibration", original.name, original.num_classes)
    net = representation.module()
    kept = {key: value for key, value in original.net.state_dict().items() if key in representation.tuned.keys}
    # So that calibrating again changes nothing.
    net.load_state_dict(with_versions(kept, net.state_dict()), strict=False)
    sites, samples = _sites(net, representation.tuned.keys), dict[str, tuple[Tensor, Tensor]]()
    batches = list(images)
    if not batches:
        raise UsageError("calibration: there are no images; pass at least one batch.")
    for batch in batches:
        if not isinstance(batch, Tensor):
            raise DataError(f"a batch for calibration is a {type(batch).__name__}; expected pixels (B, C, H, W).")
        require_pixels(batch)
        if batch.shape[1] != original.in_chans:
            raise DataError(
                f"a batch for calibration has {batch.shape[1]} channels; {original.name!r} takes {original.in_chans}."
            )
    pixels_BCHW = (torch.cat(batches).to(original.mean.device) - original.mean) / original.std
    calls: list[str] = []
    of_tokens: set[str] = set()

    def record(name: str, module: nn.Module, inputs: Tensor) -> None:
        calls.append(name)
        if isinstance(module, nn.Linear) and inputs.dim() > 2:
            of_tokens.add(name)  # their errors differ; fitting their mean made a Vision Transformer worse
            return
        features = sites[name].features(module, inputs)
        targets = sites[name].outputs(module, features)
        rows_M = _rows(len(features), max(features.shape[1], targets.shape[1]), len(calls))
        samples[name] = rows_M, targets[rows_M]

    def fit(name: str, module: nn.Module, inputs: Tensor) -> None:
        rows_M, targets = samples.pop(name)
        features = sites[name].features(module, inputs)[rows_M]
        sites[name].fit(module, features.double(), targets.double(), processes)
        if not all(value.isfinite().all() for value in module.parameters(recurse=False)):
            raise DivergenceError(
                f"calibration: the activations of {name!r} are not finite numbers; check the images, and whether the "
                "fit has diverged."
            )
        advance(1)

    with progress(f"calibrating {len(sites)} layers on {len(pixels_BCHW):,} images", 2 * len(sites)) as advance:
        with _hooks(original.net, sites, record):
            original.net(pixels_BCHW)
        once = [name for name in sites if calls.count(name) == 1 and name not in of_tokens]
        if not once:
            raise UsageError(
                "calibration: no kept tensor can be fitted. It fits scales and shifts of normalization layers, and "
                "biases, that representation.tune_kept chooses; leave calibration_images out."
            )
        with _hooks(net, once, fit):
            net(pixels_BCHW)
    state = net.state_dict()
    for key, value in representation.tuned.named().items():
        value.copy_(state[key])


class _Site(ABC):
    """How the kept tensors of a module are fitted: as a linear map from features to outputs, sample by sample."""

    @abstractmethod
    def features(self, module: Any, inputs: Tensor) -> Tensor:
        """What the kept tensors are applied to, (samples, C)."""

    @abstractmethod
    def outputs(self, module: Any, features_MC: Tensor) -> Tensor:
        """The module's outputs for these features, with its current kept tensors."""

    @abstractmethod
    def fit(self, module: Any, features_MC: Tensor, targets_MD: Tensor, processes: Processes) -> None:
        """Change the module's kept tensors so that its outputs are close to the targets, both in float64."""


@final
class _Norm(_Site):
    """The scale and the shift of a normalization layer."""

    def features(self, module: Any, inputs: Tensor) -> Tensor:
        if isinstance(module, nn.GroupNorm):
            return _by_channel(functional.group_norm(inputs, module.num_groups, eps=module.eps))
        if not isinstance(module, nn.LayerNorm):
            mean, variance = module.running_mean, module.running_var
            return _by_channel(functional.batch_norm(inputs, mean, variance, eps=module.eps))
        rows = _by_channel(inputs) if isinstance(module, timm.layers.LayerNorm2d) else inputs.flatten(0, -2)
        return functional.layer_norm(rows, rows.shape[1:], eps=module.eps)

    def outputs(self, module: Any, features_MC: Tensor) -> Tensor:
        outputs_MC: Tensor = features_MC * module.weight + module.bias
        return outputs_MC

    def fit(self, module: Any, features_MC: Tensor, targets_MD: Tensor, processes: Processes) -> None:
        moments = [targets_MD, features_MC, features_MC.square(), features_MC * targets_MD]
        target_C, feature_C, square_C, product_C = _means(moments, processes)
        variance_C = square_C - feature_C.square()
        slope_C = (product_C - feature_C * target_C) / variance_C
        varies = variance_C > 1e-9 * square_C
        module.weight.copy_(torch.where(varies, slope_C, module.weight))
        module.bias.copy_(target_C - module.weight * feature_C)


@final
class _Bias(_Site):
    """The bias of a convolution or a linear layer: the features are its outputs without it."""

    def features(self, module: Any, inputs: Tensor) -> Tensor:
        outputs = type(module).forward(module, inputs)  # without the hooks
        features_MC: Tensor = _by_channel(outputs) - module.bias
        return features_MC

    def outputs(self, module: Any, features_MC: Tensor) -> Tensor:
        outputs_MC: Tensor = features_MC + module.bias
        return outputs_MC

    def fit(self, module: Any, features_MC: Tensor, targets_MD: Tensor, processes: Processes) -> None:
        module.bias.copy_(_means([targets_MD - features_MC], processes)[0])


@final
class _Linear(_Site):
    """Weights and bias of a linear layer: ridge regression of the residual of the current ones."""

    def features(self, module: Any, inputs: Tensor) -> Tensor:
        return inputs  # (B, C): layers that are applied to tokens are left out

    def outputs(self, module: Any, features_MC: Tensor) -> Tensor:
        weight, bias = module.weight.to(features_MC), module.bias.to(features_MC)
        return functional.linear(features_MC, weight, bias)

    def fit(self, module: Any, features_MC: Tensor, targets_MD: Tensor, processes: Processes) -> None:
        residual_MD = targets_MD - self.outputs(module, features_MC)
        features = features_MC.shape[1]
        joined_ME = torch.cat([features_MC, residual_MD], 1)
        count, sums = _totals([joined_ME], processes)
        mean_E = sums[0] / count
        covariance_EE = processes.total(joined_ME.T @ joined_ME) / count - mean_E.outer(mean_E)
        inputs_CC = covariance_EE[:features, :features]
        ridge_C = (_RIDGE * inputs_CC.diagonal().mean()).expand(features)
        inverse_CC = torch.linalg.pinv(inputs_CC + ridge_C.diag(), hermitian=True)
        change_CD = inverse_CC @ covariance_EE[:features, features:]
        module.weight += change_CD.T
        module.bias += mean_E[features:] - mean_E[:features] @ change_CD


def _sites(net: nn.Module, keys: Iterable[str]) -> dict[str, _Site]:
    """Module name -> how its kept tensors are fitted.

    Args:
        net: The network.
        keys: The state-dict keys of the tensors that may change.
    """
    names = names_of_weights(net)
    free = {key for key in keys if len(names[key]) == 1}
    found: dict[str, _Site] = {}
    for name, module in net.named_modules():
        weight, bias = (f"{name}.{part}".removeprefix(".") in free for part in ("weight", "bias"))
        if weight and bias and _is_norm(module):
            found[name] = _Norm()
        elif weight and bias and type(module) is nn.Linear:
            found[name] = _Linear()
        elif bias and type(module) in (*_CONVOLUTIONS, nn.Linear):
            found[name] = _Bias()
    return found


def _is_norm(module: Any) -> bool:
    """Whether the module normalizes each channel, then applies a scale and a shift for each."""
    if type(module) in BATCH_NORMS:
        return module.running_mean is not None
    return type(module) is nn.GroupNorm or (type(module) in _LAYER_NORMS and len(module.normalized_shape) == 1)


@contextmanager
def _hooks(net: nn.Module, names: Iterable[str], hook: Any) -> Iterator[None]:
    """Call `hook(name, module, inputs)` before each of these modules runs."""
    handles: list[RemovableHandle] = []

    def call(name: str, module: nn.Module, args: tuple[Tensor, ...], options: dict[str, Tensor]) -> None:
        hook(name, module, args[0] if args else next(iter(options.values())))

    try:
        for name in names:
            handle = net.get_submodule(name).register_forward_pre_hook(partial(call, name), with_kwargs=True)
            handles.append(handle)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_channel(activations: Tensor) -> Tensor:
    """Activations (B, C, ...) as rows (samples, C)."""
    return activations.movedim(1, -1).flatten(0, -2)


def _rows(count: int, width: int, seed: int) -> Tensor:
    """Row indices (int64) of the samples to fit: all, or `_SAMPLED_VALUES / width` rows, drawn with replacement."""
    kept = max(1, _SAMPLED_VALUES // width)
    if count <= kept:
        return torch.arange(count)
    return torch.randint(count, (kept,), generator=torch.Generator().manual_seed(seed))


def _totals(values: list[Tensor], processes: Processes) -> tuple[float, Tensor]:
    """The number of samples of all processes, and the sums (len(values), C) over them."""
    sums = torch.stack([value.sum(0) for value in values])
    joined = processes.total(torch.cat([sums.flatten(), sums.new_tensor([float(len(values[0]))])]))
    return float(joined[-1]), joined[:-1].view_as(sums)


def _means(values: list[Tensor], processes: Processes) -> Tensor:
    """The means (len(values), C) over the samples of all processes."""
    count, sums = _totals(values, processes)
    return sums / count
