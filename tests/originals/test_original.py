import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from nernlit.errors import CheckpointError, UsageError
from nernlit.originals import Original, read_state_dict
from tests.fakes import STATISTICS, TinyCNN, tiny_original

STATE = {"conv.weight": torch.ones(2, 1, 3, 3), "linear.bias": torch.zeros(4)}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".ckpt"])
@pytest.mark.parametrize("nest", [None, "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_weights_are_found_in_every_wrapping(tmp_path: Path, suffix: str, nest: str | None, prefix: str) -> None:
    wrapped: dict[str, Any] = {prefix + key: value for key, value in STATE.items()}
    path = tmp_path / f"weights{suffix}"
    torch.save({nest: wrapped, "epoch": 3} if nest else wrapped, path)
    loaded = read_state_dict(path)
    assert {key: value.tolist() for key, value in loaded.items()} == {k: v.tolist() for k, v in STATE.items()}


def test_safetensors_are_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "w.safetensors")
    assert list(read_state_dict(tmp_path / "w.safetensors")) == list(STATE)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("executed"),)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": STATE, "extra": Payload()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="Only tensors are loaded, never code"):
        read_state_dict(tmp_path / "evil.pt")
    assert not Path("executed").exists()


def test_files_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no file at .*nowhere\.pt; expected a CNN's weights"):
        read_state_dict(tmp_path / "nowhere.pt")
    for name in ("garbage.pt", "garbage.safetensors"):
        (tmp_path / name).write_bytes(b"garbage garbage garbage")
        with pytest.raises(CheckpointError, match=f"cannot read weights from .*{name}"):
            read_state_dict(tmp_path / name)
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(CheckpointError, match="holds no named tensors"):
        read_state_dict(tmp_path / "empty.pt")


def test_a_mismatch_lists_missing_unexpected_and_wrongly_shaped_keys(tmp_path: Path) -> None:
    state = Original("cifar_resnet20").net.state_dict()
    state["linear.weight"] = torch.zeros(5, 64)
    state["stray"] = torch.zeros(1)
    for key in [key for key in state if key.startswith("layer3.")]:
        del state[key]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError) as caught:
        Original("cifar_resnet20", checkpoint=str(tmp_path / "w.safetensors"))
    message = str(caught.value)
    assert "30 missing (layer3.0.conv1.weight, layer3.0.bn1.weight, layer3.0.bn1.bias and 27 more)" in message
    assert "1 unexpected (stray)" in message
    assert "1 wrongly shaped (linear.weight (5, 64) instead of (10, 64))" in message


def test_an_original_normalizes_pixels_itself() -> None:
    original = tiny_original().eval()
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(original(images), original.net((images - 0.5) / 0.5))


def test_statistics_default_to_what_timm_says_and_must_fit_the_channels() -> None:
    assert Original("cifar_resnet20").mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    with pytest.raises(
        UsageError, match="mean has 2 numbers, but 'cifar_resnet20' takes images of 3 channels; pass 1 or 3,"
    ):
        Original("cifar_resnet20", mean=[0.5, 0.5])


def test_unknown_names_and_untrained_networks_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no model named .cifar_resnet21.; did you mean .*cifar_resnet20"):
        Original("cifar_resnet21")
    with pytest.raises(UsageError, match=r"has random weights; pass --model\.representation\.original\.checkpoint"):
        Original("cifar_resnet20").require_weights()
    with pytest.raises(UsageError, match="both checkpoint='x' and pretrained=true"):
        Original("cifar_resnet20", checkpoint="x", pretrained=True)


def test_the_fingerprint_changes_with_a_single_bit() -> None:
    one, two = tiny_original(), tiny_original()
    assert one.fingerprint() == two.fingerprint()
    with torch.no_grad():
        two.net.get_parameter("head.bias")[0] += 1e-6
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize("options", [{"num_classes": 1}, {"num_classes": 0}, {"num_classes": -3}, {"in_chans": 0}])
def test_counts_that_no_classifier_has_are_refused(options: dict[str, int]) -> None:
    (name, count), least = next(iter(options.items())), 1 if "in_chans" in options else 2
    with pytest.raises(
        UsageError, match=rf"{name}={count} for 'cifar_resnet20'; expected an integer of at least {least}"
    ):
        Original("cifar_resnet20", **options)
    with pytest.raises(UsageError, match=rf"{name}={count} for 'TinyCNN'; expected an integer of at least {least}"):
        Original.from_module(TinyCNN(), **{"num_classes": 10, **options}, **STATISTICS)  # type: ignore[arg-type]


