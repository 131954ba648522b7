import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nernlit.callbacks import Compile
from nernlit.errors import UsageError
from nernlit.predictors import Codebooks, PredictorEnsemble
from nernlit.predictors.moves import CodeMoves
from nernlit.predictors.quantized import Quantize, Quantized
from nernlit.representation import Representation, load_representation
from nernlit.training import ReconOnly
from tests.fakes import quiet_trainer, tiny_original
from tests.reference.additive import code_costs as slow_costs


def _adam(parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.01)


def _steps(count: int) -> DataLoader[int]:
    return DataLoader(range(count), batch_size=None)  # type: ignore[arg-type]


def _moving(**options: object) -> Codebooks:
    defaults = {"codebooks": 2, "bits": 3, "kernel_size": 5, "iterations": 3, "move": 0.1, "move_rate": 0.2}
    return Codebooks(**{**defaults, **options})  # type: ignore[arg-type]


def _error_after_training(move: float) -> tuple[float, list[float]]:
    """The error of 16 numbers, two codewords for all, after training to numbers that need other codes."""
    predictor = Codebooks(codebooks=1, bits=1, kernel_size=1, move=move, move_rate=0.1)
    predictor.bind([(4, 4)])
    addresses = torch.cartesian_prod(torch.arange(1), torch.arange(4), torch.arange(4))
    before = torch.tensor([1.0, -1.0]).repeat(8).view(16, 1, 1)
    after = torch.tensor([1.0, 1.0, -1.0, -1.0]).repeat(4).view(16, 1, 1)
    predictor.fit(before, addresses, torch.ones(16, 1, 1))
    assert torch.equal(predictor(addresses), before)
    optimizer, moved = torch.optim.Adam(predictor.parameters(), lr=0.05), []
    for _ in range(100):
        error = (predictor(addresses) - after).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        moved.append(predictor.after_step(1.0).get("codes_moved", 0.0))
    return float(error.detach()), moved


def test_moving_codes_reach_a_minimum_that_fixed_codes_cannot() -> None:
    fixed, none = _error_after_training(0.0)
    assert fixed > 0.9  # both codewords are 0: half of their numbers have to be 1, and half -1
    assert sum(none) == 0
    moving, moved = _error_after_training(0.1)
    assert moving < 1e-3
    assert sum(moved) > 0
    assert max(moved) == 1 / 16  # at most a tenth of 16, rounded down


def _slow_step(codes: Tensor, books: Tensor, sets: list[int], gradient: Tensor, drift: Tensor, price: float) -> None:
    """One step of share 0.3, rate 0.5 and relative rate 0.4, block by block and in place."""
    gains, paid = [], []
    for number, own in enumerate(books):
        members = [row for row, of in enumerate(sets) if of == number]
        blocks = [own[torch.arange(len(own)), codes[row].long()].sum(0) for row in members]
        cost_per_bit = price * sum(float(block.square().sum()) for block in blocks) / len(members)
        paid.append([slow_costs(codes[members, m].tolist(), own.shape[1], cost_per_bit) for m in range(len(own))])
    for row in range(len(codes)):
        used = [i for i in range(books.shape[-1]) if gradient[row, i] != 0]
        if not used:
            continue
        size = (sum(float(gradient[row, i]) ** 2 for i in used) / len(used)) ** 0.5
        drift[row] -= 0.5 * 0.4 * gradient[row] / size
        own = books[sets[row]]
        block = sum(own[m, codes[row, m]] for m in range(len(own)))
        target = block + drift[row]

        def error(
            choice: list[int],
            target: Tensor = target,
            used: list[int] = used,
            own: Tensor = own,
            paid: list[list[float]] = paid[sets[row]],
        ) -> float:
            errors = sum(float(target[i] - sum(own[m, c, i] for m, c in enumerate(choice))) ** 2 for i in used)
            return errors + sum(paid[m][c] for m, c in enumerate(choice))

        choice = codes[row].tolist()
        for m in range(len(own)):
            choice = min(([*choice[:m], c, *choice[m + 1 :]] for c in range(own.shape[1])), key=error)
        gain = error(codes[row].tolist()) - error(choice)
        if gain > 0 and choice != codes[row].tolist():
            left = [float(target[i] - sum(own[m, c, i] for m, c in enumerate(choice))) for i in range(len(target))]
            gains.append((gain, row, choice, [x if i in used else 0.0 for i, x in enumerate(left)]))
    for _, row, choice, left in sorted(gains, reverse=True)[: int(0.3 * len(codes))]:
        codes[row] = torch.tensor(choice)
        drift[row] = torch.tensor(left)


@pytest.mark.parametrize("price", [0.0, 0.05])
def test_a_step_is_that_of_a_slow_version(price: float) -> None:
    generator = torch.Generator().manual_seed(0)
    books = torch.randn(2, 3, 4, 5, generator=generator)
    codes = torch.randint(4, (20, 3), generator=generator, dtype=torch.int32)
    sets = torch.arange(20) % 2
    seen = torch.ones(20, 5)
    seen[:6, 3:] = 0  # smaller kernels
    seen[6] = 0
    moves, slow = CodeMoves(share=0.3, rate=0.5, price=price), codes.clone()
    drift, moved = torch.zeros(20, 5), []
    for _ in range(12):
        gradient = torch.randn(20, 5, generator=generator) * seen
        blocks = torch.zeros(20, 5, requires_grad=True)
        rows = torch.randperm(20, generator=generator)
        watched = blocks * 1
        moves.watch(watched, rows, 20)
        (watched * gradient[rows]).sum().backward()
        moved.append(moves.step(codes, books, sets, 0.4))
        before = slow.clone()
        _slow_step(slow, books, sets.tolist(), gradient, drift, price)
        assert torch.equal(codes, slow)
        assert moved[-1] == int((before != slow).any(1).sum())
        assert torch.allclose(moves.drift, drift, atol=1e-5)
    assert 0 < sum(moved) <= 12 * 6
    assert not bool(moves.drift[:6, 3:].any())


