"""Every shipped predictor is trained by every scheme, from the command line."""

import pytest
import torch

from nernlit.cli.main import run
from tests.fakes import CONFIGS, QUICK

PREDICTORS = {
    "codebooks": [
        "--model.representation.predictor=Codebooks",
        "--model.representation.predictor.codebooks=2",
        "--model.representation.predictor.bits=3",
        "--model.representation.predictor.scale=filter",
    ],
    "table": ["--model.representation.predictor=Table"],
    "quantized_table": [
        "--model.representation.predictor=Table",
        "--model.representation.predictor.scale=layer",
        "--model.representation.quantize.bits=3",
    ],
    "mlp_with_options": [
        "--model.representation.predictor.activation=sine",
        "--model.representation.predictor.residual=true",
        "--model.representation.predictor.heads=stage",
        "--model.representation.predictor.embedding=4",
        "--model.representation.predictor.embedding_share=layer",
    ],
    "quantized_mlp": ["--model.representation.quantize.bits=6", "--model.representation.quantize.per=row"],
}
SCHEMES = {
    "digits_h96": ["--data.steps_per_epoch=2"],
    "digits_h96_decoupled": ["--model.reconstruction.steps=2", "--data.batch_size=500"],
    "digits_h96_baseline": ["--model.warmup_steps=1", "--data.batch_size=500"],
    "digits_h128": ["--model.trials=2", "--model.rounds=2", "--data.steps_per_epoch=2"],
}


#: Each predictor and each scheme at least once; `make test-slow` has the other pairs.
FAST = {
    ("digits_h96", "mlp_with_options"),
    ("digits_h96", "quantized_table"),
    ("digits_h96_decoupled", "quantized_mlp"),
    ("digits_h96_decoupled", "codebooks"),
    ("digits_h96_baseline", "table"),
    ("digits_h96_baseline", "codebooks"),
    ("digits_h128", "quantized_table"),
    ("digits_h128", "codebooks"),
}
PAIRS = [(scheme, predictor) for scheme in SCHEMES for predictor in PREDICTORS]


@pytest.mark.parametrize(
    ("scheme", "predictor"),
    [pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow) for pair in PAIRS],
)
def test_a_scheme_trains_a_predictor_and_a_checkpoint_restores_it(scheme: str, predictor: str) -> None:
    fit = ["fit", "-c", str(CONFIGS / f"{scheme}.yaml"), *PREDICTORS[predictor], *SCHEMES[scheme], *QUICK[5:]]
    fit += ["--model.optimizer=torch.optim.Adam", "--model.optimizer.lr=0.001", "--trainer.check_val_every_n_epoch=1"]
    fit += ["--trainer.max_epochs=2"]
    fitted = run(fit)
    assert torch.isfinite(fitted.trainer.callback_metrics["train/loss"])
    tested = run(["test", *fit[1:], "--ckpt_path=last"])
    state = tested.model.representation.predictor.state_dict()
    for name, value in fitted.model.representation.predictor.state_dict().items():
        assert torch.equal(state[name], value), name