def test_a_pretrained_network_with_a_new_classifier_is_not_trained() -> None:
    assert Original("digits_resnet8", pretrained=True, num_classes=10).weights_from == "timm's pretrained weights"
    with pytest.raises(UsageError, match=r"has random weights; pass .*with this number of classes"):
        Original("digits_resnet8", pretrained=True, num_classes=7).require_weights()


def test_options_that_timm_does_not_take_are_told_in_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"timm cannot create 'inception_v3' with \{'in_chans': 70000000000\}: "):
        Original("inception_v3", in_chans=70_000_000_000)
    with pytest.raises(CheckpointError, match="the pretrained weights of 'cifar_resnet20' could not be loaded"):
        Original("cifar_resnet20", pretrained=True)


def test_arguments_of_the_architecture_reach_timm_and_are_kept() -> None:
    arguments = {"img_size": 8, "patch_size": 2, "embed_dim": 12, "depth": 2, "num_heads": 3}
    original = Original("vit_tiny_patch16_224", num_classes=10, in_chans=1, mean=[0.3], std=[0.4], arguments=arguments)
    assert original(torch.rand(2, 1, 8, 8)).shape == (2, 10)
    assert len(original.net.blocks) == 2  # type: ignore[arg-type]
    assert original.architecture == {
        "name": "vit_tiny_patch16_224",
        "num_classes": 10,
        "in_chans": 1,
        "arguments": arguments,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint_path": "x.pt"}, "has 'checkpoint_path'; expected arguments of its architecture"),
        ({"num_classes": 7}, "has 'num_classes'; expected arguments of its architecture. Classes, channels"),
        ({"pretrained_strict": False}, "has 'pretrained_strict'; expected"),
        ({"depth": {}}, r"depth=\{\}; expected a number, text or a list of them"),
        ({"depth": 10**9}, "depth=1000000000; expected at most 16384"),
        ({"dept": 3}, r"timm cannot create 'vit_tiny_patch16_224' with \{'dept': 3\}: .*'dept'"),
    ],
)
def test_arguments_that_are_none_of_the_architecture_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Original("vit_tiny_patch16_224", arguments=arguments)


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (
            [125.3, 123.0, 113.9],
            [0.2],
            r"mean=\[125.3, 123, 113.9\] .* 0 to 255, .* pass mean=\[0.4914, 0.4824, 0.4467\]",
        ),
        ([0.5], [63.0, 62.1, 66.7], r"std=\[63, 62.1, 66.7\] .* 0 to 255, .* pass std=\[0.2471, 0.2435, 0.2616\]"),
        ([0.5], [0.2, 0.0, 0.2], r"std=\[0.2, 0, 0.2\] of 'cifar_resnet20'; pixels are divided by it"),
        ([0.5], [1e-60], r"std=\[0\] of 'cifar_resnet20'; pixels are divided by it"),
        ([0.5], [-0.2], r"std=\[-0.2\] of 'cifar_resnet20'; expected finite numbers in \[0, 1\]"),
        ([-0.1], [0.2], r"mean=\[-0.1\] of 'cifar_resnet20'; expected finite numbers in \[0, 1\]"),
        ([float("nan")], [0.2], r"mean=\[nan\] of 'cifar_resnet20'; expected finite"),
        ([0.5], [float("inf")], r"std=\[inf\] of 'cifar_resnet20'; expected finite"),
        (["a"], [0.2], r"mean=\['a'\] of 'cifar_resnet20'; expected a list of numbers"),
        ([], [0.2], "mean has 0 numbers, but 'cifar_resnet20' takes images of 3 channels"),
    ],
)
def test_statistics_that_are_not_of_pixels_in_0_to_1_are_refused(
    mean: list[float], std: list[float], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        Original("cifar_resnet20", mean=mean, std=std)


def test_statistics_at_the_borders_are_taken() -> None:
    original = Original("cifar_resnet20", mean=[0.0], std=[1.0])
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(original(images), original.net(images))
    assert Original("cifar_resnet20", mean=[1.0, 0.0, 0.5], std=[1 / 255]).std.item() == pytest.approx(1 / 255)


def test_weights_that_are_not_finite_are_refused_wherever_they_come_from() -> None:
    net = TinyCNN()
    with torch.no_grad():
        net.depthwise.weight[2] = float("nan")
    with pytest.raises(CheckpointError, match=r"9 of 54 values of depthwise\.weight in 'TinyCNN' are not finite .*nan"):
        Original.from_module(net, 10, **STATISTICS)
    original = tiny_original()
    original.net.get_buffer("norm.running_var").fill_(float("inf"))
    with pytest.raises(CheckpointError, match=r"6 of 6 values of norm\.running_var in 'TinyCNN' are not finite .*inf"):
        original.freeze()


class _Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.LazyConv2d(6, 3)


def _hooked_weight(net: TinyCNN) -> TinyCNN:
    weight = net.stem.weight.detach()
    del net.stem.weight
    net.stem.weight = weight  # type: ignore[assignment]
    return net


def _pruned_head(net: TinyCNN) -> TinyCNN:
    prune.random_unstructured(net.head, "weight", 0.5)
    return net


def _of_stem(change: Callable[[nn.Module], object]) -> Callable[[TinyCNN], TinyCNN]:
    def changed(net: TinyCNN) -> TinyCNN:
        change(net.stem)
        return net

    return changed


REMOVE = r'torch.nn.utils.parametrize.remove_parametrizations(net.stem, "weight")'
COMPUTED: dict[str, tuple[Callable[[TinyCNN], nn.Module], str]] = {
    "weight_norm": (_of_stem(parametrizations.weight_norm), REMOVE),
    "spectral_norm": (_of_stem(parametrizations.spectral_norm), REMOVE),
    "old weight_norm": (_of_stem(nn.utils.weight_norm), "torch.nn.utils.remove_weight_norm(net.stem)"),
    "old spectral_norm": (_of_stem(nn.utils.spectral_norm), "torch.nn.utils.remove_spectral_norm(net.stem)"),
    "pruned": (
        _of_stem(lambda stem: prune.l1_unstructured(stem, "weight", 0.5)),
        'torch.nn.utils.prune.remove(net.stem, "weight")',
    ),
    "pruned head": (_pruned_head, 'torch.nn.utils.prune.remove(net.head, "weight")'),
    # As `torch.compile` makes it, which changes what `torch.jit.script` below can do in the same process.
    "compiled": (
        lambda net: nn.ModuleDict({"_orig_mod": net}),
        "'ModuleDict' is compiled; pass the network that it was compiled from",
    ),
    "in DataParallel": (nn.DataParallel, "'DataParallel' is a DataParallel; pass the network inside it, net.module."),
    "scripted": (torch.jit.script, "is a ScriptModule; pass the network that it was made from."),
    "pruned bias": (
        lambda net: (prune.l1_unstructured(net.wide, "bias", 0.5), net)[1],
        "wide.bias of 'TinyCNN' is computed from other parameters in every forward pass, so it cannot be replaced. "
        'Make it a plain parameter first: torch.nn.utils.prune.remove(net.wide, "bias").',
    ),
    "a plain tensor": (_hooked_weight, "net.stem.weight = torch.nn.Parameter(net.stem.weight.detach())"),
    "lazy": (lambda net: _Lazy(), "weights without a shape yet (stem.weight); run one batch through the network"),
    "half": (lambda net: net.half(), "stem.weight of 'TinyCNN' is float16, but an original's weights are float32"),
    "bfloat16": (lambda net: net.bfloat16(), "is bfloat16, but an original's weights are float32; call net.float()"),
    "double": (lambda net: net.double(), "is float64, but an original's weights are float32; call net.float() first"),
    "one half layer": (_of_stem(lambda stem: stem.half()), "stem.weight of 'TinyCNN' is float16"),
    "meta": (lambda net: net.to("meta"), "'TinyCNN' is on the meta device: stem.weight has no values"),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated", "ignore:`torch.jit.script`")
@pytest.mark.parametrize("kind", COMPUTED)
def test_weights_that_cannot_be_replaced_are_refused_with_the_call_that_helps(kind: str) -> None:
    change, message = COMPUTED[kind]
    net = change(TinyCNN())
    with pytest.raises(UsageError) as caught:
        Original.from_module(net, 10, **STATISTICS)
    assert message in str(caught.value)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_the_calls_that_errors_name_do_help() -> None:
    images = torch.rand(2, 1, 8, 8)
    removals: list[tuple[Callable[[nn.Module], object], Callable[[nn.Module], object]]] = [
        (parametrizations.weight_norm, lambda stem: nn.utils.parametrize.remove_parametrizations(stem, "weight")),  # type: ignore[arg-type]
        (nn.utils.weight_norm, nn.utils.remove_weight_norm),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm),
        (lambda stem: prune.l1_unstructured(stem, "weight", 0.5), lambda stem: prune.remove(stem, "weight")),  # type: ignore[arg-type]
    ]
    for change, back in removals:
        net = TinyCNN().eval()
        change(net.stem)
        expected = net((images - 0.5) / 0.5)
        back(net.stem)
        original = Original.from_module(net, 10, **STATISTICS).freeze()
        torch.testing.assert_close(original(images), expected)


class _Returns(nn.Module):
    def __init__(self, answer: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> object:
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: torch.zeros(len(x), 1000), r"'_Returns' returned a tensor of shape \(2, 1000\)"),
        (lambda x: torch.zeros(len(x), 10, 1, 1), r"'_Returns' returned a tensor of shape \(2, 10, 1, 1\)"),
        (lambda x: (torch.zeros(len(x), 10), x), "'_Returns' returned a tuple"),
        (lambda x: {"logits": torch.zeros(len(x), 10)}, "'_Returns' returned a dict"),
    ],
)
def test_answers_that_are_not_logits_of_the_classes_are_refused(
    answer: Callable[[Tensor], object], message: str
) -> None:
    original = Original.from_module(_Returns(answer), 10, [0.5], [0.5], in_chans=3)
    with pytest.raises(UsageError, match=message + r"; expected logits of shape \(2, 10\)"):
        original(torch.rand(2, 3, 4, 4))


