"""The options of the MLP that the papers do not have. Every variant keeps the contract of predictors."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nernlit
from nernlit.errors import UsageError
from nernlit.originals import Original
from nernlit.predictors import MLP, PredictorEnsemble, Quantize
from nernlit.representation import Representation
from tests.reference import slow

LAYERS = [(4, 1), (4, 4), (6, 4), (6, 6)]  # the last two are a stage of their own
ADDRESSES = torch.tensor([[0, 3, 0], [1, 0, 3], [2, 5, 1], [3, 2, 5]])
ALL = {"activation": "sine", "residual": True, "heads": "stage", "embedding": 2, "embedding_share": "layer", "rank": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "vectors": {"embedding": 3},
    "vectors_alone": {"embedding": 5, "embedding_share": "layer", "num_frequencies": 0},
    "heads": {"heads": "stage"},
    "sine": {"activation": "sine"},
    "residual": {"residual": True},
    "factorized": {"rank": 3},
    "all": ALL,
}
#: Activation of each hidden number.
ACTIVATIONS = {"relu": lambda value: max(value, 0.0), "sine": math.sin}


def _mlp(options: dict[str, Any]) -> MLP:
    torch.manual_seed(0)
    return MLP(**{"hidden": 7, "depth": 4, "num_frequencies": 4, **options})


def _bound(options: dict[str, Any]) -> MLP:
    mlp = _mlp(options)
    mlp.bind(LAYERS)
    return mlp


def _expected(mlp: MLP, address: list[int]) -> Tensor:
    """The kernel of an address, layer by layer."""
    inputs = slow.encode(*address, num_frequencies=mlp.num_frequencies, base=mlp.base)
    if mlp.vectors is not None:
        rows = list(address)
        if mlp.embedding_share == "layer":
            rows[1] += sum(filters for filters, _ in LAYERS[: address[0]])
            rows[2] += sum(channels for _, channels in LAYERS[: address[0]])
        for table, row in zip(mlp.vectors.tables, rows, strict=True):
            assert isinstance(table, nn.Embedding)
            inputs += table.weight[row].tolist()
    *factors, first = [module for module in mlp.first.modules() if isinstance(module, nn.Linear)]
    *middle, last = [module for module in mlp.rest if isinstance(module, nn.Linear)]
    hidden = torch.tensor(inputs)
    for factor in factors:
        hidden = factor.weight @ hidden
    hidden = first.weight @ hidden + first.bias
    act = ACTIVATIONS[mlp.activation]
    for linear in middle:
        change = linear.weight @ torch.tensor([act(value) for value in hidden.tolist()]) + linear.bias
        hidden = hidden + change if mlp.residual else change
    values = last.weight @ torch.tensor([act(value) for value in hidden.tolist()]) + last.bias
    stage = 1 if mlp.heads == "stage" and address[0] >= 2 else 0
    return values[9 * stage :][:9].view(3, 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_equals_the_plain_reference(variant: str) -> None:
    mlp = _bound(VARIANTS[variant])
    with torch.no_grad():
        predicted = mlp(ADDRESSES.int())
        for row, address in enumerate(ADDRESSES.tolist()):
            assert torch.allclose(predicted[row], _expected(mlp, address), atol=1e-5), address


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_counts_its_parameters_and_trains_all_of_them(variant: str) -> None:
    mlp, options = _bound(VARIANTS[variant]), VARIANTS[variant]
    vectors = {"network": 4 + 6 + 6, "layer": 4 + 20 + 15}[options.get("embedding_share", "network")]
    embedding, heads = options.get("embedding", 0), 2 if options.get("heads") == "stage" else 1
    inputs = 3 * (2 * options.get("num_frequencies", 4) + embedding)
    rank = options.get("rank", 0)
    first = rank * (inputs + 7) if rank else inputs * 7
    assert mlp.num_params == vectors * embedding + first + 7 + 2 * (49 + 7) + heads * (9 * 7 + 9)
    grid = [(layer, f, c) for layer, (fs, cs) in enumerate(LAYERS) for f in range(fs) for c in range(cs)]
    mlp(torch.tensor(grid)).square().sum().backward()
    for name, parameter in mlp.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_trials_of_a_variant_have_their_own_seeds_and_are_computed_together(variant: str) -> None:
    ensemble = PredictorEnsemble(_bound(VARIANTS[variant]), 2)
    ensemble.reset(1, 2)
    kernels = ensemble(ADDRESSES)
    assert torch.allclose(ensemble.batched(ADDRESSES), kernels, atol=1e-6)
    assert not torch.allclose(kernels[0], kernels[1])
    for number, parameter in enumerate(ensemble.each[0].parameters()):
        assert not torch.equal(parameter, list(ensemble.each[1].parameters())[number])
    before = [parameter.clone() for parameter in ensemble.parameters()]
    ensemble.reset(1, 2)
    assert all(torch.equal(one, two) for one, two in zip(ensemble.parameters(), before, strict=True))


@pytest.mark.parametrize("quantize", [None, Quantize(6.0)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_files_of_a_variant_hold_the_network(variant: str, quantize: Quantize | None, tmp_path: Path) -> None:
    original = Original("digits_resnet8", pretrained=True)
    representation = Representation(original, _mlp(VARIANTS[variant]), order="none", quantize=quantize)
    assert representation.sizes().predictor_params == representation.predictor.num_params
    representation.save(tmp_path / "net.nern")
    assert representation.sizes().file_bytes == (tmp_path / "net.nern").stat().st_size
    loaded = nernlit.load(tmp_path / "net.nern")
    assert loaded.specification() == representation.specification()
    weights = representation.eval().weights()
    for key, weight in loaded.weights().items():
        assert torch.allclose(weight, weights[key], atol=1e-2 if quantize else 1e-6), key
    twin = Representation(original, MLP(**{**_arguments(representation), "hidden": 7}), order="none", quantize=quantize)
    twin.load_state_dict(representation.state_dict())
    assert all(torch.equal(weight, weights[key]) for key, weight in twin.weights().items())


def _arguments(representation: Representation) -> dict[str, Any]:
    specified: dict[str, Any] = representation.specification()["predictor"]["init_args"]
    inner = specified.get("predictor", {"init_args": specified})
    arguments: dict[str, Any] = inner["init_args"]
    return arguments


def test_sirens_start_with_their_own_initialization() -> None:
    mlp = _bound({"activation": "sine", "hidden": 400, "num_frequencies": 40})
    weights = [mlp.first.weight, *(m.weight for m in mlp.rest if isinstance(m, nn.Linear))]
    for weight in weights:
        bound = math.sqrt(6 / weight.shape[1])
        assert 0.98 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_the_papers_mlp_has_the_same_names_numbers_and_specification_as_without_these_options() -> None:
    mlp = _bound({})
    assert list(mlp.state_dict()) == [
        f"{layer}.{kind}" for layer in ("first", "rest.1", "rest.3", "rest.5") for kind in ("weight", "bias")
    ]
    torch.manual_seed(0)
    for linear in (mlp.first, mlp.rest[1], mlp.rest[3], mlp.rest[5]):
        assert isinstance(linear, nn.Linear)
        assert torch.equal(linear.weight, nn.Linear(linear.in_features, linear.out_features).weight)
    names = {"hidden", "depth", "activation", "kernel_size", "num_frequencies", "base"}
    assert set(mlp.specification()["init_args"]) == names
    assert set(_mlp(ALL).specification()["init_args"]) == {*names, *ALL}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "cosine"}, "activation='cosine'; expected one of relu, gelu, silu, tanh, sine"),
        ({"heads": "filter"}, "heads='filter'; expected one of network, stage"),
        ({"embedding": -1}, "embedding=-1; expected at least 0"),
        ({"embedding": 2, "embedding_share": "all"}, "embedding_share='all'; expected one of network, layer"),
        ({"embedding_share": "layer"}, "embedding_share='layer' has no effect with embedding=0"),
        ({"rank": -1}, "rank=-1; expected at least 0"),
        ({"residual": True, "depth": 2}, "residual=True has no effect with depth=2"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        _mlp(options)
