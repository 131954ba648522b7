import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nernlit
from nernlit.coding import part_bytes
from nernlit.data import DigitsDataModule
from nernlit.errors import CheckpointError, FileFormatError, LayoutError
from nernlit.kernels import Uniform
from nernlit.losses import reconstruction_mse
from nernlit.originals import Original
from nernlit.predictors import MLP, Codebooks, Quantize, Table
from nernlit.representation import Representation
from nernlit.representation.integers import integer_weights
from nernlit.storage.container import Contents, read_container, write_container
from nernlit.storage.entropy import encode_weights
from nernlit.training import DecoupledDistill, Progressive, ReconOnly, ReconstructionPhase
from nernlit.training.objectives import Reconstruction, Step, full_reconstruction_error
from nernlit.training.sensitivity import normalized
from tests.fakes import STATISTICS, TinyCNN, quiet_trainer

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _pruned(share: float = 0.6) -> Original:
    """An original some of whose convolution weights are 0, of the first layer a whole filter and a whole kernel."""
    torch.manual_seed(0)
    net = TinyCNN()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            weight = module.weight.detach()
            weight[torch.rand(weight.shape) < share] = 0
    net.stem.weight.detach()[0] = 0
    net.wide.weight.detach()[0, 0] = 0
    return Original.from_module(net, 10, **STATISTICS)


def _represented(predictor: Any = None, original: Original | None = None, **options: Any) -> Representation:
    torch.manual_seed(1)
    predictor = predictor or MLP(8, depth=3, kernel_size=5, num_frequencies=4)
    return Representation(original or _pruned(), predictor, **{"keep_zeros": True, **options})


def _where_zero(representation: Representation) -> dict[str, Tensor]:
    return {key: value == 0 for key, value in representation.original_weights().items()}


PREDICTORS = [MLP(8, depth=3, kernel_size=5, num_frequencies=4), Table(5), Codebooks(2, 4, kernel_size=5)]


@pytest.mark.parametrize("predictor", PREDICTORS, ids=lambda predictor: type(predictor).__name__)
@pytest.mark.parametrize("order", ["none", "cross_filter"])
def test_zeros_stay_zero_and_nothing_else_changes(predictor: Any, order: Any) -> None:
    kept = _represented(copy.deepcopy(predictor), order=order)
    plain = _represented(copy.deepcopy(predictor), order=order, keep_zeros=False)
    plain.predictor.load_state_dict(kept.predictor.state_dict())
    plain.set_constant("scale", kept.scale)
    zeros, expected = _where_zero(kept), plain.weights()
    for weights in (kept.weights(), kept.reconstructed(), kept.layout.weights(kept.kernels())):
        for key, is_zero in zeros.items():
            assert bool((weights[key][is_zero] == 0).all())
            assert torch.equal(weights[key][~is_zero], expected[key][~is_zero])
    if isinstance(predictor, MLP):
        assert any(bool((expected[key][is_zero] != 0).any()) for key, is_zero in zeros.items())
    rows = torch.tensor([3, 0, 7])
    assert torch.equal(kept.kernels(rows) == 0, kept.kernels()[rows] == 0)
    assert torch.allclose(kept.kernels(rows), kept.kernels()[rows])


def test_weights_in_units_of_those_that_are_learned() -> None:
    representation = _represented()
    values = torch.cat([value[value != 0] for value in representation.original_weights().values()]).double()
    assert representation.learned.count == len(values) == int(representation.learned.per_kernel().sum())
    assert representation.scale.item() == pytest.approx(values.square().mean().sqrt().item())


def test_the_error_is_that_of_weights_which_are_not_zero() -> None:
    representation = _represented()
    errors = [
        (value - representation.original_weights()[key])[representation.original_weights()[key] != 0]
        for key, value in representation.weights().items()
    ]
    expected = torch.cat(errors).square().mean() / representation.scale**2
    rows = torch.arange(representation.layout.num_kernels)
    predicted, target = (
        representation.kernels(rows) / representation.scale,
        representation.target / representation.scale,
    )
    assert reconstruction_mse(predicted, target, representation.learned.mask(rows)).item() == pytest.approx(
        expected.item()
    )


def test_a_predictor_that_is_fitted_ignores_zeros() -> None:
    # Two codewords are enough for kernels of two kinds, whatever the predictor would need for their zeros.
    net = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False))
    kinds_2KK = torch.randn(2, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = kinds_2KK[torch.arange(32) % 2].view(8, 4, 3, 3)
    pruned = torch.where(torch.rand(8, 4, 3, 3, generator=torch.Generator().manual_seed(1)) < 0.3, 0, weight)
    net[0].weight.detach().copy_(pruned)
    found = {
        keep_zeros: Representation(
            Original.from_module(copy.deepcopy(net)), Codebooks(1, 2), order="none", keep_zeros=keep_zeros
        )
        for keep_zeros in (True, False)
    }
    errors = {keep: float((each.weights()["0.weight"] - pruned).abs().max()) for keep, each in found.items()}
    assert errors[True] < 1e-5 < 0.1 < errors[False]


def test_sensitivities_have_mean_one_over_learned_weights() -> None:
    representation = _represented()
    ones = {key: torch.ones_like(value) for key, value in representation.original_weights().items()}
    weights = normalized(representation, ones, 0.5, None)
    assert torch.equal(weights != 0, representation.learned.nonzero)  # type: ignore[arg-type]
    assert weights.sum().item() == pytest.approx(representation.learned.count)


def test_a_file_holds_the_positions(tmp_path: Path) -> None:
    path = tmp_path / "net.nern"
    representation = _represented()
    representation.save(path)
    loaded = nernlit.load(path, net=TinyCNN())
    assert loaded.specification() == representation.specification()
    assert torch.equal(loaded.learned.nonzero, representation.learned.nonzero)  # type: ignore[arg-type]
    expected = representation.reconstructed()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.reconstructed().items())
    assert torch.equal(loaded(IMAGES), representation(IMAGES))
    parts = part_bytes(read_container(path))
    assert 0 < parts["zeros"] <= representation.layout.num_weights / 8 + 8
    assert representation.sizes().file_bytes == path.stat().st_size


