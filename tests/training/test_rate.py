from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import nernlit
from nernlit.cli.main import main
from nernlit.errors import UsageError
from nernlit.predictors import MLP, Codebooks, Quantize, Quantized, Table
from nernlit.representation import Representation
from nernlit.training import DecoupledDistill, Rate, ReconOnly
from nernlit.training.rate import RateTerm
from tests.fakes import QUICK, digits_representation, quiet_trainer, tiny_original


def _adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-2)


def _table(**options: object) -> Representation:
    original = digits_representation().original
    return Representation(original, Table(scale="layer"), order="none", quantize=Quantize(3.0), **options)  # type: ignore[arg-type]


def _batches(count: int) -> DataLoader[int]:
    images, labels = torch.rand(4, 1, 8, 8), torch.randint(0, 10, (4,))
    return DataLoader([(images, labels)] * count, batch_size=None)  # type: ignore[arg-type]


def test_the_term_is_the_weight_times_the_bits_per_predicted_weight() -> None:
    representation = _table()
    predictor = representation.predictor
    assert isinstance(predictor, Quantized)
    estimated, entropy = (float(value.detach()) / representation.layout.num_weights for value in predictor.rate())
    module = DecoupledDistill(representation, optimizer=_adam, rate=Rate(weight=0.5), precision="fp32")
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, _batches(1))
    assert float(trainer.callback_metrics["train/rate"]) == pytest.approx(0.5 * estimated, rel=1e-5)
    # The coded numbers' bits, measured in the first step.
    assert float(trainer.callback_metrics["train/bits_per_weight"]) == pytest.approx(entropy, rel=0.01)
    assert float(trainer.callback_metrics["train/rate_weight"]) == 0.5


def test_codes_are_bytes_that_the_rate_does_not_change() -> None:
    original = digits_representation().original
    representation = Representation(original, Codebooks(2, 4), order="none", quantize=Quantize(6.0))
    term = RateTerm(representation, Rate(weight=1.0))
    kernels = representation.layout.num_kernels  # two codes of four bits each
    assert 0.8 * kernels < term.fixed_bytes < representation.sizes().file_bytes


def test_the_estimate_counts_codes_that_move() -> None:
    original = digits_representation().original
    codebooks = Codebooks(2, 4, iterations=3, move=0.1, move_rate=0.2, price=0.03)
    representation = Representation(original, codebooks, order="none", quantize=Quantize(6.0))
    before = len(representation.predictor.stored()["predictor.codes"])
    trainer = quiet_trainer(max_steps=101)
    trainer.fit(ReconOnly(representation, optimizer=_adam, rate=Rate(weight=1e-3), precision="fp32"), _batches(101))
    after, size = len(representation.predictor.stored()["predictor.codes"]), representation.sizes().file_bytes
    assert abs(after - before) > 0.02 * size
    assert float(trainer.callback_metrics["size/file_bytes_estimate"]) == pytest.approx(size, rel=0.01)


def test_a_larger_weight_gives_fewer_bits() -> None:
    bits = []
    for weight in (0.0, 1.0, 10.0):
        torch.manual_seed(0)
        representation = _table()
        module = DecoupledDistill(representation, optimizer=_adam, rate=Rate(weight=weight), precision="fp32")
        quiet_trainer(max_steps=100).fit(module, _batches(100))
        assert isinstance(representation.predictor, Quantized)
        bits.append(float(representation.predictor.rate()[1]))
    assert bits[0] > 1.05 * bits[1] > 1.05**2 * bits[2]


def test_a_fit_ends_at_the_bytes_that_are_asked_for() -> None:
    representation = _table()
    before = representation.sizes()
    target = before.file_bytes - int(before.code_bits / 8 * 0.3)
    module = DecoupledDistill(representation, optimizer=_adam, rate=Rate(target_bytes=target), precision="fp32")
    trainer = quiet_trainer(max_steps=300)
    trainer.fit(module, _batches(300))
    size = representation.sizes().file_bytes
    assert 0.98 * target < size <= target
    assert float(trainer.callback_metrics["size/file_bytes_estimate"]) == pytest.approx(size, rel=0.01)


