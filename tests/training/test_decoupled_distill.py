from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, log_softmax, softmax
from torch.utils.data import DataLoader

from nernlit.cli.main import main, run
from nernlit.data import DigitsDataModule
from nernlit.errors import CheckpointError, UsageError
from nernlit.originals import Original
from nernlit.predictors import MLP, Quantize
from nernlit.representation import Representation
from nernlit.training import BaselineJoint, DecoupledDistill, OriginalModule, ReconOnly, ReconstructionPhase
from nernlit.training.distillation import Distillation
from tests.fakes import CONFIGS, QUICK, digits_representation, quiet_trainer

#: Four epochs of two steps, three of reconstruction and five of distillation, with a tiny predictor.
QUICK_DECOUPLED = [
    "-c",
    str(CONFIGS / "digits_h96_decoupled.yaml"),
    "--model.reconstruction.steps=3",
    "--trainer.max_epochs=4",
    "--trainer.check_val_every_n_epoch=1",
    "--data.batch_size=500",
    *QUICK[4:],
]


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


def _first_step(module: DecoupledDistill, images: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    trainer = quiet_trainer(max_steps=1)
    trainer.fit(module, DataLoader([(images, labels)], batch_size=None))  # type: ignore[arg-type]
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def _distilling(representation: Representation, **options: object) -> DecoupledDistill:
    """A module in phase 2, without a checkpoint."""
    module = DecoupledDistill(representation, optimizer=_adam, **options)  # type: ignore[arg-type]
    module.has_phase_1 = True
    return module


def test_the_terms_are_what_they_say() -> None:
    representation = digits_representation()
    images, labels = torch.rand(16, 1, 8, 8), torch.randint(0, 10, (16,))
    with torch.no_grad():
        student, teacher = representation(images) / 2, representation.original(images) / 2
    kd = float((softmax(teacher, 1) * (log_softmax(teacher, 1) - log_softmax(student, 1))).sum(1).mean()) * 4
    errors = (representation.kernels() - representation.target) / representation.scale
    module = _distilling(
        representation, precision="fp32", kd_weight=3.0, temperature=2.0, cross_entropy_weight=0.5, recon_weight=0.1
    )
    terms = _first_step(module, images, labels)
    assert terms["train/kd"] == pytest.approx(3 * kd, rel=1e-4)
    assert terms["train/cross_entropy"] == pytest.approx(0.5 * float(cross_entropy(student * 2, labels)), rel=1e-4)
    assert terms["train/recon"] == pytest.approx(0.1 * float(errors.square().mean().detach()), rel=1e-4)
    assert terms["train/loss"] == pytest.approx(sum(terms[f"train/{n}"] for n in ("kd", "cross_entropy", "recon")))


@pytest.mark.parametrize("feature_weight", [0.0, 1.0])
def test_a_teacher_may_answer_to_mirror_images_too(feature_weight: float) -> None:
    representation = digits_representation()
    images, labels = torch.rand(16, 1, 8, 8), torch.zeros(16, dtype=torch.int64)
    with torch.no_grad():
        student, original = representation(images), representation.original
        teacher = (original(images) + original(images.flip(-1))) / 2
    kd = float((softmax(teacher, 1) * (log_softmax(teacher, 1) - log_softmax(student, 1))).sum(1).mean())
    options = {"feature_weight": feature_weight, "taps": ["layer1"]} if feature_weight else {}
    module = _distilling(representation, precision="fp32", teacher_flip=True, **options)
    assert _first_step(module, images, labels)["train/kd"] == pytest.approx(kd, rel=1e-4)


@pytest.mark.parametrize(
    ("option", "flip", "expected"), [(None, True, True), (None, False, False), (False, True, False)]
)
def test_a_teacher_may_answer_as_the_training_images_are(option: bool | None, flip: bool, expected: bool) -> None:
    module = _distilling(digits_representation(), teacher_flip=option)
    data = DigitsDataModule(batch_size=500, flip=flip)
    quiet_trainer(max_steps=1, limit_val_batches=0).fit(module, data)
    assert module.distillation.teacher_flip is expected


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ({}, {}),
        ({"flip": True}, {"teacher_flip": True}),
        ({"flip": True}, {"teacher_flip": None, "cross_entropy_weight": 0.5}),
        ({}, {"feature_weight": 1.0, "taps": ["layer1"]}),
        ({"num_workers": 1}, {"reconstruction": ReconstructionPhase(1)}),
    ],
)
def test_a_teacher_that_is_cached_answers_once_and_alike(
    data: dict[str, Any], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if data.get("num_workers"):  # as if the images did not fit in memory
        monkeypatch.setattr("nernlit.data.batches.TensorImages", type(None))
    steps, weights, asked = 7, [], []
    for cached in (False, True):
        module = _distilling(
            digits_representation(),
            precision="fp32",
            teacher=digits_representation().original,
            cache_teacher=cached,
            **options,
        )
        answer, images = Distillation._teacher_logits, [0]

        def counted(*args: Any, answer: Any = answer, images: list[int] = images) -> torch.Tensor:
            images[0] += len(args[3])
            return answer(*args)  # type: ignore[no-any-return]

        with monkeypatch.context() as patch:
            patch.setattr(Distillation, "_teacher_logits", counted)
            fixed = DigitsDataModule(batch_size=400, **data)
            quiet_trainer(max_steps=steps, limit_val_batches=0, max_epochs=-1).fit(module, fixed)
        weights.append(module.representation.layout.vector(module.representation.weights()).detach())
        asked.append(images[0])
    distilled = steps - module.reconstruction.steps
    assert asked == [400 * distilled, 1293]
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights[0], digits_representation().layout.vector(digits_representation().weights()))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"pad_crop": 1}, r"data.pad_crop=1 changes the training images in each epoch; pass --data.pad_crop 0,"),
        ({"resized_crop": 0.5}, r"data.resized_crop=0.5 changes .*; pass --data.resized_crop null, or leave out"),
        ({"mixup": 0.2}, r"data.mixup=0.2 changes the training images"),
        ({"flip": True}, r"data.flip mirrors training images, .*; pass --model.teacher_flip true, or leave out"),
        ({"train_on": "noise"}, r"cache_teacher needs training images, and this fit is to use none"),
    ],
)
def test_a_teacher_is_cached_for_fixed_images_only(data: dict[str, Any], message: str) -> None:
    module = _distilling(digits_representation(), cache_teacher=True)
    with pytest.raises(UsageError, match=message):
        quiet_trainer(max_steps=1).fit(module, datamodule=DigitsDataModule(**data))


