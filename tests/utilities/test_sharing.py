import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nernlit.coding import part_bytes
from nernlit.errors import LayoutError
from nernlit.kernels import LayerFilter, Layout
from nernlit.originals import Folded, Original
from nernlit.predictors import MLP
from nernlit.representation import Representation
from nernlit.storage.container import read_container
from nernlit.utilities.sharing import names_of_weights, overlap, places_of_weights
from tests.fakes import STATISTICS, SharingCNN

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
NAMES = ("a.weight", "again.weight", "chain.1.weight", "tied.weight")


def _representation(net: nn.Module | None = None, **options: object) -> Representation:
    torch.manual_seed(0)
    original = Original.from_module(net or SharingCNN(), 10, **STATISTICS)
    return Representation(original, MLP(8, num_frequencies=4), **options)  # type: ignore[arg-type]


def test_a_weight_knows_all_of_its_names_and_a_module_is_one_place() -> None:
    net = SharingCNN()
    assert names_of_weights(net)["chain.1.weight"] == NAMES
    assert places_of_weights(net)["chain.1.weight"] == ("a.weight", "tied.weight")
    assert names_of_weights(net)["tied.bias"] == ("tied.bias",)


def test_a_parameter_of_the_same_memory_is_the_same_weight() -> None:
    net = nn.Sequential(nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3))
    net[1].weight = nn.Parameter(net[0].weight.detach())
    assert names_of_weights(net)["1.weight"] == ("0.weight", "1.weight")
    assert [layer.aliases for layer in Layout.from_module(net).layers] == [("1.weight",)]


def test_weights_are_one_layer_with_aliases_and_count_once() -> None:
    representation = _representation()
    assert [(layer.key, layer.aliases) for layer in representation.layout.layers] == [
        ("a.weight", NAMES[1:]),
        ("own.weight", ()),
    ]
    assert list(representation.weights()) == ["a.weight", "own.weight"]
    sizes = representation.sizes()
    assert sizes.predicted_weights == 3 * 3 * 9 + 3 * 4
    kept = 3 + 3 + 4 + (4 * 10 + 10)  # the biases of a, tied and own, and the head
    assert _kept_bytes(representation) == 4 * kept
    representation.save("net.nern")
    state, names = representation.original.net.state_dict(), names_of_weights(representation.original.net)
    save_file({key: value for key, value in state.items() if names[key][0] == key}, "net.safetensors")
    assert sizes.cr_file == Path("net.nern").stat().st_size / Path("net.safetensors").stat().st_size


def test_every_name_gets_the_prediction_and_the_original_never_changes() -> None:
    representation = _representation()
    before = representation.original.fingerprint()
    plain = representation.original(IMAGES)
    state = representation.reconstructed()
    for name in NAMES:
        assert torch.equal(state[name], representation.weights()["a.weight"])
    twin = copy.deepcopy(representation.original)
    twin.net.load_state_dict(state)
    assert torch.allclose(representation(IMAGES), twin(IMAGES), atol=1e-6)
    assert not torch.allclose(representation(IMAGES), plain)
    assert representation.original.fingerprint() == before
    assert torch.equal(representation.original(IMAGES), plain)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_original_survives_every_way_to_run_it(mode: Callable[[], torch.no_grad]) -> None:
    representation = _representation()
    before = representation.original.fingerprint()
    with mode():
        representation(IMAGES)
    assert representation.original.fingerprint() == before


def test_the_original_survives_an_exception_in_its_forward() -> None:
    class Failing(SharingCNN):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise ArithmeticError

    representation = _representation(Failing())
    before = representation.original.fingerprint()
    with pytest.raises(ArithmeticError):
        representation(IMAGES)
    assert representation.original.fingerprint() == before


