"""How the study's settings weigh errors of predicted kernels: by sensitivities of weights, or a quadratic form.

Shapes: N kernels, K kernel side; S kernels of a step; O filters of a layer, D inputs of a filter.
"""

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from nernlit.data import CIFAR10DataModule
from nernlit.kernels import Uniform, addresses, derive_seed
from nernlit.losses import reconstruction_mse
from nernlit.originals import Factors, Original, kronecker_factors
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.training.filter_errors import FilterErrors, FilterSample, FilterWeights
from nernlit.training.sensitivity import Sensitivity, error_weights, weights_of_filters
from tests.benchmarks.study_settings import Level, Setting

#: State-dict key -> powers of the factors (O, O) and (D, D) of the Fisher information of a convolution's weight (O, D).
Roots = dict[str, tuple[Tensor, Tensor]]
_IMAGES = 1024  # that factors are computed from
_SMALLEST = 1e-3  # error weight that a unit of outputs is computed from


class Errors:
    """The mean squared error of a step's kernels in units of the network's scale, weighted as a setting says.

    Args:
        whole: The representation; some settings change its addresses or the scale of its predictor's outputs.
        setting: The setting.
        images: The folder of CIFAR-10; None for settings that need no images.
    """

    def __init__(self, whole: Representation, setting: Setting, images: Path | None) -> None:
        self.whole, self.setting = whole, setting
        self.target = whole.target / whole.scale
        self.weights_NKK: Tensor | None = None
        self.shares_N: Tensor | None = None
        self.roots: Roots = {}
        self.filters: FilterErrors | None = None
        self.sample = FilterSample()
        if setting.scale_layers:
            _scale_outputs(whole, _layer_scales(whole))
        if setting.factors:
            factors = _fisher_factors(whole.original, _folder(images))
            self.roots = {key: _roots(pair, setting.factors) for key, pair in factors.items()}
        if setting.sensitivity.kind == "none":
            return
        if setting.sensitivity.kind == "kronecker":
            self.norms_N = whole.target.flatten(1).norm(dim=1).cpu()
            weights = _filter_weights(whole.original, setting.sensitivity, _folder(images))
            self.filters = FilterErrors(whole.layout, weights).to(whole.target.device)
            return
        weights_NKK = _error_weights(whole.original, setting.sensitivity, _folder(images)).to(whole.target.device)
        if setting.scaled_order:
            _reorder(whole, weights_NKK)
        weights_NKK = averaged(whole, weights_NKK, setting.level)
        if setting.scaled:
            _scale_outputs(whole, weights_NKK.amax((1, 2)).clamp_min(_SMALLEST).rsqrt())  # 0 of a dead filter
        if setting.sampled:
            self.shares_N = weights_NKK.mean((1, 2)).cpu()
        else:
            self.weights_NKK = weights_NKK

    def drawn(self, rows_S: Tensor, seed: int, step: int) -> Tensor:
        """The rows of a step's kernels, on the CPU: those given, or about as many: drawn by weight, or of filters."""
        if self.filters is not None:
            (self.sample,) = self.filters.sample(Uniform(len(rows_S)), self.norms_N, seed, step, 1)
            return self.filters.rows(self.sample)
        return rows_S if self.shares_N is None else torch.multinomial(self.shares_N, len(rows_S), replacement=True)

    def __call__(self, predicted_SKK: Tensor, rows_S: Tensor, progress: float) -> Tensor:
        """The error of predicted kernels in units of the network's scale.

        Args:
            predicted_SKK: The predictions.
            rows_S: Their rows of the table.
            progress: The share of the fit that is over.
        """
        target_SKK = self.target[rows_S]
        if self.filters is not None:
            return self.filters(predicted_SKK - target_SKK, self.sample)
        if self.roots:
            return quadratic(self.whole.layout.weights(predicted_SKK - target_SKK), self.roots)
        part = self.whole.learned.mask(rows_S)
        if self.weights_NKK is None:
            return reconstruction_mse(predicted_SKK, target_SKK, part)
        powers_NKK = self.weights_NKK
        if self.setting.anneal:
            powers_NKK = powers_NKK ** (1 - progress) * (powers_NKK > 0)
        weights_SKK = powers_NKK[rows_S] * (self.whole.layout.num_weights / powers_NKK.sum())
        count = float(weights_SKK.numel() if part is None else part.sum())
        return reconstruction_mse(predicted_SKK, target_SKK, weights_SKK, count)