def test_a_cached_teacher_needs_a_distillation_and_numbered_images() -> None:
    with pytest.raises(UsageError, match=r"cache_teacher=True, but kd_weight is 0; set it above 0, or leave out cache"):
        _distilling(digits_representation(), cache_teacher=True, kd_weight=0.0, cross_entropy_weight=1.0)
    images, labels = torch.rand(4, 1, 8, 8), torch.zeros(4).long()
    with pytest.raises(UsageError, match=r"cache_teacher needs training images, and `fit` was given no datamodule"):
        _first_step(_distilling(digits_representation(), cache_teacher=True), images, labels)


def test_a_module_after_one_with_a_cached_teacher_gets_images_and_labels() -> None:
    data = DigitsDataModule(batch_size=500)
    quiet_trainer(max_steps=1).fit(_distilling(digits_representation(), cache_teacher=True), datamodule=data)
    original = OriginalModule(Original("digits_resnet8"), optimizer=_adam)
    quiet_trainer(max_steps=1).fit(original, datamodule=data)
    assert not data.numbered


def test_the_default_loss_is_distillation_alone() -> None:
    terms = _first_step(_distilling(digits_representation()), torch.rand(4, 1, 8, 8), torch.zeros(4).long())
    assert {name for name in terms if name.startswith("train/")} == {"train/kd", "train/loss"}


def test_every_predicted_kernel_carries_gradients() -> None:
    representation = digits_representation()
    table = representation.target.clone().requires_grad_()  # real weights: a random network has dead channels
    images = torch.rand(64, 1, 8, 8)
    representation(images, representation.layout.weights(table)).square().sum().backward()
    assert table.grad is not None
    assert (table.grad.flatten(1).norm(dim=1) > 0).float().mean() > 0.95


