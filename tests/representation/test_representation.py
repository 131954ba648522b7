import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import nernlit
from nernlit.coding import prediction
from nernlit.errors import CheckpointError, LayoutError, UsageError
from nernlit.kernels import LayerFilter, packed_bits
from nernlit.originals import Original, load_strictly, read_state_dict
from nernlit.predictors import MLP, Predictor, Table
from nernlit.representation import Representation, load_representation
from tests.fakes import TinyCNN, digits_representation, tiny_original, tiny_representation

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Oracle(Predictor):
    """Knows every kernel by its address: a predictor without error."""

    def bind(self, layers: Sequence[tuple[int, int]]) -> None:
        self.extent = len(layers), max(filters for filters, _ in layers), max(channels for _, channels in layers)

    def learn(self, representation: Representation) -> None:
        places = representation.addresses.long()
        self.table = torch.zeros(*self.extent, self.kernel_size, self.kernel_size)
        self.table[places[:, 0], places[:, 1], places[:, 2]] = representation.target / representation.scale

    def forward(self, addresses_N3: torch.Tensor) -> torch.Tensor:
        return self.table[tuple(addresses_N3.long().T)]


@pytest.mark.parametrize("order", ["none", "in_filter", "cross_filter"])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("kernel_size", [5, 7])
def test_a_perfect_predictor_gives_the_original_back(order: str, standardize: bool, kernel_size: int) -> None:
    oracle = Oracle(kernel_size)
    original = tiny_original()
    representation = Representation(original, oracle, order=order, standardize=standardize)  # type: ignore[arg-type]
    oracle.learn(representation)
    for key, value in representation.reconstructed().items():
        assert torch.allclose(value, original.net.state_dict()[key], rtol=1e-6, atol=0)
    assert torch.allclose(representation(IMAGES), original(IMAGES), atol=1e-5)


def test_target_holds_the_originals_weights_to_the_bit() -> None:
    representation = tiny_representation()
    for key, value in representation.layout.weights(representation.target).items():
        assert torch.equal(value, representation.original.net.state_dict()[key])


def test_forward_is_the_original_with_the_reconstructed_weights() -> None:
    representation = tiny_representation()
    twin = copy.deepcopy(representation.original)
    twin.net.load_state_dict(representation.reconstructed())
    assert torch.allclose(representation(IMAGES), twin(IMAGES), atol=1e-6)
    assert torch.equal(representation(IMAGES, representation.weights()), representation(IMAGES))


def test_kernels_of_some_rows_are_rows_of_all_kernels() -> None:
    representation = tiny_representation()
    rows = torch.tensor([3, 60, 0])
    assert torch.allclose(representation.kernels(rows), representation.kernels()[rows], atol=1e-7)
    mask = representation.learned.mask(rows)
    assert mask is not None
    assert mask.flatten(1).sum(1).tolist() == [25, 3, 25]


def test_gradients_reach_the_predictor_and_nothing_else() -> None:
    representation = tiny_representation()
    before = representation.original.fingerprint()
    representation.train()
    representation(IMAGES).square().sum().backward()
    assert all(p.grad is not None for p in representation.predictor.parameters())
    assert all(p.grad is None for p in representation.original.parameters())
    assert representation.original.fingerprint() == before  # BatchNorm statistics included


def test_the_state_dict_carries_no_weight_of_the_original() -> None:
    representation = tiny_representation()
    state = representation.state_dict()
    assert not [key for key in state if key.startswith("original")]
    other = tiny_representation()
    with torch.no_grad():
        for parameter in other.predictor.parameters():
            parameter.zero_()
    other.load_state_dict(state)
    assert torch.equal(other(IMAGES), representation(IMAGES))


def test_a_checkpoint_of_another_original_is_refused() -> None:
    with pytest.raises(CheckpointError, match="fitted to another original"):
        tiny_representation(1).load_state_dict(tiny_representation(0).state_dict())