def test_gradients_come_from_all_places() -> None:
    representation = _representation()
    weights = {key: value.detach().requires_grad_() for key, value in representation.weights().items()}
    representation(IMAGES, weights).square().sum().backward()
    twin = copy.deepcopy(representation.original)
    twin.net.load_state_dict(representation.reconstructed())
    twin.requires_grad_(True)
    twin(IMAGES).square().sum().backward()
    for key, value in weights.items():
        assert value.grad is not None
        own = twin.net.get_parameter(key).grad
        assert own is not None
        assert torch.allclose(value.grad, own, rtol=1e-4, atol=1e-6)


def test_tied_convolutions_are_not_folded() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Conv2d(3, 3, 3, bias=False), nn.Conv2d(3, 3, 3, bias=False)
            self.two.weight = self.one.weight
            self.norm_one, self.norm_two = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
            for scale, norm in enumerate((self.norm_one, self.norm_two), 1):
                nn.init.constant_(norm.weight, scale)
            self.head = nn.Linear(3, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.norm_two(self.two(self.norm_one(self.one(x)))).mean((2, 3)))

    representation = _representation(Normed())
    weights = representation.weights()
    folded = Folded(representation.original, IMAGES)
    assert torch.allclose(folded(IMAGES), representation.original(IMAGES), atol=1e-5)
    assert torch.allclose(folded(IMAGES, weights), representation(IMAGES, weights), atol=1e-5)


def test_patterns_match_by_any_name_and_leave_out_by_any_name() -> None:
    assert [layer.key for layer in Layout.from_module(SharingCNN(), LayerFilter(include=["again"])).layers] == [
        "a.weight"
    ]
    assert [layer.key for layer in Layout.from_module(SharingCNN(), LayerFilter(exclude=["tied"])).layers] == [
        "own.weight"
    ]


@pytest.mark.parametrize(
    "view", [lambda weight: weight.transpose(0, 1), lambda weight: weight[:2], lambda weight: weight.view(3, 27)]
)
def test_another_view_of_a_predicted_weight_is_refused_by_name(view: Callable[[Tensor], Tensor]) -> None:
    net = nn.Module()
    net.a = nn.Conv2d(3, 3, 3)
    net.b = nn.Module()
    net.b.weight = nn.Parameter(view(net.a.weight.detach()))
    with pytest.raises(LayoutError, match=r"'a\.weight' shares memory with 'b\.weight', which is another view of it"):
        Layout.from_module(net)


@pytest.mark.parametrize(
    "hold",
    [
        lambda net: setattr(net, "held", [net.a.weight]),
        lambda net: setattr(net, "held", {"w": net.a.weight}),
        lambda net: setattr(net, "held", net.a.weight.detach()),
        lambda net: net.register_buffer("held", net.a.weight.detach()[:1], persistent=False),
    ],
)
def test_a_predicted_weight_that_is_held_outside_the_parameters_is_refused_by_name(
    hold: Callable[[nn.Module], None],
) -> None:
    net = nn.Module()
    net.a = nn.Conv2d(3, 3, 3)
    hold(net)
    with pytest.raises(LayoutError, match=r"'held' refers to the weight 'a\.weight' without being a parameter"):
        Layout.from_module(net)
    net.held = None
    assert Layout.from_module(net).num_kernels == 9


def test_kept_tensors_that_share_memory_count_once() -> None:
    memory = torch.zeros(10)
    assert overlap(memory[:4], memory[2:6])
    assert not overlap(memory[:4], memory[4:])

    net = SharingCNN()
    net.second_head = nn.Linear(4, 10)  # type: ignore[assignment]
    net.second_head.weight = net.head.weight
    kept = [_kept_bytes(_representation(each)) for each in (SharingCNN(), net)]
    assert kept[1] - kept[0] == 4 * 10  # the new head's bias


def _kept_bytes(representation: Representation) -> int:
    """Bytes of the tensors in the .nern file that are not predicted."""
    representation.save("kept.nern")
    return part_bytes(read_container(Path("kept.nern")))["kept"]