def test_bf16_is_close_to_fp32() -> None:
    images, labels = torch.rand(16, 1, 8, 8), torch.zeros(16).long()
    terms = [
        _first_step(_distilling(digits_representation(), precision=p), images, labels)["train/kd"]
        for p in ("fp32", "bf16")
    ]
    assert terms[1] == pytest.approx(terms[0], rel=0.05)


def test_neither_the_original_nor_the_teacher_changes_or_is_stored() -> None:
    teacher = Original("digits_resnet8", pretrained=True)
    module = DecoupledDistill(
        digits_representation(), optimizer=_adam, teacher=teacher, reconstruction=ReconstructionPhase(2)
    )
    networks = (teacher, module.representation.original)
    before = [network.fingerprint() for network in networks]
    module.train()
    quiet_trainer(max_steps=4).fit(module, datamodule=DigitsDataModule(batch_size=64))
    assert [network.fingerprint() for network in networks] == before
    for network in networks:
        assert not network.training
        assert not any(p.requires_grad for p in network.parameters())
    stored = [key for key in module.state_dict() if not key.startswith("metrics.")]
    assert all(key.startswith("representation.") and ".original." not in key for key in stored)
    module.load_state_dict(module.state_dict())


def test_a_teacher_of_other_classes_or_without_weights_is_refused() -> None:
    other = Original("digits_resnet8", num_classes=7)
    with pytest.raises(UsageError, match=r"the teacher 'digits_resnet8' has random weights; pass --model.teacher"):
        DecoupledDistill(digits_representation(), optimizer=_adam, reconstruction=ReconstructionPhase(1), teacher=other)
    other.weights_from = "a test"
    with pytest.raises(UsageError, match="the teacher 'digits_resnet8' has 7 classes, the original 'digits_resnet8'"):
        DecoupledDistill(digits_representation(), optimizer=_adam, reconstruction=ReconstructionPhase(1), teacher=other)


def test_noise_distils_and_reads_no_image() -> None:
    data = DigitsDataModule(train_on="noise", batch_size=8, steps_per_epoch=2)
    trainer = quiet_trainer(max_steps=2)
    trainer.fit(_distilling(digits_representation()), datamodule=data)
    assert trainer.global_step == 2
    assert "train" not in data.sources


def test_noise_has_no_labels() -> None:
    module = _distilling(digits_representation(), cross_entropy_weight=1.0)
    with pytest.raises(UsageError, match="cross_entropy_weight needs labels"):
        quiet_trainer(max_steps=1).fit(module, datamodule=DigitsDataModule(train_on="noise", batch_size=8))


def test_mirror_images_need_a_distillation() -> None:
    with pytest.raises(UsageError, match=r"teacher_flip=True, but kd_weight is 0; set it above 0"):
        _distilling(digits_representation(), teacher_flip=True, kd_weight=0.0, cross_entropy_weight=1.0)


def test_a_teacher_without_a_distillation_is_refused() -> None:
    representation, options = digits_representation(), {"teacher": digits_representation().original, "kd_weight": 0.0}
    with pytest.raises(UsageError, match=r"a teacher is given, but kd_weight is 0; set it above 0"):
        _distilling(representation, cross_entropy_weight=1.0, **options)
    with pytest.raises(UsageError, match=r"a teacher is given, but kd_weight is 0; set it above 0"):
        BaselineJoint(representation, _adam, **options)


def test_there_must_be_a_phase_1_and_something_to_learn() -> None:
    with pytest.raises(UsageError, match="Decoupled-distill has no phase 1"):
        quiet_trainer(max_steps=1).fit(
            DecoupledDistill(digits_representation(), optimizer=_adam), datamodule=DigitsDataModule()
        )
    with pytest.raises(UsageError, match=r"the run ends after 4 steps, within phase 1 \(reconstruction.steps=4\)"):
        quiet_trainer(max_steps=4).fit(
            DecoupledDistill(digits_representation(), optimizer=_adam, reconstruction=ReconstructionPhase(4)),
            datamodule=DigitsDataModule(),
        )
    with pytest.raises(UsageError, match="are all 0; set at least one of them above 0"):
        DecoupledDistill(digits_representation(), optimizer=_adam, reconstruction=ReconstructionPhase(1), kd_weight=0.0)
    with pytest.raises(UsageError, match="neither a representation nor a checkpoint"):
        DecoupledDistill(optimizer=_adam, reconstruction=ReconstructionPhase(1))