def test_evaluations_are_those_of_the_file(tmp_path: Path) -> None:
    representation = _table(tune_kept="affine")
    rate = Rate(weight=0.1, kept="int8", fold_batch_norm=True)
    module = DecoupledDistill(representation, optimizer=_adam, rate=rate, precision="fp32")
    quiet_trainer(max_steps=3).fit(module, _batches(3))
    representation.save(tmp_path / "net.nern", "int8", fold_batch_norm=True)
    images = torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        found = module.classifiers("test")[""](images)
        assert torch.allclose(found, nernlit.load(tmp_path / "net.nern")(images), atol=1e-5)
        assert (found - representation(images)).abs().max() > 1e-3


@pytest.mark.parametrize(("share", "keeps"), [(1.0, True), (0.5, False)])
def test_a_fit_from_earlier_weights_keeps_step_sizes_that_are_near_the_target(share: float, keeps: bool) -> None:
    representation = _table()
    representation.is_new = False
    predictor = representation.predictor
    assert isinstance(predictor, Quantized)
    before_G = predictor.steps().detach()
    sizes = representation.sizes()
    target = sizes.file_bytes - int((1 - share) * sizes.code_bits / 8)
    RateTerm(representation, Rate(target_bytes=target))
    assert torch.equal(predictor.steps(), before_G) == keeps


@pytest.mark.parametrize(
    ("rate", "message"),
    [
        (Rate(target_bytes=10**9), r"rate.target_bytes=1,000,000,000: .* at most [\d,]+ \([\d.]+\)"),
        (
            Rate(target_bits=12.5),
            r"rate.target_bits=12.5: .* bytes \(.* bits per predicted weight\)",
        ),
        (Rate(target_bits=float("nan")), "rate.target_bits=nan: the file needs"),
        (Rate(target_bytes=20_000, target_bits=2.0), "are both given; pass one of them"),
        (Rate(weight=-1.0), r"rate.weight=-1.0; expected at least 0"),
        (
            Rate(target_bytes=100),
            r"rate.target_bytes=100: the file needs [\d,]+ bytes in addition to those of 73,872 quantized",
        ),
    ],
)
def test_impossible_rates_are_refused(rate: Rate, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        DecoupledDistill(_table(), optimizer=_adam, rate=rate)


def test_a_rate_needs_a_quantized_predictor() -> None:
    with pytest.raises(UsageError, match=r"a rate needs a quantized predictor; pass --model.representation.quantize"):
        ReconOnly(Representation(tiny_original(), MLP(8, kernel_size=5)), _adam, rate=Rate(weight=1.0))


def test_the_command_line_names_the_option_that_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["fit", *QUICK, "--model.rate.weight=1"])
    assert error.value.code == 2
    assert "pass --model.representation.quantize.bits" in capsys.readouterr().err


def test_bits_that_a_predictor_cannot_have_are_refused() -> None:
    original = digits_representation().original
    representation = Representation(original, MLP(16, num_frequencies=4), quantize=Quantize(6.0))
    with pytest.raises(UsageError, match=r"rate.target_bits=6: .* and at most [\d,]+ \([\d.]+\)\.$"):
        RateTerm(representation, Rate(target_bits=6.0))


def test_batches_of_one_optimizer_step_are_one_step_of_the_controller() -> None:
    term, again = (RateTerm(_table(), Rate(target_bytes=25_000)) for _ in range(2))
    for step in range(3):
        each = [term({}, step) for _ in range(4)]
        assert len({float(value) for value in each}) == 1
        assert float(again({}, step)) == float(each[0])
    assert term.state_dict() == again.state_dict()
    assert term.steps == 3


@pytest.mark.parametrize("part", ["predictor", "kept tensor"])
def test_numbers_that_are_not_finite_are_left_to_the_check_of_losses(part: str) -> None:
    representation = _table(tune_kept="affine")
    term = RateTerm(representation, Rate(target_bytes=25_000, kept="int8"))
    tuned = next(representation.tuned.parameters())
    with torch.no_grad():
        (next(representation.predictor.parameters()) if part == "predictor" else tuned).fill_(torch.nan)
    assert bool(term({}, 0).isnan()) == (part == "predictor")


def test_a_step_that_is_repeated_has_a_weight_of_its_own() -> None:
    term, again = (RateTerm(_table(), Rate(target_bytes=25_000)) for _ in range(2))
    before = term.state_dict()
    with torch.no_grad():
        kept = {name: value.clone() for name, value in term.predictor.named_parameters()}
        next(term.predictor.parameters()).fill_(torch.nan)
        term({}, 0)
        for name, value in term.predictor.named_parameters():
            value.copy_(kept[name])
    term.load_state_dict(before)
    assert float(term({}, 0)) == float(again({}, 0))
    assert term.state_dict() == again.state_dict()