def test_zeros_of_whole_filters_take_few_bytes(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(16, 64, 3, bias=False))
    net[0].weight.detach()[torch.arange(64) % 4 > 0] = 0
    representation = Representation(Original.from_module(net), MLP(8), keep_zeros=True)
    representation.save(tmp_path / "net.nern")
    assert part_bytes(read_container(tmp_path / "net.nern"))["zeros"] < 0.15 * representation.layout.num_weights / 8


def test_checkpoints_and_files_continue(tmp_path: Path) -> None:
    representation = _represented()
    representation.save(tmp_path / "net.nern")
    again = _represented()
    again.load_state_dict(representation.state_dict())
    assert torch.equal(again.kernels(), representation.kernels())
    with pytest.raises(CheckpointError, match="keep_zeros"):
        _represented(keep_zeros=False).load_state_dict(representation.state_dict())
    with pytest.raises(CheckpointError, match="keep_zeros"):
        representation.load_state_dict(_represented(keep_zeros=False).state_dict())


def test_schemes_train_it() -> None:
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 1e-3)

    sampling = Uniform(16)
    decoupled = DecoupledDistill(
        _represented(), optimizer=sgd, precision="fp32", reconstruction=ReconstructionPhase(steps=2, sampling=sampling)
    )
    progressive = Progressive(
        _represented(), optimizer=sgd, rounds=2, trials=2, sampling=sampling, precision="fp32", min_delta=None
    )
    for module in (
        ReconOnly(_represented(), sgd, sampling=sampling, precision="fp32"),
        decoupled,
        progressive,
    ):
        images = module is decoupled
        data = DigitsDataModule(train_on="images" if images else "none", **({} if images else {"steps_per_epoch": 4}))
        trainer = quiet_trainer(max_epochs=2, limit_train_batches=4, limit_val_batches=1)
        trainer.fit(module, datamodule=data)
        for key, is_zero in _where_zero(module.representation).items():
            assert bool((module.representation.weights()[key][is_zero] == 0).all())


def test_integers_of_zeros_are_zero() -> None:
    representation = _represented(Table(5, scale="layer"), order="none", quantize=Quantize(bits=1.5))
    for key, weight in integer_weights(representation).items():
        assert bool((weight.integers[_where_zero(representation)[key]] == 0).all())
        assert bool((weight.integers != 0).any())


def test_a_network_without_zeros_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(LayoutError, match="no predicted weight is 0; leave it out"):
        _represented(original=Original.from_module(TinyCNN(), 10, **STATISTICS))


def test_damaged_positions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.nern"
    representation = _represented()
    representation.save(path)
    good = read_container(path)
    specification = good.header["specification"]
    shapes = [(s[0], s[1], s[2], s[3]) for s in specification["layers"].values()]
    integers = torch.zeros(representation.layout.num_weights, dtype=torch.int8)
    integers[5] = 2
    without = {name: value for name, value in good.tensors.items() if name != "zeros"}
    plain = {name: value for name, value in specification.items() if name != "keep_zeros"}
    for header, tensors, expected in (
        (good.header, without, "disagree about keep_zeros"),
        ({**good.header, "specification": plain}, good.tensors, "disagree about keep_zeros"),
        (good.header, {**good.tensors, "zeros": encode_weights(integers, shapes)}, "not all 0 or 1"),
        (good.header, {**good.tensors, "zeros": good.tensors["zeros"][:-3]}, "damaged|another network"),
    ):
        write_container(path, Contents(dict(header), tensors))
        with pytest.raises(FileFormatError, match=expected):
            nernlit.load(path, net=TinyCNN())


@pytest.mark.parametrize("loss", ["mse", "rmse"])
def test_the_error_of_all_weights_is_the_mean_over_those_that_are_learned(loss: Any) -> None:
    representation = Representation(_pruned(), MLP(8, kernel_size=5), order="none", keep_zeros=True)
    weights, target = representation.weights(), representation.original_weights()
    errors = torch.cat([(weights[key] - value)[value != 0].flatten() for key, value in target.items()])
    mse = (errors / representation.scale).square().mean()
    assert torch.allclose(
        full_reconstruction_error(representation, weights, loss), mse if loss == "mse" else mse.sqrt()
    )


def test_a_step_on_kernels_of_zeros_has_no_explained_power() -> None:
    original = _pruned(0.9)
    representation = Representation(original, MLP(8, kernel_size=5), order="none", keep_zeros=True)
    zeros = representation.target.flatten(1).norm(dim=1) == 0
    assert zeros.any()

    class Zeros:
        def shares(self, norms_N: Tensor, *_: int) -> tuple[Tensor, ...]:
            return ((norms_N == 0).nonzero().squeeze(1),)

    norms_N = representation.target.flatten(1).norm(dim=1)
    sizes_N = representation.learned.per_kernel()
    step = Step(representation, None, representation.target, norms_N, sizes_N)
    terms = Reconstruction(Zeros())(step)  # type: ignore[arg-type]
    assert float(terms["recon"]) == 0
    assert "explained_power" not in step.metrics
