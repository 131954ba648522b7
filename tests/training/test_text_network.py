"""A network that is no image classifier is fitted, analyzed and stored by its weights alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import nernlit
from nernlit.analysis import layer_energies, layer_errors
from nernlit.cli.main import main
from nernlit.data import DigitsDataModule, NoImages
from nernlit.errors import DataError, UsageError
from nernlit.losses import reconstruction_rmse
from nernlit.originals import Original
from nernlit.predictors import MLP, Table
from nernlit.representation import Representation
from nernlit.representation.onnx import write_onnx
from nernlit.training import DecoupledDistill, OriginalModule, Progressive, ReconOnly
from tests.fakes import quiet_trainer

TOKENS = torch.randint(0, 20, (3, 7), generator=torch.Generator().manual_seed(0))


class TextNetwork(nn.Module):
    """A language model of one layer whose output weights are those of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 12)
        self.encoder = nn.TransformerEncoderLayer(12, nhead=2, dim_feedforward=18, batch_first=True)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.encoder(self.embedding(tokens)))
        return logits


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-2)


def _representation() -> Representation:
    torch.manual_seed(0)
    original = Original.from_module(TextNetwork())
    return Representation(original, MLP(8, depth=2, num_frequencies=4), layers="all_linear")


def test_recon_only_fits_and_measures_the_weights() -> None:
    representation = _representation()
    names = ["encoder.self_attn.in_proj_weight", "encoder.self_attn.out_proj", "encoder.linear1", "encoder.linear2"]
    assert [layer.name for layer in representation.layout.layers] == [*names, "embedding"]
    assert representation.layout.num_weights == 36 * 12 + 12 * 12 + 2 * 18 * 12 + 20 * 12
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(ReconOnly(representation, _adam), datamodule=NoImages(steps_per_epoch=5))
    assert trainer.global_step == 10
    assert float(trainer.callback_metrics["val/recon_rmse"]) > 0
    assert not [name for name in trainer.callback_metrics if "acc" in name]


def test_progressive_chooses_the_winner_of_a_round_by_its_error() -> None:
    representation = _representation()
    module = Progressive(representation, optimizer=_adam, rounds=3, trials=3, min_delta=None)
    trainer = quiet_trainer(max_epochs=3)
    trainer.fit(module, datamodule=NoImages(steps_per_epoch=5))
    assert [ended.round for ended in module.ended] == [1, 2, 3]
    assert all(ended.val_acc is None and ended.val_acc_trials == [None] * 3 for ended in module.ended)
    last = module.ended[-1]
    layout, target = representation.layout, representation.layout.weights(module.round_target)
    with torch.no_grad():
        rmses = [
            float(reconstruction_rmse(layout.vector(representation.weights(trial)), layout.vector(target)))
            for trial in module.trial_predictors.each
        ]
    assert last.trial == rmses.index(min(rmses))
    assert last.round_rmse == pytest.approx(min(rmses))
    winner = module.trial_predictors.each[last.trial].state_dict()
    assert all(torch.equal(value, winner[name]) for name, value in representation.predictor.state_dict().items())
    assert float(trainer.callback_metrics["val/recon_rmse"]) == pytest.approx(last.recon_rmse)
    assert not [name for name in trainer.callback_metrics if "acc" in name]


@pytest.mark.parametrize(("min_delta", "improved"), [(-1e9, [True] * 2), (1e9, [True, False])])
def test_progressive_compares_errors_of_rounds_with_min_delta(min_delta: float, improved: list[bool]) -> None:
    module = Progressive(_representation(), optimizer=_adam, rounds=2, trials=1, min_delta=min_delta)
    quiet_trainer(max_epochs=2).fit(module, datamodule=NoImages(steps_per_epoch=2))
    assert [ended.improved for ended in module.ended] == improved


def test_progressive_without_validation_data_says_what_to_pass() -> None:
    loader = DataLoader(range(3), batch_size=None)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"there is no validation data; pass it to `fit`, or datamodule=NoImages\(\)"):
        quiet_trainer(max_epochs=5).fit(Progressive(_representation(), optimizer=_adam), loader)


def test_its_spectrum_and_errors_have_one_entry_per_layer() -> None:
    representation = _representation()
    names = [layer.name for layer in representation.layout.layers]
    assert [energy.name for energy in layer_energies(representation)] == names
    assert [error.name for error in layer_errors(representation)] == names


@pytest.mark.parametrize("predictor", [MLP(8, depth=2, num_frequencies=4), Table(3)])
def test_it_is_saved_and_loaded_to_the_bit(
    tmp_path: Path, predictor: MLP | Table, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    original = Original.from_module(TextNetwork())
    representation = Representation(original, predictor, layers="all_linear")
    representation.save(tmp_path / "text.nern")
    loaded = nernlit.load(tmp_path / "text.nern", net=TextNetwork())
    stored = representation.reconstructed()
    assert all(torch.equal(value, stored[key]) for key, value in loaded.reconstructed().items())
    assert torch.equal(stored["head.weight"], stored["embedding.weight"])
    with torch.no_grad():
        assert torch.equal(loaded.module()(TOKENS), representation.module()(TOKENS))
        exact = torch.allclose(representation.module()(TOKENS), original.net(TOKENS), atol=1e-5)
    assert exact == isinstance(predictor, Table)
    main(["inspect", str(tmp_path / "text.nern")])
    assert "TextNetwork, no image classifier" in capsys.readouterr().out


def test_what_needs_images_or_classes_says_so(tmp_path: Path) -> None:
    representation = _representation()
    batch = (torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))
    loader = DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    needs = "needs an image classifier, but 'TextNetwork' was given without num_classes, mean and std"
    with pytest.raises(UsageError, match=f"a forward pass {needs}"):
        representation(batch[0])
    with pytest.raises(UsageError, match=f"an ONNX model of pixels {needs}"):
        write_onnx(representation, tmp_path / "text.onnx", 8)
    for module in (
        DecoupledDistill(representation, optimizer=_adam),
        OriginalModule(representation.original, _adam),
    ):
        with pytest.raises(UsageError, match=f"{type(module).__name__} to fit {needs}"):
            quiet_trainer(max_epochs=1).fit(module, loader, loader)
    for scheme in (ReconOnly, Progressive):
        with pytest.raises(UsageError, match=f"the accuracy on images {needs}"):
            quiet_trainer(max_epochs=5).fit(scheme(representation, optimizer=_adam), loader, loader)
    with pytest.raises(
        DataError, match="DigitsDataModule has images, but the original is no image classifier; use NoI"
    ):
        quiet_trainer(max_epochs=1).fit(ReconOnly(representation, _adam), datamodule=DigitsDataModule(train_on="none"))


@pytest.mark.parametrize("options", [{"num_classes": 10}, {"mean": [0.5], "std": [0.5]}, {"in_chans": 3}])
def test_half_a_classifier_is_refused(options: dict[str, object]) -> None:
    with pytest.raises(
        UsageError, match="an image classifier needs num_classes, mean and std; for any other network, pass none"
    ):
        Original.from_module(TextNetwork(), **options)  # type: ignore[arg-type]