def test_the_specification_is_primitives_that_a_checkpoint_holds(tmp_path: Path) -> None:
    representation = digits_representation()
    specification = representation.specification()
    assert json.loads(json.dumps(specification)) == specification
    assert specification["order"] == "in_filter"
    assert specification["standardize"] is True
    assert specification["layers"]["conv1.weight"] == [16, 1, 3, 3]
    assert specification["predictor"] == {
        "class_path": "nernlit.predictors.mlp.MLP",
        "init_args": {
            "hidden": 8,
            "depth": 5,
            "activation": "relu",
            "kernel_size": 3,
            "num_frequencies": 4,
            "base": 0.76,
        },
    }
    torch.save(representation.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    digits_representation().load_state_dict(state)
    assert state["_extra_state"]["specification"] == specification


@pytest.mark.parametrize(
    ("predictor", "options", "message"),
    [
        ({"activation": "gelu"}, {}, "predictor.init_args.activation is 'gelu' here and 'relu' in the checkpoint"),
        ({"base": 0.5}, {}, r"predictor.init_args.base is 0\.5 here and 0\.76 in the checkpoint"),
        ({"num_frequencies": 5}, {}, "predictor.init_args.num_frequencies is 5 here and 4 in the checkpoint"),
        ({"depth": 4}, {}, "predictor.init_args.depth is 4 here and 3 in the checkpoint"),
        ({"hidden": 9}, {}, "predictor.init_args.hidden is 9 here and 8 in the checkpoint"),
        ({"kernel_size": 7}, {}, "predictor.init_args.kernel_size is 7 here and 5 in the checkpoint"),
        ({}, {"order": "none"}, "order is 'none' here and 'in_filter' in the checkpoint"),
        ({}, {"standardize": False}, "standardize is False here and True in the checkpoint"),
        ({}, {"layers": LayerFilter(exclude=["wide"])}, r"layers.wide.weight is absent here and \[4, 8, 1, 3\] in the"),
        (
            {"base": 0.5, "activation": "tanh"},
            {"order": "cross_filter"},
            r"order is .*; predictor.init_args.activation is .*; predictor.init_args.base is .* in the checkpoint\.",
        ),
    ],
)
def test_a_checkpoint_of_another_specification_is_refused_and_changes_nothing(
    predictor: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    form = {"hidden": 8, "depth": 3, "kernel_size": 5, "num_frequencies": 4}
    other = Representation(tiny_original(), MLP(**{**form, **predictor}), **options)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=message):
        other.load_state_dict(tiny_representation().state_dict())
    for key, value in other.state_dict().items():
        assert str(value) == str(before[key])


def test_the_error_of_a_file_names_the_file(tmp_path: Path) -> None:
    state = tiny_representation().state_dict(prefix="representation.")
    torch.save({"state_dict": state}, tmp_path / "fit.ckpt")
    with pytest.raises(
        CheckpointError, match=r"fit\.ckpt: the checkpoint was fitted with another representation: order"
    ):
        load_representation(tmp_path / "fit.ckpt", tiny_representation(order="none"))
    given = tiny_representation()
    assert load_representation(tmp_path / "fit.ckpt", given) == (given, {"init_from": None})


def test_another_class_of_predictor_and_another_order_of_layers_are_differences() -> None:
    state = tiny_representation().state_dict()
    other = Representation(tiny_original(), Oracle(5))
    with pytest.raises(
        CheckpointError, match=r"class_path is 'tests\.representation\.test_representation\.Oracle' here and 'nernlit\."
    ):
        other.load_state_dict(state)
    stored = state["_extra_state"]["specification"]
    stored["layers"] = dict(reversed(stored["layers"].items()))
    with pytest.raises(CheckpointError, match="the layers are numbered in another order"):
        tiny_representation().load_state_dict(state)


def test_a_checkpoint_without_a_specification_is_refused() -> None:
    state = tiny_representation().state_dict()
    whole = state["_extra_state"]
    for extra in ({"original": whole["original"]}, None, "text", {**whole, "scale": 1.0}, {**whole, "original": 1}):
        with pytest.raises(
            CheckpointError, match="does not say how its representation is built: it was written by anot"
        ):
            tiny_representation().load_state_dict({**state, "_extra_state": extra})


def test_a_checkpoints_own_order_is_used() -> None:
    """Equal similarities may be resolved otherwise on another machine."""
    representation, other = tiny_representation(), tiny_representation()
    swapped = representation.addresses.clone()
    swapped[[0, 1]] = swapped[[1, 0]]
    representation.set_constant("addresses", swapped)
    other.load_state_dict(representation.state_dict())
    assert torch.equal(other.addresses, swapped)
    assert torch.equal(other(IMAGES), representation(IMAGES))


@pytest.mark.parametrize("damage", ["twice", "shape", "type", "scale", "nan"])
def test_damaged_orders_and_scales_are_refused(damage: str) -> None:
    state = tiny_representation().state_dict()
    extra = state["_extra_state"]
    packed = extra["order"].clone()
    if damage in ("scale", "nan"):
        extra["scale"] = extra["scale"] * (2 if damage == "scale" else math.nan)
    else:
        extra["order"] = {"twice": torch.zeros_like(packed), "shape": packed[:-1], "type": packed.float()}[damage]
    with pytest.raises(CheckpointError, match=r"the checkpoint is damaged: (its scale is wrong|the packed order is )"):
        tiny_representation().load_state_dict(state)


def test_a_checkpoint_holds_the_order_in_as_few_bits_as_are_counted() -> None:
    representation = tiny_representation()
    counted = (packed_bits(representation.layout, representation.order) + 7) // 8
    assert representation.state_dict()["_extra_state"]["order"].nbytes == counted


class Forgetful(Oracle):
    def __init__(self, kernel_size: int, width: int) -> None:
        super().__init__(kernel_size)


class Open(Oracle):
    def __init__(self, kernel_size: int, **options: int) -> None:
        super().__init__(kernel_size)


class WithModule(Oracle):
    def __init__(self, kernel_size: int, layer: torch.nn.Module) -> None:
        super().__init__(kernel_size)
        self.layer = layer


def test_predictors_that_a_checkpoint_cannot_describe_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match=r"Forgetful does not store .* argument 'width'; set self\.width = width in"):
        Representation(tiny_original(), Forgetful(5, 3))
    with pytest.raises(
        UsageError, match=r"the constructor of Open takes \*\*options: int; a predictor's arguments must"
    ):
        Representation(tiny_original(), Open(5, depth=3))
    with pytest.raises(
        UsageError, match=r"WithModule\.layer is ReLU\(\) of type ReLU; a predictor's arguments must be"
    ):
        Representation(tiny_original(), WithModule(5, torch.nn.ReLU()))