def test_phase_1_is_recon_only_and_phase_2_has_its_own_optimizer() -> None:
    alone = run(["fit", *QUICK, "--trainer.max_steps=3", "--trainer.num_sanity_val_steps=0"])
    cli = run(["fit", *QUICK_DECOUPLED, "--trainer.max_epochs=2", "--trainer.num_sanity_val_steps=0"])
    losses = {}
    for name, fitted in (("alone", alone), ("both", cli)):
        events = fitted.trainer.logger.experiment
        events.flush()
        losses[name] = _curve(Path(fitted.trainer.log_dir), "train/recon")
    assert losses["both"][:3] == losses["alone"][:3]
    recon, distill = (fitted.trainer.optimizers[0] for fitted in (alone, cli))
    assert (recon.param_groups[0]["momentum"], distill.param_groups[0]["momentum"]) == (0.9, 0.95)
    assert cli.model.stage == 1
    (schedule,) = cli.trainer.lr_scheduler_configs
    assert schedule.scheduler.total_steps == 1


def _curve(folder: Path, tag: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars(tag)]


def test_init_from_brings_everything_and_its_fit_stands_alone(tmp_path: Path) -> None:
    first = run(["fit", *QUICK])
    checkpoint = Path(first.trainer.log_dir) / "checkpoints" / "last.ckpt"
    config = tmp_path / "distill.yaml"
    config.write_text(
        f"""
base: [{CONFIGS / "base" / "images.yaml"}]
model:
  class_path: DecoupledDistill
  init_args: {{optimizer: {{class_path: torch.optim.Adam, init_args: {{lr: 0.001}}}}}}
data: {{init_args: {{batch_size: 500, pad_crop: 0, flip: false}}}}
trainer: {{max_epochs: 0, logger: {{init_args: {{name: distill}}}}}}
"""
    )
    module = DecoupledDistill(init_from=str(checkpoint), optimizer=_adam)
    for key, value in first.model.representation.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(module.representation.state_dict()[key], value), key
    line = ["-c", str(config), *QUICK[5:]]
    run(["fit", *line, f"--model.init_from={checkpoint}", "--trainer.max_epochs=1"])
    checkpoint.unlink()
    tested = run(["test", *line, "--ckpt_path=last"])
    assert "test/acc" in tested.trainer.callback_metrics
    resumed = run(["fit", *line, "--ckpt_path=last", "--trainer.max_epochs=2"])
    assert resumed.trainer.global_step == 4


def test_init_from_must_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first = run(["fit", *QUICK])
    checkpoint = Path(first.trainer.log_dir) / "checkpoints" / "last.ckpt"
    line = ["fit", *QUICK_DECOUPLED, f"--model.init_from={checkpoint}"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*line, "--model.representation.predictor.hidden=9"])
    assert "was fitted with another representation" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*line[:-1], f"--model.init_from={tmp_path / 'no.ckpt'}"])
    assert "no checkpoint at" in capsys.readouterr().err
    torch.save({"state_dict": {}}, tmp_path / "empty.ckpt")
    with pytest.raises(CheckpointError, match="holds no representation"):
        DecoupledDistill(optimizer=_adam, init_from=str(tmp_path / "empty.ckpt"))
    torch.save({"state_dict": ReconOnly(digits_representation(), _adam).state_dict()}, tmp_path / "library.ckpt")
    with pytest.raises(CheckpointError, match="does not say how its representation is built"):
        DecoupledDistill(optimizer=_adam, init_from=str(tmp_path / "library.ckpt"))


def test_phase_2_starts_from_the_quantized_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    original = digits_representation().original
    representation = Representation(original, MLP(8), quantize=Quantize(6.0))
    module = DecoupledDistill(
        representation, optimizer=_adam, reconstruction=ReconstructionPhase(steps=3), precision="fp32"
    )
    trainer = quiet_trainer(max_steps=5)
    steps: list[int] = []
    monkeypatch.setattr(representation.predictor, "start_stage", lambda: steps.append(trainer.global_step))
    batch = torch.rand(4, 1, 8, 8), torch.randint(0, 10, (4,))
    trainer.fit(module, DataLoader([batch] * 5, batch_size=None))  # type: ignore[arg-type]
    assert steps == [3]
