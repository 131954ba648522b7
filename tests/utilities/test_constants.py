import copy
import pickle

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn
from torch.func import functional_call

from nernlit.data import DigitsDataModule
from nernlit.originals import Original
from nernlit.representation import Representation
from nernlit.training import DecoupledDistill, ReconOnly, ReconstructionPhase
from nernlit.utilities.constants import WithConstants
from tests.fakes import digits_representation, quiet_trainer, tiny_representation

IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _constants(representation: Representation) -> dict[str, torch.Tensor]:
    """All that a fit must leave as it was."""
    predictor = representation.predictor
    encoded = {name: getattr(predictor, f"encoded_{name}") for name in ("layer", "filter", "channel")}
    own = {name: getattr(representation, name) for name in ("scale", "addresses", "target")}
    own |= {name: getattr(representation.learned, name) for name in ("masks", "mask_numbers")}
    network = {f"net.{key}": value for key, value in representation.original.net.state_dict().items()}
    return {name: value.clone() for name, value in (encoded | own | network).items()}


def _assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


def test_constants_are_seen_by_nothing_that_walks_over_a_module() -> None:
    representation = tiny_representation()
    own = {"predictor.first.weight", "predictor.first.bias", "predictor.rest.1.weight", "predictor.rest.1.bias"}
    own |= {"predictor.rest.3.weight", "predictor.rest.3.bias"}
    assert {name for name, _ in representation.named_parameters()} == own
    assert not list(representation.buffers())
    assert not [module for module in representation.modules() if isinstance(module, Original)]
    assert set(representation.state_dict()) == {*own, "_extra_state"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversions_of_types_change_the_predictor_only(dtype: torch.dtype) -> None:
    representation = tiny_representation()
    before = _constants(representation)
    representation.to(dtype)
    _assert_equal(_constants(representation), before)
    assert {p.dtype for p in representation.parameters()} == {dtype}
    assert torch.allclose(representation(IMAGES), tiny_representation()(IMAGES), atol=0.02)


def test_training_mode_and_gradients_asked_for_do_not_reach_the_original() -> None:
    representation = tiny_representation().train().requires_grad_(True)
    assert not any(module.training for module in representation.original.modules())
    assert not any(p.requires_grad for p in representation.original.parameters())


def test_constants_follow_to_devices_and_into_shared_memory() -> None:
    moved = nn.Sequential(tiny_representation()).to("meta")[0]
    assert {value.device.type for value in _constants(moved).values()} == {"meta"}
    assert moved.original.mean.device.type == "meta"
    shared = tiny_representation().share_memory()
    assert all(value.is_shared() for value in (shared.target, shared.addresses, shared.original.net.stem.weight))
    assert torch.equal(shared(IMAGES), tiny_representation()(IMAGES))


def test_copies_and_pickles_keep_constants() -> None:
    representation = tiny_representation()
    for twin in (copy.deepcopy(representation), pickle.loads(pickle.dumps(representation))):
        _assert_equal(_constants(twin), _constants(representation))
        assert twin.original is not representation.original
        assert torch.equal(twin(IMAGES), representation(IMAGES))


def test_the_original_can_be_called_with_other_weights_by_torch_itself() -> None:
    representation = tiny_representation()
    entries = {f"net.{key}": value for key, value in representation.weights().items()}
    assert torch.allclose(functional_call(representation.original, entries, (IMAGES,)), representation(IMAGES))


def test_a_compiled_representation_gives_the_same_logits() -> None:
    representation = tiny_representation()
    compiled = torch.compile(representation, backend="eager")
    assert torch.allclose(compiled(IMAGES), representation(IMAGES), atol=1e-6)


def test_a_constant_can_be_replaced_and_names_stay_in_order() -> None:
    module = WithConstants()
    module.set_constant("one", torch.ones(2))
    module.set_constant("one", torch.zeros(3))
    assert torch.equal(module.double().one, torch.zeros(3))  # type: ignore[arg-type]


class Meddler(L.Callback):
    """Alters everything that a module shows."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        with torch.no_grad():
            for parameter in pl_module.parameters():
                parameter.mul_(1.001)
            for buffer in pl_module.buffers():
                buffer.zero_()
        for module in pl_module.modules():
            module.train()
            module.requires_grad_(True)


AVERAGING = [
    WeightAveraging(use_buffers=True),
    WeightAveraging(use_buffers=False),
    EMAWeightAveraging(decay=0.9, use_buffers=True),
    Meddler(),
]


@pytest.mark.parametrize("callback", AVERAGING, ids=lambda callback: type(callback).__name__)
@pytest.mark.parametrize("scheme", ["recon_only", "distill"])
def test_callbacks_that_alter_all_parameters_leave_constants_alone_to_the_bit(
    callback: L.Callback, scheme: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def adam(params: object) -> torch.optim.Optimizer:
        return torch.optim.Adam(params, lr=1e-3)  # type: ignore[arg-type]

    representation = digits_representation()
    before, fingerprint = _constants(representation), representation.original.fingerprint()
    teacher = Original("digits_resnet8", pretrained=True)
    module: ReconOnly | DecoupledDistill = (
        ReconOnly(representation, adam)
        if scheme == "recon_only"
        else DecoupledDistill(representation, optimizer=adam, teacher=teacher, reconstruction=ReconstructionPhase(3))
    )
    data = DigitsDataModule(**({"train_on": "none", "steps_per_epoch": 4} if scheme == "recon_only" else {}))  # type: ignore[arg-type]
    trainer = quiet_trainer(max_epochs=3, limit_train_batches=4, callbacks=[copy.deepcopy(callback)])
    trainer.fit(module, datamodule=data)
    _assert_equal(_constants(representation), before)
    assert representation.original.fingerprint() == teacher.fingerprint() == fingerprint
    results = quiet_trainer().test(module, datamodule=data, verbose=False)[0]
    assert results["test/acc_original"] > 0.9

    file = tmp_path_factory.mktemp("saved") / "whole.ckpt"
    trainer.save_checkpoint(file)
    twin = digits_representation()
    state = torch.load(file, weights_only=True)["state_dict"]
    twin.load_state_dict({k.removeprefix("representation."): v for k, v in state.items() if k.startswith("repr")})
    _assert_equal(_constants(twin), before)