def test_unknown_orders_activations_and_kernel_sizes_are_refused() -> None:
    with pytest.raises(UsageError, match="order='in-filter'; expected one of none, in_filter, cross_filter"):
        tiny_representation(order="in-filter")
    with pytest.raises(UsageError, match="activation='swish'; expected one of relu, gelu, silu, tanh"):
        MLP(4, activation="swish")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="kernel_size=0; expected an integer of at least 1"):
        MLP(4, kernel_size=0)


def test_sizes_are_those_of_the_files() -> None:
    representation = tiny_representation()
    sizes = representation.sizes()
    assert sizes.predictor_params == representation.predictor.num_params
    assert sizes.cr_paper == sizes.predictor_params / representation.layout.num_weights
    save_file(representation.original.net.state_dict(), "original.safetensors")
    assert sizes.original_bytes == Path("original.safetensors").stat().st_size
    for factor in (1.0, 1e-30, 1e9):  # the file is equally large for all values of the weights
        with torch.no_grad():
            for parameter in representation.predictor.parameters():
                parameter.mul_(factor)
        representation.save("net.nern")
        assert sizes.file_bytes == Path("net.nern").stat().st_size
    assert sizes.cr_file == sizes.file_bytes / sizes.original_bytes
    assert representation.sizes() == sizes


def test_a_network_that_is_not_finite_is_not_written() -> None:
    representation = tiny_representation()
    with torch.no_grad():
        next(representation.predictor.parameters()).fill_(math.nan)
    with pytest.raises(UsageError, match=r"the predicted weights of 'stem\.weight' are not finite"):
        representation.save("net.nern")
    assert not Path("net.nern").exists()


def test_a_predictor_too_small_for_a_layer_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"kernel_size=3 is smaller than layer 'stem' \(5x5\); pass --model"):
        Representation(tiny_original(), MLP(4))
    Representation(tiny_original(), MLP(4), layers=LayerFilter(exclude=["stem"]))


@pytest.mark.parametrize("make", [digits_representation, tiny_representation])
def test_weights_in_chunks_have_the_same_gradients(
    make: Callable[[], Representation], monkeypatch: pytest.MonkeyPatch
) -> None:
    representation = make()  # of 3x3 kernels, and of several sizes
    outcomes = []
    for chunk in (10**6, 7):
        monkeypatch.setattr(prediction, "_MAX_UNCHUNKED", chunk)
        monkeypatch.setattr(prediction, "_CHUNK", chunk)
        representation.zero_grad()
        weights = representation.weights()
        torch.stack([value.square().sum() for value in weights.values()]).sum().backward()
        gradients = {
            name: p.grad.clone() for name, p in representation.predictor.named_parameters() if p.grad is not None
        }
        assert len(gradients) == len(list(representation.predictor.parameters()))
        outcomes.append({**weights, **gradients})
    assert outcomes[0].keys() == outcomes[1].keys()
    for key, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][key], value, rtol=1e-3, atol=1e-5)


