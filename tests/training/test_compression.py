from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nernlit
from nernlit.data import DigitsDataModule
from nernlit.errors import DataError, UsageError
from nernlit.originals import Original


def _digits() -> Iterator[torch.Tensor]:
    data = DigitsDataModule(batch_size=100)
    data.setup("fit")
    for batch in data.train_dataloader():
        yield data.on_after_batch_transfer(batch, 0)[0]


def test_ten_lines_give_a_small_file_of_nearly_the_same_answers(tmp_path: Path) -> None:
    net = Original("digits_resnet8", pretrained=True).eval()
    batches = list(_digits())
    before = {key: value.clone() for key, value in net.net.state_dict().items()}
    small = nernlit.compress(net.net, batches, target_bytes=25_000, steps=60, mean=(0.5,), std=(0.5,))
    small.save(tmp_path / "small.nern", "int8", fold_batch_norm=True)
    assert (tmp_path / "small.nern").stat().st_size == pytest.approx(25_000, rel=0.05)
    loaded = nernlit.load(tmp_path / "small.nern", net=Original("digits_resnet8").net)
    pixels = torch.cat(batches)
    same = loaded(pixels).argmax(1) == net.net((pixels - 0.5) / 0.5).argmax(1)
    assert float(same.float().mean()) > 0.94
    assert all(torch.equal(value, before[key]) for key, value in net.net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())  # still the caller's to train


def test_mirror_images_change_what_is_learned() -> None:
    net, batches = Original("digits_resnet8", pretrained=True).net, list(_digits())[:1]
    weights = []
    for flip in (False, True, True):
        torch.manual_seed(0)
        weights.append(nernlit.compress(net, batches, steps=2, teacher_flip=flip).weights())
    assert not all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())
    assert all(torch.equal(value, weights[2][key]) for key, value in weights[1].items())


class Headless(nn.Module):
    def forward(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        return pixels_BCHW


@pytest.mark.parametrize(
    ("net", "images", "options", "error", "message"),
    [
        ("digits", [], {}, DataError, r"the images have no batch\."),
        ("digits", [torch.zeros(2, 8, 8)], {}, DataError, r"a batch of images is \(2, 8, 8\) torch.float32; expected"),
        ("digits", ["cat.jpg"], {}, DataError, r"a batch of images is str; expected floating-point pixels"),
        ("digits", DigitsDataModule(), {}, DataError, r"'DigitsDataModule' object is not iterable; expected batches"),
        ("half", None, {}, UsageError, r"is float16, but an original's weights are float32; call net.float\(\) first"),
        ("digits", None, {"bits": 0.0}, UsageError, r"^bits=0.0; expected a finite number above 0"),
        ("digits", None, {"target_bytes": 20_000, "bits": 2.0}, UsageError, "are both given; pass one of them"),
        ("digits", None, {"steps": 0}, UsageError, r"steps=0; expected at least 1"),
        (
            "digits",
            None,
            {"target_bytes": 1000},
            UsageError,
            r"target_bytes=1,000: the file needs [\d,]+ bytes in addition",
        ),
        ("headless", None, {}, UsageError, r"the network does not return logits \(B, C\)"),
    ],
)
def test_impossible_requests_are_refused(
    net: str, images: object, options: dict[str, int], error: type[Exception], message: str
) -> None:
    module = {"headless": Headless, "half": lambda: Original("digits_resnet8").net.half()}.get(
        net, lambda: Original("digits_resnet8").net
    )()
    with pytest.raises(error, match=message):
        nernlit.compress(module, [torch.zeros(2, 1, 8, 8)] if images is None else images, **options)  # type: ignore[arg-type]


def test_images_that_can_be_read_once_only_are_an_error() -> None:
    batches = iter([torch.rand(4, 1, 8, 8)] * 3)
    with pytest.raises(UsageError, match=r"images is a list_iterator, which can be iterated only once; pass a list"):
        nernlit.compress(Original("digits_resnet8").net, batches, steps=5)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_callers_modes_random_numbers_and_images_stay_as_they_are(context: Any) -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x.sub_(0.5)).mean((2, 3))

    images = torch.rand(4, 1, 8, 8)
    given, state, net = images.clone(), torch.get_rng_state(), InPlace()
    state = torch.get_rng_state()
    with context():
        nernlit.compress(net, [images], bits=4, steps=2)
        assert not torch.is_grad_enabled()
    assert torch.equal(images, given)
    assert torch.equal(torch.get_rng_state(), state)


def test_images_that_do_not_suit_the_network_are_refused() -> None:
    net = Original("digits_resnet8", pretrained=True).net
    with pytest.raises(UsageError, match=r"the network cannot process images of shape \(2, 3, 8, 8\)"):
        nernlit.compress(net, [torch.rand(2, 3, 8, 8)])
    with pytest.raises(DataError, match=r"the pixels of a batch are from .* expected pixels in \[0, 1\]"):
        nernlit.compress(net, [255 * torch.rand(2, 1, 8, 8)], mean=0.5, std=0.5)
    with pytest.raises(DataError, match="pixels that are not finite"):
        nernlit.compress(net, [torch.full((2, 1, 8, 8), torch.nan)])


def test_images_that_are_normalized_already_are_passed_on() -> None:
    small = nernlit.compress(Original("digits_resnet8", pretrained=True).net, [torch.randn(4, 1, 8, 8)], steps=2)
    assert all(bool(value.isfinite().all()) for value in small.weights().values())
    with pytest.raises(DataError, match=r"the pixels of a batch are from -[\d.]+ to "):
        nernlit.compress(Original("digits_resnet8").net, [torch.randn(4, 1, 8, 8)], steps=2, mean=0.5)


def test_two_sizes_are_refused_by_their_names() -> None:
    with pytest.raises(UsageError, match=r"^target_bytes=20000 and bits=2.0 are both given"):
        nernlit.compress(Original("digits_resnet8").net, [torch.rand(4, 1, 8, 8)], target_bytes=20_000, bits=2.0)
