import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import nernlit
from nernlit.errors import LayoutError, UsageError
from nernlit.predictors import MLP, Codebooks, Predictor, Quantize, Quantized, Table
from nernlit.representation import Representation
from nernlit.storage.entropy import encode_weights
from tests.fakes import digits_representation, tiny_original

PREDICTORS: dict[str, Callable[[], Predictor]] = {
    "mlp": lambda: MLP(24, kernel_size=5),
    "table": lambda: Table(5),
    "table_layer": lambda: Table(5, scale="layer"),
    "table_filter": lambda: Table(5, scale="filter"),
    "codebooks": lambda: Codebooks(2, 3, kernel_size=5),
}


def _quantized(name: str, bits: float = 3.0, per: str = "tensor") -> Representation:
    return Representation(tiny_original(), PREDICTORS[name](), quantize=Quantize(bits, per))  # type: ignore[arg-type]


def _predictor(representation: Representation) -> Quantized:
    predictor = representation.predictor
    assert isinstance(predictor, Quantized)
    return predictor


@pytest.mark.parametrize("per", ["tensor", "row"])
@pytest.mark.parametrize("name", PREDICTORS)
def test_a_file_holds_the_same_network(name: str, per: str, tmp_path: Path) -> None:
    representation = _quantized(name, per=per)
    representation.save(tmp_path / "net.nern")
    loaded = nernlit.load(tmp_path / "net.nern", net=tiny_original().net)
    for key, value in representation.weights().items():
        assert torch.equal(loaded.weights()[key], value), key
    assert loaded.specification() == representation.specification()


@pytest.mark.parametrize("name", PREDICTORS)
def test_every_rounded_number_is_a_multiple_of_its_step(name: str) -> None:
    predictor = _predictor(_quantized(name))
    steps = predictor.steps().split([len(sizes) for sizes in predictor.sizes.values()])
    for (parameter, sizes), own in zip(predictor.sizes.items(), steps, strict=True):
        values = predictor.rounded_parameters()[parameter].flatten()
        used = predictor.predictor.used_masks().get(parameter)
        values = (values if used is None else values[used.flatten()]).split(sizes)
        for group, step in zip(values, own, strict=True):
            multiples = group / step
            assert torch.allclose(multiples, multiples.round(), atol=1e-3)


@pytest.mark.parametrize("bits", [1.5, 3.0, 8.0])
def test_it_starts_at_the_bits_that_are_asked_for(bits: float) -> None:
    original = digits_representation().original
    representation = Representation(original, Table(scale="layer"), order="none", quantize=Quantize(bits))
    _, entropy = _predictor(representation).rate()
    assert float(entropy) / representation.layout.num_weights == pytest.approx(bits, rel=0.02)


def test_many_bits_are_nearly_exact() -> None:
    original = tiny_original()
    representation = Representation(original, Table(5), quantize=Quantize(12))
    for key, value in representation.weights().items():
        assert torch.allclose(value, original.net.state_dict()[key], atol=2e-3 * float(value.abs().max()))


def test_the_entropy_of_unrelated_numbers_is_within_a_percent_of_the_coded_ones() -> None:
    original = digits_representation().original
    representation = Representation(original, Table(scale="layer"), order="none", quantize=Quantize(2.0))
    predictor = _predictor(representation)
    _, entropy = predictor.rate()
    assert 8 * len(predictor.stored()["integers"]) == pytest.approx(float(entropy), rel=0.01)


def test_gradients_are_those_of_learned_step_sizes() -> None:
    # Of a rounded number s * round(w / s): 1 for w, and round(w / s) - w / s for s, which is 0.5 for all w.
    predictor = Quantized(Table(1), bits=2.0)
    predictor.bind([(2, 3)])
    values = torch.tensor([0.3, -1.2, 0.8, 2.1, -0.4, 0.1])
    with torch.no_grad():
        predictor.predictor.get_parameter("entries").copy_(values.view(6, 1, 1))
        predictor.log_ratios.fill_(math.log(0.5 / float(values.square().mean().sqrt())))
    addresses = torch.tensor([[0, o, i] for o in range(2) for i in range(3)])
    weights = torch.arange(1.0, 7.0)
    (predictor(addresses).flatten() * weights).sum().backward()
    grad = predictor.predictor.get_parameter("entries").grad
    assert grad is not None
    for_step = (weights * ((values / 0.5).round() - values / 0.5)).sum()
    expected = 0.5 * for_step
    # s is in one proportion to the root mean square of all w.
    assert torch.allclose(grad.flatten(), weights + expected * values / values.square().sum())
    assert predictor.log_ratios.grad is not None
    assert float(predictor.log_ratios.grad) == pytest.approx(float(expected), rel=1e-5)


