"""Clean, corrupted and attacked accuracy in one `lightning test`, against a slow walk over the images."""

import csv
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from nernlit.analysis import Attack, layer_energies
from nernlit.callbacks import AdversarialAccuracy, LayerDifference, LowFrequencyEnergy, Throughput
from nernlit.cli.main import run
from nernlit.data import DigitsDataModule, EvalSet
from nernlit.data.corruptions import corrupt
from nernlit.errors import UsageError
from nernlit.originals import Original
from nernlit.predictors import Quantize, Table
from nernlit.representation import Representation
from nernlit.training import DecoupledDistill, OriginalModule, ReconOnly
from tests.fakes import CONFIGS, QUICK, quiet_trainer, tiny_original, tiny_representation

MORE = """
data:
  init_args:
    eval_sets:
    - class_path: Corrupted
      init_args: {corruptions: [gaussian_noise, contrast], severities: [2, 4]}
trainer:
  callbacks:
  - class_path: AdversarialAccuracy
    init_args: {fgsm_255: [1, 8], ifgsm_255: [4], steps: 3}
  - class_path: LowFrequencyEnergy
  - class_path: LayerDifference
"""


def test_one_run_measures_clean_corrupted_and_attacked_images(capsys: pytest.CaptureFixture[str]) -> None:
    Path("more.yaml").write_text(MORE)
    run(["fit", *QUICK, "-c", "more.yaml"])
    cli = run(["test", *QUICK, "-c", "more.yaml", "--ckpt_path", "last"])
    logged = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    representation = cli.model.representation
    clean = cli.datamodule.sources["test"]
    weights = {key: value.detach() for key, value in representation.weights().items()}
    networks = {"": lambda x: representation(x, weights), "_original": representation.original}
    for suffix, classify in networks.items():

        def accuracy(pixels: torch.Tensor, classify=classify) -> float:  # type: ignore[no-untyped-def]
            with torch.no_grad():
                return float((classify(pixels.float() / 255).argmax(1) == clean.labels).float().mean())

        of_conditions = []
        for name in ("gaussian_noise", "contrast"):
            for severity in (2, 4):
                pixels = corrupt(clean.images, name, severity, 0, range(len(clean)))
                of_conditions.append(accuracy(pixels))
                assert logged[f"test/acc_corrupted_{name}_{severity}{suffix}"] == pytest.approx(of_conditions[-1])
        assert logged[f"test/acc_corrupted{suffix}"] == pytest.approx(sum(of_conditions) / 4)
        assert logged[f"test/acc{suffix}"] == pytest.approx(accuracy(clean.images))
        for name, attack in (("fgsm_1", Attack(1)), ("fgsm_8", Attack(8)), ("ifgsm_4", Attack(4, steps=3))):
            attacked = attack(classify, clean.images.float() / 255, clean.labels)
            assert logged[f"test/acc_{name}{suffix}"] == pytest.approx(accuracy(255 * attacked), abs=0.003)
    shown = " ".join(capsys.readouterr().out.split())
    for condition in ("corrupted", "fgsm_1", "fgsm_8", "ifgsm_4"):
        figures = logged[f"test/acc_{condition}"], logged[f"test/acc_{condition}_original"]
        assert f"accuracy, {condition} {figures[0]:.2%} (original {figures[1]:.2%})" in shown
    assert "corrupted_contrast" not in shown
    _check_tables(Path(cli.trainer.log_dir), representation)
    cli = run(["test", *QUICK, "-c", str(CONFIGS / "base" / "robustness.yaml"), "--ckpt_path", "last"])
    assert len(cli.datamodule.conditions) == 45
    assert {"test/acc_corrupted", "test/acc_ifgsm_0.25_original"} <= cli.trainer.callback_metrics.keys()


def _check_tables(folder: Path, representation: object) -> None:
    with (folder / "low_frequency_energy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    energies = layer_energies(representation)  # type: ignore[arg-type]
    assert [row["layer"] for row in rows] == [energy.name for energy in energies]
    for row, energy in zip(rows, energies, strict=True):
        assert float(row["difference"]) == pytest.approx(energy.reconstructed - energy.original, abs=1e-6)
    with (folder / "layer_difference.csv").open(newline="") as file:
        assert next(iter(csv.DictReader(file))).keys() == {"layer", "rmse", "explained_power"}


def test_answers_are_chosen_among_the_classes_that_occur() -> None:
    class OddOnly(EvalSet):
        name = "odd"
        classes = torch.tensor([1, 3, 5, 7, 9])

        def conditions(self, clean, num_classes):  # type: ignore[no-untyped-def]
            return {"digits": clean.subset((clean.labels % 2 == 1).nonzero()[:, 0])}

    data = DigitsDataModule(eval_sets=[OddOnly()])
    module = ReconOnly(tiny_representation(), optimizer=torch.optim.Adam)
    trainer = quiet_trainer()
    trainer.test(module, data, verbose=False)
    source = data.conditions[0].source
    logits = module.representation.original(source.images.float() / 255).detach()
    even = [0, 2, 4, 6, 8]
    logits[:, even] = -torch.inf
    expected = float((logits.argmax(1) == source.labels).float().mean())
    assert float(trainer.callback_metrics["test/acc_odd_digits_original"]) == pytest.approx(expected)


@pytest.mark.parametrize("quantize", [None, Quantize(6.0)])
def test_layers_are_followed_over_a_fit(quantize: Quantize | None, tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    trainer = quiet_trainer(
        max_epochs=2,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[LowFrequencyEnergy(), LayerDifference(), Throughput(every_n_steps=2)],
    )
    module = ReconOnly(tiny_representation(quantize=quantize), optimizer=torch.optim.Adam)
    trainer.fit(module, DigitsDataModule(train_on="none", steps_per_epoch=5))
    assert {path.name for path in Path(logger.log_dir).glob("*.csv")} >= {
        "low_frequency_energy.csv",
        "layer_difference.csv",
    }
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("throughput")}
    kernels = min(module.stages[0].objective.sampling.batch_size, module.representation.layout.num_kernels)
    assert figures["throughput/kernels_per_s"] == pytest.approx(kernels * figures["throughput/steps_per_s"])
    assert 0 < figures["throughput/share_of_matrix_products"] < 1


def test_throughput_counts_a_quantized_predictor_of_many_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nernlit.coding.prediction._MAX_UNCHUNKED", 10)
    representation = Representation(tiny_original(), Table(5), order="none", quantize=Quantize(4.0))
    module = DecoupledDistill(representation, optimizer=torch.optim.Adam)
    trainer = quiet_trainer(max_steps=2, callbacks=[Throughput(every_n_steps=1)], limit_val_batches=0)
    trainer.fit(module, DigitsDataModule(batch_size=8))
    figures = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("throughput")}
    kernels = representation.layout.num_kernels
    assert figures["throughput/kernels_per_s"] >= 0.99 * kernels * figures["throughput/steps_per_s"]