def test_chunks_keep_no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    representation = digits_representation(32)
    kept = []

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    totals = []
    for chunk in (10**6, 100):
        monkeypatch.setattr(prediction, "_MAX_UNCHUNKED", chunk)
        monkeypatch.setattr(prediction, "_CHUNK", chunk)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            representation.weights()
        totals.append(sum(kept))
    assert totals[1] < totals[0] / 10


def test_a_prediction_of_seconds_shows_how_far_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    representation = tiny_representation()
    forward = representation.predictor.forward
    monkeypatch.setattr("nernlit.coding.prediction._MAX_UNCHUNKED", 1)
    monkeypatch.setattr("nernlit.utilities.progress.progress.__wrapped__.__defaults__", (0.01,))
    monkeypatch.setattr(representation.predictor, "forward", lambda rows: (time.sleep(0.1), forward(rows))[1])
    representation.reconstructed()
    assert capsys.readouterr().err == "predicting 68 kernels ...\n"
    with torch.no_grad():
        representation.train().weights()  # of a training step, whose bar tells enough
        assert capsys.readouterr().err == ""
        representation.eval().weights()
    assert capsys.readouterr().err == "predicting 68 kernels ...\n"


def test_ten_lines_of_python_fit_without_lightning() -> None:
    representation = tiny_representation()
    optimizer = torch.optim.Adam(representation.predictor.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (representation.kernels() - representation.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_a_kernel_size_is_refused_before_kernels_are_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "nernlit.representation.representation.addresses", lambda *_: pytest.fail("kernels were ordered")
    )
    with pytest.raises(LayoutError, match="kernel_size=3 is smaller than layer 'stem'"):
        Representation(tiny_original(), MLP(4, kernel_size=3))


def test_a_predictor_belongs_to_one_representation() -> None:
    predictor = MLP(8, kernel_size=5, num_frequencies=4)
    Representation(tiny_original(), predictor, order="none")
    with pytest.raises(UsageError, match="this MLP is the predictor of another representation; make a new one"):
        Representation(tiny_original(), predictor, order="none")


def test_training_mode_of_the_callers_network_changes_nothing() -> None:
    net = TinyCNN()
    representation = Representation(
        Original.from_module(net, 10, [0.5], [0.5]), MLP(8, kernel_size=5, num_frequencies=4)
    )
    images = torch.rand(4, 1, 8, 8)
    before, statistics = representation(images), net.norm.running_mean.clone()
    net.train()
    assert torch.equal(representation(images), before)
    assert torch.equal(net.norm.running_mean, statistics)


class _Versioned(nn.Module):
    """Stores its square since version 2; older files have the number itself."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)
        self.register_buffer("shift", torch.full((1,), 4.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3)) + self.get_buffer("shift")

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("version", 1) < 2:
            state[f"{prefix}shift"] = state[f"{prefix}shift"] ** 2
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_that_convert_older_weights_get_their_own_version(tmp_path: Path) -> None:
    net = nn.Sequential(_Versioned())
    representation = Representation(Original.from_module(net, 10, [0.0], [1.0]), Table(), order="none")
    images = torch.rand(2, 1, 8, 8)
    assert torch.allclose(representation.module()(images), representation(images))
    representation.save(tmp_path / "net.nern")
    loaded = nernlit.load(tmp_path / "net.nern", net=nn.Sequential(_Versioned()))
    assert torch.allclose(loaded.original(images), representation(images))
    torch.save({"state_dict": {f"module.{key}": value for key, value in net.state_dict().items()}}, tmp_path / "1.pt")
    torch.save({"state_dict": nn.ModuleDict({"module": net}).state_dict()}, tmp_path / "2.pt")
    for name, shift in (("1.pt", 16.0), ("2.pt", 4.0)):  # only the second one has versions
        other = nn.Sequential(_Versioned())
        load_strictly(other, read_state_dict(tmp_path / name, other), name)
        assert float(other.state_dict()["0.shift"]) == shift