def test_buffers_may_have_any_type() -> None:
    net = TinyCNN()
    net.register_buffer("filter", torch.ones(2, dtype=torch.float64))
    assert Original.from_module(net, 10, **STATISTICS).freeze().net.get_buffer("filter").dtype == torch.float64


def test_a_parametrized_head_is_kept_as_it_is() -> None:
    net = TinyCNN()
    parametrizations.weight_norm(net.head)
    original = Original.from_module(net, 10, **STATISTICS).freeze()
    assert original(torch.rand(2, 1, 8, 8)).shape == (2, 10)


class _SpaceToDepth(nn.Module):
    """Its first convolution is not what reads the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(nn.functional.pixel_unshuffle(x, 2)).mean((2, 3))


def test_image_channels_are_given_stated_or_those_of_the_first_convolution() -> None:
    assert Original.from_module(_SpaceToDepth(), 4, [0.5], [0.5]).in_chans == 12
    assert Original.from_module(_SpaceToDepth(), 4, [0.4, 0.5, 0.6], [0.5], in_chans=3).in_chans == 3
    stated, configured = _SpaceToDepth(), _SpaceToDepth()
    stated.in_chans = 3  # type: ignore[assignment]
    configured.pretrained_cfg = {"input_size": (3, 8, 8)}  # type: ignore[assignment]
    assert [Original.from_module(net, 4, [0.5], [0.5]).in_chans for net in (stated, configured)] == [3, 3]
    with pytest.raises(
        UsageError, match=r"mean has 3 numbers, but '_SpaceToDepth' takes images of 12 .* right in_chans"
    ):
        Original.from_module(_SpaceToDepth(), 4, [0.4, 0.5, 0.6], [0.5])
    assert Original.from_module(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), 2, [0.5] * 3, [0.5]).in_chans == 3


def test_a_networks_own_attributes_are_left_alone() -> None:
    net = TinyCNN()
    assert Original.from_module(net, 10, **STATISTICS).num_classes == 10
    assert not hasattr(net, "num_classes")


FAMILIES = ["cifar_resnet20", "resnet18", "mobilenetv2_050", "densenet121", "tresnet_m", "csatv2"]
MORE_FAMILIES = [
    *(
        "vgg11_bn",
        "convnext_atto",
        "cspresnet50",
        "dla34",
        "edgenext_xx_small",
        "efficientnet_b0",
        "fastvit_t8",
        "ghostnet_050",
    ),
    *(
        "hardcorenas_a",
        "hrnet_w18_small",
        "inception_v3",
        "levit_128s",
        "lcnet_050",
        "mixnet_s",
        "mobilenetv3_small_050",
    ),
    *("mobilevit_xxs", "nf_regnet_b0", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "repghostnet_050", "repvgg_a0"),
    *(
        "res2net50_14w_8s",
        "rexnet_100",
        "selecsls42",
        "semnasnet_075",
        "skresnet18",
        "starnet_s1",
        "tinynet_e",
        "xception41",
    ),
    *("vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "resnetv2_50", "ese_vovnet19b_dw", "mobileone_s0"),
]


@pytest.mark.parametrize("name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_FAMILIES)])
def test_every_family_of_timm_is_an_original_of_as_many_channels_as_timm_says(name: str) -> None:
    original = Original(name, num_classes=5)
    assert original.in_chans == 3
    assert len(original.mean.flatten()) == 3
    assert Original.from_module(original.net, 5, [0.5], [0.5]).in_chans == 3
    if name not in ("csatv2", "vgg11_bn", "xception41"):
        gray = Original(name, num_classes=5, in_chans=1, mean=[0.5], std=[0.5])
        assert gray.in_chans == Original.from_module(gray.net, 5, [0.5], [0.5]).in_chans == 1


def test_every_model_of_timm_states_channels_and_statistics_that_are_taken() -> None:
    for name in timm.list_models():
        if not timm.models.model_entrypoint(name).__module__.startswith(("timm.", "nernlit.")):
            continue  # of another test
        config = timm.get_pretrained_cfg(name)
        for numbers in (config.mean, config.std):
            assert len(numbers) in (1, config.input_size[0]), name
            assert all(0 <= number <= 1 for number in numbers), name


class _WithState(TinyCNN):
    """A network whose state dict holds more, or other names, than its tensors."""

    def __init__(self, extra: object = None, hook: Callable[..., object] | None = None) -> None:
        super().__init__()
        self.extra = extra
        if hook is not None:
            self.register_state_dict_post_hook(hook)

    def get_extra_state(self) -> object:
        return self.extra


def _rename(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
    state[f"{prefix}renamed"] = state.pop(f"{prefix}stem.weight")


def test_state_dicts_that_are_not_the_networks_tensors_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"_extra_state in the state dict of '_WithState' is a dict, and a \.nern file"
    ):
        Original.from_module(_WithState({"amax": 1.0}), 10, **STATISTICS)
    net = TinyCNN()
    net.register_state_dict_post_hook(_rename)
    message = r"'TinyCNN' does not have the names of its tensors \(renamed, stem\.weight\); remove the state-dict hooks"
    with pytest.raises(UsageError, match=message):
        Original.from_module(net, 10, **STATISTICS)


def test_masks_may_be_infinite_and_buffers_of_eight_bits(tmp_path: Path) -> None:
    net = TinyCNN()
    net.register_buffer("mask", torch.full((3, 3), -math.inf).triu(1))
    net.register_buffer("steps", torch.ones(2).to(torch.float8_e4m3fn))
    original = Original.from_module(net, 10, **STATISTICS).freeze()
    net.get_buffer("mask")[0, 0] = math.nan
    with pytest.raises(CheckpointError, match="1 of 9 values of mask in 'TinyCNN' are not finite"):
        original.freeze()