def _folder(images: Path | None) -> Path:
    if images is None:
        raise SystemExit("a setting with a sensitivity needs --images DIR")
    return images


def _layer_scales(whole: Representation) -> Tensor:
    """Of every kernel, its layer's root mean square over that of all weights, shape (N,)."""
    means = [whole.target[layer.rows].square().sum() / layer.weights for layer in whole.layout.layers]
    kernels = torch.tensor([layer.kernels for layer in whole.layout.layers], device=whole.scale.device)
    return (torch.stack(means).sqrt() / whole.scale).repeat_interleave(kernels)


def _scale_outputs(whole: Representation, units_N: Tensor) -> None:
    """Multiply the predictor's outputs by a unit of each kernel; the kernels of a filter have the same one."""
    layers_N, filters_N, _ = whole.addresses.long().unbind(1)
    units = units_N.new_ones(int(layers_N.max()) + 1, int(filters_N.max()) + 1)
    units[layers_N, filters_N] = units_N

    def scaled(predictor: nn.Module, inputs: tuple[Tensor], outputs_SKK: Tensor) -> Tensor:
        layers_S, filters_S, _ = inputs[0].long().unbind(1)
        return outputs_SKK * units[layers_S, filters_S].view(-1, 1, 1)

    whole.predictor.register_forward_hook(scaled)


def averaged(whole: Representation, errors_NKK: Tensor, level: Level) -> Tensor:
    """The mean error weight of each kernel, or of its filter or layer, for all of its entries."""
    if level == "entry":
        return errors_NKK
    means_N = errors_NKK.mean((1, 2))
    if level != "kernel":
        parts = []
        for layer in whole.layout.layers:
            means = means_N[layer.rows].view(layer.grid)
            mean = means.mean() if level == "layer" else means.mean(1, keepdim=True)
            parts.append(mean.expand(layer.grid).flatten())
        means_N = torch.cat(parts)
    return means_N[:, None, None].expand_as(errors_NKK).contiguous()


def _reorder(whole: Representation, errors_NKK: Tensor) -> None:
    """Addresses by the order of the kernels times the square roots of their error weights."""
    scaled = whole.layout.weights((whole.target * errors_NKK.sqrt()).cpu())
    device = whole.addresses.device
    whole.set_constant("addresses", addresses(whole.layout, scaled, whole.order).int().to(device))


@cache
def _error_weights(original: Original, sensitivity: Sensitivity, images: Path) -> Tensor:
    data = CIFAR10DataModule(str(images))
    return error_weights(Representation(original, MLP(8), order="none"), sensitivity, sensitivity.images(data)).cpu()


@cache
def _filter_weights(original: Original, sensitivity: Sensitivity, images: Path) -> FilterWeights:
    data = CIFAR10DataModule(str(images))
    return weights_of_filters(Representation(original, MLP(8), order="none"), sensitivity, sensitivity.images(data))


@cache
def _fisher_factors(original: Original, images: Path) -> dict[str, Factors]:
    data = CIFAR10DataModule(str(images))
    keys = [layer.key for layer in Representation(original, MLP(8), order="none").layout.layers]
    chosen = [pixels.to(original.mean.device) for pixels in Sensitivity("fisher", num_images=_IMAGES).images(data)]
    return kronecker_factors(original, keys, chosen, derive_seed(0, 1))


def _roots(pair: Factors, exponent: float) -> tuple[Tensor, Tensor]:
    """The factors to the power of half of the exponent."""
    outer, inner = (_power(factor, exponent / 2).float() for factor in pair)
    return outer, inner


def _power(matrix: Tensor, exponent: float) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(0).pow(exponent) @ vectors.T


def quadratic(errors: Mapping[str, Tensor], roots: Roots) -> Tensor:
    """tr(G dW A dW^T), summed over layers, over its value for errors of variance 1 that are independent.

    Args:
        errors: State-dict key -> dW of the weight's shape (O, ...).
        roots: State-dict key -> the square roots of G (O, O) and A (D, D), both symmetric.
    """
    total = torch.stack(
        [(outer @ errors[key].flatten(1) @ inner).square().sum() for key, (outer, inner) in roots.items()]
    )
    # tr(G) tr(A), summed over layers.
    expected = sum(float(outer.square().sum() * inner.square().sum()) for outer, inner in roots.values())
    return total.sum() / expected
