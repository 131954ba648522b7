from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from nernlit.analysis import low_frequency_energy
from nernlit.cli.main import run
from nernlit.data import DigitsDataModule
from nernlit.errors import CheckpointError, UsageError
from nernlit.losses import kd_loss
from nernlit.originals import Original
from nernlit.training import OriginalModule
from tests.fakes import CONFIGS, QUICK, quiet_trainer, tiny_original

KD = ["--model.teacher={name: digits_resnet8, pretrained: true}", "--model.kd_weight=2"]


def _sgd(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.03)


def _digits(seed: int = 0) -> Original:
    torch.manual_seed(seed)
    return Original("digits_resnet8")


def test_the_terms_are_what_they_say() -> None:
    student, teacher = _digits(), Original("digits_resnet8", pretrained=True)
    images, labels = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    convolutions = {name: value for name, value in student.net.state_dict().items() if value.dim() == 4}
    with torch.no_grad():
        logits = student.train()(images)
        expected = {
            "train/cross_entropy": cross_entropy(logits, labels),
            "train/kd": 3 * kd_loss(logits, teacher.eval()(images), temperature=2),
            "train/high_frequency": 0.5 * (1 - sum(low_frequency_energy(convolutions).values()) / len(convolutions)),
        }
    options = {"teacher": teacher, "kd_weight": 3.0, "temperature": 2.0, "high_frequency_weight": 0.5}
    module = OriginalModule(student, _sgd, **options)  # type: ignore[arg-type]
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, DataLoader([(images, labels)], batch_size=None))  # type: ignore[arg-type]
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert float(found.pop("train/loss")) == pytest.approx(float(sum(expected.values())), rel=1e-5)
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-4)


def test_a_penalty_on_small_singular_values_moves_energy_to_the_larger_ones() -> None:
    low = []
    for weight in (10.0, 0.0):
        module = OriginalModule(_digits(), _sgd, high_frequency_weight=weight)
        quiet_trainer(max_steps=10).fit(module, datamodule=DigitsDataModule(batch_size=32))
        trained = {name: value for name, value in module.network()[1].items() if value.dim() == 4}
        low.append(sum(low_frequency_energy(trained).values()) / len(trained))
    assert low[0] > low[1] + 0.005


def test_a_student_learns_its_teachers_answers_without_changing_or_storing_it() -> None:
    teacher = Original("digits_resnet8", pretrained=True)
    before, data = teacher.fingerprint(), DigitsDataModule(batch_size=128)
    agreement = []
    for weight in (3.0, 0.0):
        module = OriginalModule(_digits(), _sgd, teacher=teacher if weight else None, kd_weight=weight)
        quiet_trainer(max_epochs=3, precision="bf16-mixed").fit(module, datamodule=data)
        images = torch.cat(list(data.training_images(300, seed=0)))
        with torch.no_grad():
            agreement.append(float(kd_loss(module.original.eval()(images), teacher(images))))
        assert not [key for key in module.state_dict() if not key.startswith("original.net.")]
    assert agreement[0] < 0.7 * agreement[1]
    assert teacher.fingerprint() == before
    assert not teacher.training


def test_a_fit_with_a_teacher_is_resumed_with_it_and_tested_without(tmp_path: Path) -> None:
    line = ["-c", str(CONFIGS / "digits_original.yaml"), "--trainer.max_epochs=1", *QUICK[5:], "--data.batch_size=500"]
    run(["fit", *line, *KD])
    module, path = OriginalModule(_digits(), _sgd), next(Path("runs").rglob("last.ckpt"))
    with pytest.raises(
        CheckpointError, match=r"had a teacher of SHA-256 .*, this one has no separate teacher; pass the"
    ):
        quiet_trainer(max_epochs=2).fit(module, datamodule=DigitsDataModule(batch_size=500), ckpt_path=path)
    tested = run(["test", *line, "--ckpt_path=last"])
    assert 0 <= float(tested.trainer.callback_metrics["test/acc"]) <= 1


def test_options_without_effect_and_out_of_range_are_refused() -> None:
    teacher = Original("digits_resnet8", pretrained=True)
    with pytest.raises(UsageError, match="a teacher is given, but kd_weight is 0; set it above 0"):
        OriginalModule(_digits(), _sgd, teacher=teacher)
    with pytest.raises(
        UsageError, match=r"kd_weight=1\.0, but there is no teacher; pass --model\.teacher, or leave it"
    ):
        quiet_trainer(max_steps=1).fit(OriginalModule(_digits(), _sgd, kd_weight=1.0), datamodule=DigitsDataModule())
    with pytest.raises(UsageError, match="the teacher 'digits_resnet8' has 10 classes, the original 'digits_resnet8'"):
        OriginalModule(Original("digits_resnet8", num_classes=7), _sgd, teacher=teacher, kd_weight=1.0)
    with pytest.raises(UsageError, match="the teacher 'digits_resnet8' has random weights"):
        OriginalModule(_digits(), _sgd, teacher=_digits(1), kd_weight=1.0)
    for name in ("kd_weight", "high_frequency_weight"):
        with pytest.raises(UsageError, match=f"{name}=-1; expected at least 0"):
            OriginalModule(tiny_original(), _sgd, **{name: -1})  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="temperature=0; expected a finite number above 0"):
        OriginalModule(tiny_original(), _sgd, temperature=0)
    flat = Original.from_module(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), 2, [0.5], [0.5])
    with pytest.raises(UsageError, match=r"high_frequency_weight=0\.1, but 'Sequential' has no 2-D convolutions"):
        OriginalModule(flat, _sgd, high_frequency_weight=0.1)
