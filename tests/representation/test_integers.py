import pytest
import torch

from nernlit.errors import UsageError
from nernlit.predictors import MLP, Quantize, Table
from nernlit.representation import Representation
from nernlit.representation.integers import integer_weights
from tests.fakes import tiny_original


def _table(quantize: Quantize | None, scale: str = "none", **options: object) -> Representation:
    return Representation(tiny_original(), Table(5, scale=scale), quantize=quantize, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quantize", "scale", "options"),
    [
        (Quantize(4.0, "tensor"), "none", {"order": "cross_filter"}),
        (Quantize(3.0, "row"), "layer", {"order": "in_filter"}),
        (Quantize(2.0, "tensor"), "filter", {"order": "none", "pointwise": "tile", "layers": "all"}),
        (Quantize(2.0, "row"), "filter", {"order": "none", "pointwise": "tile", "layers": "all", "standardize": False}),
    ],
)
def test_weights_are_integers_times_step_sizes(quantize: Quantize, scale: str, options: dict[str, object]) -> None:
    representation = _table(quantize, scale, **options)
    weights = representation.weights()
    found = integer_weights(representation)
    assert list(found) == list(weights)
    per_row = quantize.per == "row" or scale == "filter"
    for key, weight in found.items():
        assert weight.integers.dtype == torch.int8
        assert weight.steps.shape == ((len(weights[key]),) if per_row else ())
        steps = weight.steps.view(-1, *[1] * (weights[key].dim() - 1))
        assert torch.allclose(weight.integers * steps, weights[key], rtol=1e-5, atol=0)


def test_scales_that_are_negative_or_zero_keep_their_weights() -> None:
    representation = _table(Quantize(3.0), "layer")
    scales = representation.predictor.predictor.scales.values  # type: ignore[union-attr]
    torch.nn.init.constant_(scales[:1], -1.5)
    torch.nn.init.zeros_(scales[1:2])
    first, second, *_ = zip(integer_weights(representation).values(), representation.weights().values(), strict=True)
    assert first[0].steps > 0
    assert torch.allclose(first[0].integers * first[0].steps, first[1], rtol=1e-5, atol=0)
    assert not second[1].any()
    assert not second[0].integers.any()


def test_what_is_no_integer_of_eight_bits_is_refused() -> None:
    mlp = Representation(tiny_original(), MLP(8, kernel_size=5, num_frequencies=4), quantize=Quantize(4.0))
    for representation, message in (
        (_table(None), "weights as integers need a quantized Table; Table is not quantized. Leave out --integers"),
        (mlp, "weights as integers need a quantized Table; MLP computes weights from its integers"),
        (_table(Quantize(11.0)), r"weight has integers up to \d+, and int8 holds 127; .* with fewer .*quantize.bits"),
        (
            _table(Quantize(3.0, "row"), order="cross_filter"),
            "an output channel of .*weight has several step sizes, and ONNX stores one; .*representation.order none",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            integer_weights(representation)