def test_many_kernels_are_predicted_in_chunks_with_parameters_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    representation = _quantized("table_layer")
    whole = representation.weights()
    monkeypatch.setattr("nernlit.coding.prediction._MAX_UNCHUNKED", 10)
    monkeypatch.setattr("nernlit.coding.prediction._CHUNK", 7)
    calls = []
    real = Quantized.rounded_parameters
    monkeypatch.setattr(Quantized, "rounded_parameters", lambda self: calls.append(1) or real(self))
    for key, value in representation.weights().items():
        assert torch.equal(value, whole[key])
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0.0}, r"quantize.bits=0.0; expected above 0 and at most 12"),
        ({"bits": 13.0}, r"quantize.bits=13.0; expected above 0 and at most 12"),
        ({"per": "filter"}, r"quantize.per='filter'; expected one of tensor, row"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Representation(tiny_original(), Table(5), quantize=Quantize(**options))  # type: ignore[arg-type]


def test_a_quantized_predictor_is_not_quantized_again() -> None:
    with pytest.raises(UsageError, match="is already a Quantized"):
        Representation(tiny_original(), Quantized(Table(5)), quantize=Quantize())


def test_a_damaged_step_size_is_an_error() -> None:
    predictor = _predictor(_quantized("table"))
    stored = predictor.stored()
    stored["steps"][0] = math.nan
    with pytest.raises(LayoutError, match="step size of the predictor is not a finite number above 0"):
        predictor.load_stored(stored)


@pytest.mark.parametrize("name", PREDICTORS)
def test_a_stage_starts_from_multiples_of_the_steps_with_the_same_predictions(name: str) -> None:
    predictor = _predictor(representation := _quantized(name, per="row"))
    before, steps_G = representation.weights(), predictor.steps().detach()
    predictor.start_stage()
    assert torch.equal(predictor.steps(), steps_G)
    for key, value in representation.weights().items():
        assert torch.equal(value, before[key]), key
    for parameter, value in predictor.rounded_parameters().items():
        if parameter in predictor.sizes:
            torch.testing.assert_close(predictor.predictor.get_parameter(parameter), value, rtol=1e-6, atol=0)


def test_the_steps_have_a_smaller_learning_rate() -> None:
    representation = _quantized("table")
    ratios = representation.lr_multipliers()
    assert ratios == {_predictor(representation).log_ratios: 0.2}


@pytest.mark.parametrize("name", ["mlp", "table"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_conversion_of_its_parameters_hardly_changes_the_network(name: str, dtype: torch.dtype) -> None:
    representation = _quantized(name)
    representation.predictor.start_stage()  # on multiples of the steps, as after loading a file
    before = representation.kernels().detach()
    after = copy.deepcopy(representation).to(dtype).kernels().detach().float()
    assert float((after - before).norm() / before.norm()) < (0.02 if dtype == torch.bfloat16 else 0.003)


def test_numbers_outside_of_crops_cost_nothing(tmp_path: Path) -> None:
    original = tiny_original()  # 5x5, 3x3, 1x3 and 1x1 kernels
    large, small = (Representation(original, Table(size), quantize=Quantize(3.0)) for size in (9, 5))
    predictor = _predictor(large)
    assert len(predictor.all_sizes) == len(large.layout.layers)
    assert sum(predictor.all_sizes) == large.layout.num_weights
    assert torch.equal(predictor.stored()["integers"], _predictor(small).stored()["integers"])
    assert predictor.num_params == large.layout.num_weights + len(predictor.all_sizes)  # and the step sizes
    for key, value in large.weights().items():
        assert torch.equal(small.weights()[key], value)


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_step_sizes_are_chosen_on_a_sample_of_large_groups(per: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = digits_representation().original
    whole = _predictor(Representation(original, Table(), quantize=Quantize(2.0, per)))  # type: ignore[arg-type]
    monkeypatch.setattr("nernlit.predictors.quantized._SAMPLE_SIZE", 1_000)
    assert any(size > 1_000 for size in whole.all_sizes) == (per == "tensor")
    sampled = _predictor(Representation(original, Table(), quantize=Quantize(2.0, per)))  # type: ignore[arg-type]
    again = _predictor(Representation(original, Table(), quantize=Quantize(2.0, per)))  # type: ignore[arg-type]
    assert torch.equal(sampled.log_ratios, again.log_ratios)
    assert torch.equal(sampled.log_ratios, whole.log_ratios) == (per == "row")
    assert float(sampled.rate()[1]) == pytest.approx(float(whole.rate()[1]), rel=0.02)


def test_step_sizes_are_not_chosen_when_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    representation = _quantized("table")
    representation.save(tmp_path / "net.nern")
    monkeypatch.setattr("nernlit.predictors.quantized._step_to_rms_ratio", None)
    loaded = nernlit.load(tmp_path / "net.nern", net=tiny_original().net)
    assert torch.equal(loaded.kernels(), representation.kernels())


def test_sizes_code_the_numbers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    representation = _quantized("table")
    bits = _predictor(representation).code_bits
    coded: list[torch.Tensor] = []

    def encode(*args: Any) -> torch.Tensor:
        coded.append(encode_weights(*args))
        return coded[-1]

    monkeypatch.setattr("nernlit.predictors.quantized.encode_weights", encode)
    assert representation.sizes().code_bits == bits == 8 * len(coded[0])
    assert len(coded) == 1


def test_more_bits_than_small_groups_can_show_are_those_of_a_normal_distribution() -> None:
    torch.manual_seed(0)
    predictor = Quantized(Table(), bits=4.0, per="row")
    predictor.bind([(512, 8), (4096, 1)])
    entries = predictor.predictor.get_parameter("entries")
    torch.nn.init.normal_(entries)
    for bits in (4.0, 3.0):
        predictor.restart(bits)
        integers_n = entries.detach().flatten() / predictor.step_sizes()["entries"].flatten()
        shares = integers_n.round().unique(return_counts=True)[1] / integers_n.numel()
        assert float(-(shares * shares.log2()).sum()) == pytest.approx(bits, abs=0.3)


def test_the_rate_of_parameters_that_are_not_finite_is_not_finite() -> None:
    predictor = Quantized(Table(), bits=3.0)
    predictor.bind([(8, 8)])
    predictor.reset_parameters()
    with torch.no_grad():
        predictor.predictor.get_parameter("entries")[0, 0, 0] = torch.nan
    assert not bool(predictor.rate()[0].isfinite())
