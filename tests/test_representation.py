import copy
from collections.abc import Callable

import pytest
import torch

from nernlit import representation as representation_file
from nernlit.errors import CheckpointError, LayoutError
from nernlit.kernels import LayerFilter
from nernlit.predictors import MLP, Predictor
from nernlit.representation import Representation
from tests.fakes import digits_representation, tiny_original, tiny_representation

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Oracle(Predictor):
    """Knows every kernel by its address: a predictor without error."""

    def bind(self, extent: tuple[int, int, int]) -> None:
        self.extent = extent

    def learn(self, representation: Representation) -> None:
        places = representation.addresses.long()
        self.table = torch.zeros(*self.extent, self.kernel_size, self.kernel_size)
        self.table[places[:, 0], places[:, 1], places[:, 2]] = representation.target / representation.scale

    def forward(self, addresses_N3: torch.Tensor) -> torch.Tensor:
        return self.table[tuple(addresses_N3.long().T)]


@pytest.mark.parametrize("order", ["none", "in_filter", "cross_filter"])
@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("kernel_size", [5, 7])
def test_a_perfect_predictor_gives_the_original_back(order: str, standardise: bool, kernel_size: int) -> None:
    oracle = Oracle(kernel_size)
    original = tiny_original()
    representation = Representation(original, oracle, order=order, standardise=standardise)  # type: ignore[arg-type]
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
    mask = representation.mask(rows)
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


def test_sizes_count_everything_that_must_be_stored() -> None:
    representation = tiny_representation()
    sizes = representation.sizes()
    assert sizes.predictor_params == representation.predictor.num_params
    assert sizes.cr_paper == sizes.predictor_params / representation.layout.num_weights
    everything = sum(v.numel() for v in representation.original.net.state_dict().values())
    assert sizes.kept_bytes == 4 * (everything - representation.layout.num_weights)
    assert sizes.cr_stored > sizes.cr_paper * representation.layout.num_weights / everything


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
        monkeypatch.setattr(representation_file, "_WHOLE", chunk)
        monkeypatch.setattr(representation_file, "_CHUNK", chunk)
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
        monkeypatch.setattr(representation_file, "_WHOLE", chunk)
        monkeypatch.setattr(representation_file, "_CHUNK", chunk)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            representation.weights()
        totals.append(sum(kept))
    assert totals[1] < totals[0] / 10


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