def test_modules_without_a_representation_are_left_alone() -> None:
    module = OriginalModule(tiny_original(), optimizer=torch.optim.Adam)
    trainer = quiet_trainer(callbacks=[LowFrequencyEnergy()])
    trainer.test(module, DigitsDataModule(), verbose=False)
    assert "test/acc" in trainer.callback_metrics
    assert not list(Path().rglob("low_frequency_energy.csv"))


def test_a_test_after_an_aborted_one_attacks_its_own_networks() -> None:
    class Abort(L.Callback):
        def on_test_batch_end(self, *_: object) -> None:
            raise ConnectionAbortedError

    callback = AdversarialAccuracy(fgsm_255=[8], ifgsm_255=[])
    modules = [ReconOnly(tiny_representation(seed), optimizer=torch.optim.Adam) for seed in (0, 1)]
    with pytest.raises(ConnectionAbortedError):
        quiet_trainer(callbacks=[callback, Abort()]).test(modules[0], DigitsDataModule(), verbose=False)
    assert not callback._networks
    figures = []
    for each in (callback, AdversarialAccuracy(fgsm_255=[8], ifgsm_255=[])):
        trainer = quiet_trainer(callbacks=[each])
        trainer.test(modules[1], DigitsDataModule(), verbose=False)
        figures.append({name: float(value) for name, value in trainer.callback_metrics.items() if "fgsm" in name})
    assert figures[0] == figures[1]
    assert len(figures[0]) == 2


def test_images_that_an_attack_does_not_move_are_reported() -> None:
    representation = tiny_representation()
    with torch.no_grad():
        representation.original.net.get_submodule("head").weight.zero_()  # logits that depend on no pixel
    module = ReconOnly(representation, optimizer=torch.optim.Adam)
    trainer = quiet_trainer(callbacks=[AdversarialAccuracy(fgsm_255=[1], ifgsm_255=[])])
    with pytest.warns(UserWarning, match="did not change") as caught:
        trainer.test(module, DigitsDataModule(), verbose=False)
    said = [str(warning.message) for warning in caught if "did not change" in str(warning.message)]
    assert [line.split(":")[1].split(" is zero")[0] for line in said] == [
        " the gradient of the reconstructed network",
        " the gradient of the original network",
    ]


def test_a_strength_that_is_given_twice_is_refused() -> None:
    with pytest.raises(UsageError, match=r"fgsm_255=\[1, 1\], ifgsm_255=\[\]: give every strength only once"):
        AdversarialAccuracy(fgsm_255=[1, 1], ifgsm_255=[])
    with pytest.raises(UsageError, match=r"steps=1; expected at least 2"):
        AdversarialAccuracy(steps=1)


def test_an_original_is_attacked_too() -> None:
    module = OriginalModule(Original("digits_resnet8", pretrained=True), torch.optim.SGD)
    trainer = quiet_trainer(callbacks=[AdversarialAccuracy(fgsm_255=[8.0], ifgsm_255=[])])
    (results,) = trainer.test(module, datamodule=DigitsDataModule(), verbose=False)
    assert results["test/acc_fgsm_8"] < results["test/acc"] - 0.03
    assert "test/acc_fgsm_8_original" not in results


def test_a_warning_names_the_network_that_an_attack_did_not_change() -> None:
    original = Original("digits_resnet8", pretrained=True)
    with torch.no_grad():
        original.net.get_classifier().weight.zero_()  # type: ignore[operator]
    module = OriginalModule(original, torch.optim.SGD)
    trainer = quiet_trainer(callbacks=[AdversarialAccuracy(fgsm_255=[1], ifgsm_255=[])])
    with pytest.warns(UserWarning, match="original network"):
        trainer.test(module, datamodule=DigitsDataModule(), verbose=False)
