"""Both kinds of training steps on networks of many families, with all weights predicted."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.inception_v3 import InceptionC
from timm.models.mlp_mixer import MlpMixer
from timm.models.vgg import VGG
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.data import DataLoader

import nernlit
from nernlit.originals import Original
from nernlit.predictors import MLP, Codebooks, Predictor, Table
from nernlit.representation import Representation
from nernlit.training import BaselineJoint, DecoupledDistill, Progressive, ReconOnly, ReconstructionPhase
from nernlit.training.scheme import Scheme
from tests.fakes import STATISTICS, quiet_trainer

#: Family -> a small network of it, the side of its images, and the side of its largest kernels.
SMALL: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "vit": (lambda: VisionTransformer(16, 4, depth=1, embed_dim=48, num_heads=3, num_classes=10), 16, 4),
    "mixer": (lambda: MlpMixer(10, img_size=16, patch_size=4, num_blocks=1, embed_dim=30), 16, 4),
    "convnext": (lambda: ConvNeXt(num_classes=10, depths=(1, 1, 1, 1), dims=(8, 12, 16, 20)), 32, 7),
    "mobilenetv2": (lambda: timm.create_model("mobilenetv2_035", num_classes=10), 32, 3),
    "mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=10), 32, 5),
    "efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=10), 32, 3),
    "regnet": (lambda: timm.create_model("regnetx_002", num_classes=10), 32, 3),
    "densenet": (lambda: DenseNet(growth_rate=8, block_config=(1, 1), num_classes=10), 32, 7),
    "vgg": (lambda: VGG([8, "M", 12, "M"], mlp_ratio=0.01, num_classes=10), 32, 7),
    "inception": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), InceptionC(8, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(768, 10)
        ),
        16,
        7,
    ),
}


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def _representation(net: nn.Module, kernel_size: int) -> Representation:
    predictor = MLP(8, depth=2, kernel_size=kernel_size, num_frequencies=4)
    original = Original.from_module(net, 10, **STATISTICS, in_chans=3)
    return Representation(original, predictor, layers="all", order="none", pointwise="tile")


def _require_a_step_of_each_scheme(net: nn.Module, image_size: int, kernel_size: int) -> None:
    """One step of Recon-only, and one of reconstruction and one of distillation of Decoupled, change the predictor."""
    representation = _representation(net, kernel_size)
    assert representation.layout.num_weights > 0.9 * sum(p.numel() for p in net.parameters() if p.dim() > 1)
    batch = (torch.rand(4, 3, image_size, image_size), torch.randint(0, 10, (4,)))
    data = DataLoader([batch, batch], batch_size=None)  # type: ignore[arg-type]
    for module, steps in (
        (ReconOnly(representation, _adam), 1),
        (DecoupledDistill(representation, optimizer=_adam, reconstruction=ReconstructionPhase(steps=1)), 2),
    ):
        before = [parameter.detach().clone() for parameter in representation.predictor.parameters()]
        trainer = quiet_trainer(max_steps=steps)
        trainer.fit(module, data)
        assert trainer.global_step == steps
        assert all(bool(value.isfinite()) for value in trainer.callback_metrics.values())
        for parameter, old in zip(representation.predictor.parameters(), before, strict=True):
            assert not torch.equal(parameter, old)


@pytest.mark.parametrize("family", SMALL)
def test_all_weights_of_a_small_network_of_every_family_are_trained(family: str) -> None:
    torch.manual_seed(0)
    build, image_size, kernel_size = SMALL[family]
    _require_a_step_of_each_scheme(build(), image_size, kernel_size)


@pytest.mark.parametrize("predictor", [MLP(8, depth=2, kernel_size=5), Table(5), Codebooks(2, 3, kernel_size=5)])
@pytest.mark.parametrize("scheme", [ReconOnly, BaselineJoint, DecoupledDistill, Progressive])
def test_every_scheme_trains_every_predictor_on_padded_tiles(scheme: type[Scheme], predictor: Predictor) -> None:
    torch.manual_seed(0)
    predictor = copy.deepcopy(predictor)
    original = Original.from_module(SMALL["vit"][0](), 10, **STATISTICS, in_chans=3)
    representation = Representation(original, predictor, layers="all", order="none")
    assert representation.layout.num_weights < representation.layout.num_kernels * 25
    before = [parameter.detach().clone() for parameter in predictor.parameters()]
    batch = (torch.rand(4, 3, 16, 16), torch.randint(0, 10, (4,)))
    data = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    options: dict[type[Scheme], dict[str, object]] = {
        BaselineJoint: {"feature_weight": 0.0},
        DecoupledDistill: {"reconstruction": ReconstructionPhase(steps=1)},
        Progressive: {"rounds": 1},
    }
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(scheme(representation, optimizer=_adam, **options.get(scheme, {})), data, data)
    rmse, scale = float(trainer.callback_metrics["val/recon_rmse"]), float(representation.scale)
    assert rmse < 2 * scale
    changed = any(
        not torch.equal(parameter, old) for parameter, old in zip(predictor.parameters(), before, strict=True)
    )
    is_exact = scheme is ReconOnly and isinstance(predictor, Table)  # it starts without an error, so nothing changes
    assert changed != is_exact
    assert (rmse < 1e-6 * scale) == is_exact


@pytest.mark.parametrize(
    "predictor", [MLP(8, depth=2, kernel_size=(1, 9)), Table((1, 9)), Codebooks(1, 3, kernel_size=(1, 9))]
)
@pytest.mark.parametrize("scheme", [ReconOnly, BaselineJoint, DecoupledDistill, Progressive])
def test_every_scheme_trains_every_predictor_on_kernels_that_are_not_square(
    scheme: type[Scheme], predictor: Predictor
) -> None:
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 4, (1, 9)), nn.ReLU(), nn.Conv2d(4, 5, (1, 5))]
    net = nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 10))
    original = Original.from_module(net, 10, **STATISTICS, in_chans=3)
    representation = Representation(original, copy.deepcopy(predictor), layers="all", order="none")
    assert representation.target.shape == (12 + 20 + 10, 1, 9)
    batch = (torch.rand(4, 3, 16, 16), torch.randint(0, 10, (4,)))
    data = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    options: dict[type[Scheme], dict[str, object]] = {
        BaselineJoint: {"feature_weight": 0.0},
        DecoupledDistill: {"reconstruction": ReconstructionPhase(steps=1)},
        Progressive: {"rounds": 1, "trials": 2},
    }
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(scheme(representation, optimizer=_adam, **options.get(scheme, {})), data, data)
    rmse, scale = float(trainer.callback_metrics["val/recon_rmse"]), float(representation.scale)
    is_exact = scheme is ReconOnly and isinstance(predictor, Table)  # it starts without an error, so nothing changes
    assert (rmse < 1e-6 * scale) == is_exact
    assert rmse < 2 * scale


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("cait_xxs24_224", 224),
        ("coat_lite_tiny", 224),
        ("convmixer_768_32", 64),
        ("convnextv2_atto", 64),
        ("deit_tiny_patch16_224", 224),
        ("densenet121", 64),
        ("efficientformer_l1", 224),
        ("efficientnet_b0", 64),
        ("ghostnet_100", 64),
        ("hrnet_w18_small", 64),
        ("inception_v3", 96),
        ("levit_128s", 224),
        ("mixer_s32_224", 224),
        ("mobilenetv2_100", 64),
        ("mobilenetv3_small_100", 64),
        ("mobilevit_xs", 256),
        ("poolformer_s12", 224),
        ("regnetx_002", 64),
        ("resmlp_12_224", 224),
        ("swin_tiny_patch4_window7_224", 224),
        ("vit_tiny_patch16_224", 224),
    ],
)
def test_all_weights_of_a_published_network_are_trained(name: str, image_size: int) -> None:
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=10)
    sides = [max(p.shape[2:]) for p in net.parameters() if p.dim() == 4]
    _require_a_step_of_each_scheme(net, image_size, max(sides, default=4))


@pytest.mark.parametrize("order", ["none", "in_filter", "cross_filter"])
def test_a_vision_transformer_is_saved_and_loaded_to_the_bit(tmp_path: Path, order: str) -> None:
    torch.manual_seed(0)
    original = Original("test_vit", num_classes=10)
    predictor = MLP(8, depth=2, kernel_size=16, num_frequencies=4)
    representation = Representation(original, predictor, layers="all", order=order)  # type: ignore[arg-type]
    representation.save(tmp_path / "vit.nern")
    loaded = nernlit.load(tmp_path / "vit.nern")
    stored = representation.reconstructed()
    assert loaded.layout.layers == representation.layout.layers
    assert torch.equal(loaded.addresses, representation.addresses)
    assert loaded.reconstructed().keys() == stored.keys()
    assert all(torch.equal(value, stored[key]) for key, value in loaded.reconstructed().items())
    assert representation.sizes().file_bytes == (tmp_path / "vit.nern").stat().st_size
    state = original.net.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in representation.original_weights().items())