def test_gradients_of_several_processes_are_averaged() -> None:
    generator = torch.Generator().manual_seed(0)
    books, gradients = torch.randn(1, 2, 4, 3, generator=generator), torch.randn(2, 30, 3, generator=generator)
    codes = torch.zeros(30, 2, dtype=torch.int32)
    found = []
    for gradient, mean in ((gradients[0], lambda own: (own + gradients[1]) / 2), (gradients.mean(0), torch.positive)):
        moves, own = CodeMoves(share=1.0, rate=2.0), codes.clone()
        blocks = torch.zeros(30, 3, requires_grad=True)
        moves.watch(blocks, torch.arange(30), 30)
        (blocks * gradient).sum().backward()
        assert moves.step(own, books, torch.zeros(30, dtype=torch.int64), 1.0, mean) > 0
        found.append(own)
    assert torch.equal(*found)


@pytest.mark.parametrize(("share", "scale"), [("network", "none"), ("layer", "filter")])
def test_moved_codes_are_in_checkpoints_and_files(share: str, scale: str, tmp_path: Path) -> None:
    original = tiny_original()
    representation = Representation(original, _moving(share=share, scale=scale))
    before = copy.deepcopy(representation.predictor)
    trainer = quiet_trainer(max_epochs=1, limit_val_batches=0)
    trainer.fit(ReconOnly(representation, _adam), _steps(20))
    predictor = representation.predictor
    assert isinstance(predictor, Codebooks)
    assert isinstance(before, Codebooks)
    assert not torch.equal(predictor.codes, before.codes)
    assert 0 < float(trainer.callback_metrics["train/codes_moved"]) <= 0.1
    trainer.save_checkpoint(tmp_path / "fit.ckpt")
    representation.save(tmp_path / "fit.nern")
    expected = representation.weights()
    for name in ("fit.ckpt", "fit.nern"):
        new = Representation(original, _moving(share=share, scale=scale))
        again, _ = load_representation(str(tmp_path / name), new)
        for key, weight in again.weights().items():
            assert torch.equal(weight, expected[key]), (name, key)
    saved = torch.load(tmp_path / "fit.ckpt", weights_only=True)
    assert set(saved["predictor_training"]) == {"drift"}
    assert not [key for key in saved["state_dict"] if "moves" in key]


def test_codes_of_quantized_codebooks_move(tmp_path: Path) -> None:
    representation = Representation(tiny_original(), _moving(), quantize=Quantize(bits=6))
    predictor = representation.predictor
    assert isinstance(predictor, Quantized)
    assert isinstance(predictor.predictor, Codebooks)
    before = predictor.predictor.codes.clone()
    quiet_trainer(max_epochs=1, limit_val_batches=0).fit(ReconOnly(representation, _adam), _steps(20))
    assert not torch.equal(predictor.predictor.codes, before)
    representation.save(tmp_path / "fit.nern")
    new = Representation(representation.original, _moving(), quantize=Quantize(bits=6))
    again, _ = load_representation(str(tmp_path / "fit.nern"), new)
    for key, weight in again.weights().items():
        assert torch.allclose(weight, representation.weights()[key], atol=1e-6), key


def test_evaluations_note_no_gradients() -> None:
    representation = Representation(tiny_original(), _moving()).eval()
    sum(weight.sum() for weight in representation.weights().values()).backward()  # type: ignore[union-attr]
    assert representation.predictor.after_step(1.0) == {"codes_moved": 0.0}
    assert representation.predictor.training_state() == {}


def test_what_cannot_work_with_moving_codes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"move=1\.5; expected a share of the kernels"):
        _moving(move=1.5)
    with pytest.raises(UsageError, match="move_rate=0; expected a finite number above 0"):
        _moving(move_rate=0)
    representation = Representation(tiny_original(), _moving())
    with pytest.raises(UsageError, match=r"Codebooks changes its codes during training .* Progressive's trials cannot"):
        PredictorEnsemble(representation.predictor, 2)
    for callback, message in (
        (EMAWeightAveraging(), "EMAWeightAveraging would average codewords whose codes change"),
        (Compile(), "Compile: Codebooks reads its gradients"),
    ):
        with pytest.raises(UsageError, match=message):
            quiet_trainer(max_epochs=1, limit_val_batches=0, callbacks=[callback]).fit(
                ReconOnly(representation, _adam), _steps(2)
            )


def test_codes_are_chosen_for_the_rounded_codewords() -> None:
    torch.manual_seed(0)
    representation = Representation(tiny_original(), _moving(), quantize=Quantize(3.0))
    quantized = representation.predictor
    assert isinstance(quantized, Quantized)
    plain = copy.deepcopy(quantized.predictor)
    plain.load_state_dict({**quantized.predictor.state_dict(), **quantized.rounded_parameters()})
    rows = representation.addresses
    wanted = torch.randn(len(rows), 5, 5)
    for predictor in (quantized, plain):
        (predictor(rows) * wanted).sum().backward()
    latent = quantized.predictor.codewords.detach().clone()
    assert quantized.after_step(1.0) == plain.after_step(1.0)
    assert torch.equal(quantized.predictor.codes, plain.codes)
    assert torch.equal(quantized.predictor.codewords, latent)
