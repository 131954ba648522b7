"""Progressive (arXiv 2407.00356, section 3.1): each round fits the weights that the previous round reconstructed.

A round runs several trials that differ by seed only; the one with the best validation accuracy is the round's winner,
and its kernels are the next round's target. Without images it is the one with the smallest error. All rounds are stages
of one fit.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, final

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer

from nernlit.errors import UsageError
from nernlit.kernels import Sampling, derive_seed
from nernlit.losses import reconstruction_rmse
from nernlit.predictors import PredictorEnsemble
from nernlit.representation import Representation, load_representation
from nernlit.training.measurements import Networks
from nernlit.training.objectives import Reconstruction, ReconstructionLoss
from nernlit.training.optimization import refuse_averaging
from nernlit.training.plan import Plan
from nernlit.training.recovery import OnDivergence
from nernlit.training.scheme import Precision, Scheme
from nernlit.training.sensitivity import NO_SENSITIVITY, Sensitivity
from nernlit.training.stages import Stage


@dataclass(frozen=True)
class Round:
    """The result of a round.

    Attributes:
        round: Its number, from 1.
        trial: The winner's number, from 0.
        val_acc: The winner's validation accuracy; None without images.
        val_acc_trials: The validation accuracy of every trial; None for one that has diverged, and without images.
        recon_rmse: The winner's distance from the original, in weight units.
        round_rmse: Its distance from the round's own target.
        improved: Whether the round gained more than `min_delta` over the previous round.
    """

    round: int
    trial: int
    val_acc: float | None
    val_acc_trials: list[float | None]
    recon_rmse: float
    round_rmse: float
    improved: bool

    @property
    def score(self) -> float:
        """The accuracy; without images, minus the distance from the round's target."""
        return -self.round_rmse if self.val_acc is None else self.val_acc


@final
class Progressive(Scheme):
    """One stage per round: several trials reconstruct the weights of the previous round's winner.

    After each validation, the representation has the predictor of the trial that was best in it.

    A round has `max_epochs / rounds` epochs and ends with a validation.

    Args:
        representation: The representation to train; all trials have its predictor's architecture. None for the one in
            `init_from`.
        optimizer: Creates each round's optimizer from the parameters of all trials.
        scheduler: Creates each round's learning-rate schedule.
        init_from: File of an earlier fit whose reconstructed kernels are round 1's target; by default the original's
            kernels are.
        rounds: Largest number of rounds.
        trials: Trials per round.
        min_delta: The fit ends after the first round whose validation accuracy is not more than this above the previous
            round's (a fraction, 0.01 is one point). Without images the decrease of `round_rmse` is compared. None: all
            rounds are run.
        sampling: Chooses the kernels of each step, the same ones for all trials.
        loss: `mse`, or `rmse` as in NeRN's code.
        precision: Precision of the predictors in training steps, `bf16` or `fp32`.
        sensitivity: How much the error of each weight counts, the same in all rounds.
        on_divergence: `stop`, or `restart` from the last good state with half the learning rate; see `Scheme`.
    """

    def __init__(
        self,
        representation: Representation | None = None,
        *,
        optimizer: OptimizerCallable,
        scheduler: LRSchedulerCallable | None = None,
        init_from: str | None = None,
        rounds: int = 5,
        trials: int = 3,
        min_delta: float | None = 0.0,
        sampling: Sampling | None = None,
        loss: ReconstructionLoss = "mse",
        precision: Precision = "fp32",
        sensitivity: Sensitivity = NO_SENSITIVITY,
        on_divergence: OnDivergence = "stop",
    ) -> None:
        if rounds < 1 or trials < 1:
            raise UsageError(f"rounds={rounds}, trials={trials}; expected at least 1 of both.")
        if min_delta is not None and not math.isfinite(min_delta):
            raise UsageError(f"min_delta={min_delta}; expected a finite number, or null never to end early.")
        representation, rebuilt = load_representation(init_from, representation)
        stage = Stage(Reconstruction(sampling, loss), optimizer, scheduler)
        super().__init__(representation, [stage] * rounds, precision, rebuilt, None, sensitivity, on_divergence)
        self.rounds, self.trials, self.min_delta = rounds, trials, min_delta
        self.ended: list[Round] = []
        self._is_begun = False
        self.trial_predictors = PredictorEnsemble(representation.predictor, trials)
        target_NKK = representation.target.clone() if init_from is None else self._reconstructed()
        self._first_target = None if init_from is None else target_NKK
        self._start_round(target_NKK)

    round_target: Tensor

    @property
    def target(self) -> Tensor:
        return self.round_target

    @property
    def ensemble(self) -> PredictorEnsemble:
        return self.trial_predictors

    @property
    def curve(self) -> str:
        return f"recon_round_{self.round}"

    def trained_parameters(self) -> Iterable[Parameter]:
        return self.trial_predictors.parameters()

    def lr_multipliers(self) -> dict[Parameter, float]:
        ratios = self.representation.predictor.lr_multipliers()
        return {
            each.get_parameter(name): ratio for each in self.trial_predictors.each for name, ratio in ratios.items()
        }

    @property
    def round(self) -> int:
        """Number of the current round, from 1."""
        return self.stage + 1

    @property
    def round_is_over(self) -> bool:
        """Whether the running round has made its last step."""
        return self.trainer.global_step == self.round * self._round_steps

    @property
    def _round_steps(self) -> int:
        epochs = (self.trainer.max_epochs or 0) // self.rounds
        return epochs * math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)

    @classmethod
    def check_plan(cls, plan: Plan, options: Any) -> None:
        epochs, every, rounds = plan.max_epochs or 0, plan.check_val_every_n_epoch, options.rounds
        if plan.is_trial and rounds > 1:
            raise UsageError(
                f"--trainer.fast_dev_run has one epoch, and the {rounds} rounds have at least one each; pass "
                "--model.rounds 1 with it."
            )
        if not epochs or epochs % rounds or (epochs // rounds) % every:
            raise UsageError(
                f"max_epochs={epochs}, rounds={rounds}, check_val_every_n_epoch={every}: a round must have "
                "a whole number of epochs and end with a validation; "
                "pass epochs that rounds * check_val_every_n_epoch divides."
            )

    def setup(self, stage: str) -> None:
        super().setup(stage)
        is_begun = self._is_begun or self.ended  # by an earlier fit, of this process or of a checkpoint
        if stage == "fit" and self.trainer.ckpt_path is None and is_begun and not self.trainer.global_step:
            self.ended = []
            first_NKK = self.representation.target if self._first_target is None else self._first_target
            self._start_round(first_NKK.to(self.round_target.device, copy=True))
        self._is_begun |= stage == "fit"
        # It is copied from the best trial and not trained itself; DDP would wait for its gradients.
        self.representation.predictor.requires_grad_(stage != "fit" or self.trainer.world_size == 1)
        if stage == "fit" and self.trainer.check_val_every_n_epoch is None:
            raise UsageError(
                "--trainer.check_val_every_n_epoch null: Progressive chooses a round's winner in a validation at the "
                "end of its last epoch; pass a number of epochs."
            )
        if stage == "fit" and self.trainer.limit_val_batches == 0:
            raise UsageError("limit_val_batches=0: Progressive chooses a round's winner in a validation; leave it out.")
        callbacks = getattr(self.trainer, "callbacks", [])
        between = [
            each
            for each in callbacks
            if isinstance(each, ModelCheckpoint) and (each._every_n_train_steps or each._train_time_interval)
        ]
        if stage == "fit" and between:
            raise UsageError(
                "every_n_train_steps and train_time_interval of a checkpoint: one after the last step of a round would "
                "have no result of the round; Progressive saves after each validation. Leave them out."
            )
        if stage == "fit":
            refuse_averaging(self.trainer, "the representation over trials and rounds; choose another scheme")

    def on_train_start(self) -> None:
        super().on_train_start()
        batches, every = self.trainer.num_training_batches, self.trainer.val_check_batch
        if batches == math.inf:
            raise UsageError(
                "the training data loader has no length, and Progressive's rounds have a whole number of epochs; pass "
                "--trainer.limit_train_batches N."
            )
        if every is None or batches % every:
            raise UsageError(
                f"--trainer.val_check_interval {self.trainer.val_check_interval}: Progressive chooses a round's winner "
                f"in a validation after the last of the {batches} batches of an epoch; leave it out, or pass a divisor."
            )
        if self.trainer.val_dataloaders is None:  # Lightning reads them when an epoch with a validation starts
            self.trainer.validating = True
            with suppress(MisconfigurationException):  # there are none
                self.trainer.fit_loop.epoch_loop.val_loop.setup_data()
            self.trainer.training = True
        if not sum(self.trainer.num_val_batches):
            raise UsageError(
                "Progressive chooses a round's winner in a validation, and there is no validation data; pass it to "
                "`fit`, or datamodule=NoImages() to choose by the error of the weights."
            )
        # A fit that ended early and is resumed ends again. A round whose last validation was interrupted has no result.
        progress = self.trainer.fit_loop.epoch_loop.val_loop.batch_progress.current
        if self.round_is_over and progress.ready == progress.completed and not self.ended[-1].improved:
            self.trainer.should_stop = True
            rank_zero_only(print)(
                f"The fit ended after round {self.round}, whose gain was not above min_delta. To continue, pass a "
                "smaller --model.min_delta, or null.",
                flush=True,
            )

    def on_validation_end(self) -> None:
        fits = self.trainer.state.fn == "fit" and not self.trainer.sanity_checking
        if fits and self.round_is_over and not self.ended[-1].improved:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        super().on_train_end()
        if not self.round_is_over and not self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            rank_zero_warn(
                f"The fit ended within round {self.round}, so the weights are those of an unfinished fit. Without the "
                "limit that ended it, --ckpt_path last continues it."
            )

    def teardown(self, stage: str) -> None:
        self.representation.predictor.requires_grad_()

    def stage_starts(self) -> Sequence[int]:
        return [number * self._round_steps for number in range(1, self.rounds)]

    def start_stage(self) -> None:
        self._start_round(self._reconstructed())

    def _start_round(self, target_NKK: Tensor) -> None:
        self.set_constant("round_target", target_NKK)
        self._measure_target()
        self._start_trials()

    def _measure_target(self) -> None:
        self.norms_N = self.round_target.flatten(1).norm(dim=1).cpu()

    def on_predictor_fitted(self) -> None:
        super().on_predictor_fitted()
        for trial in self.trial_predictors.each:  # so that the trials keep the codes of the new fit
            trial.load_state_dict(self.representation.predictor.state_dict())
        self._start_trials()

    def _start_trials(self) -> None:
        self.trial_predictors.reset(*(derive_seed(self.seed, self.stage, trial) for trial in range(self.trials)))

    @torch.no_grad()
    def _reconstructed(self) -> Tensor:
        """The table (N, K, K) of the representation's weights; zero outside the crop of smaller kernels."""
        representation = self.representation
        return representation.layout.table(representation.weights(), representation.predictor.block)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the gradients of each trial separately, as if it were trained alone."""
        if not gradient_clip_val or gradient_clip_val < 0:  # as in Lightning
            return
        clip = clip_grad_value_ if gradient_clip_algorithm == "value" else clip_grad_norm_
        for trial in self.trial_predictors.each:
            clip(trial.parameters(), gradient_clip_val)

    def diverged(self, state: Mapping[str, Any]) -> list[str]:
        found = super().diverged(state)
        prefixes = [f"trial_predictors.each.{trial}." for trial in range(self.trials)]
        if all(any(name.startswith(prefix) for name in found) for prefix in prefixes):
            return found
        return [name for name in found if not name.startswith("trial_predictors.")]

    def refuse_unusable(self, stage: str, suffixes: Sequence[str]) -> None:
        lost = {f"_trial_{trial}" for trial in range(self.trials)}
        super().refuse_unusable(stage, suffixes if lost <= set(suffixes) else sorted(set(suffixes) - lost))

    def measured(self, suffixes: Iterable[str], unusable: Sequence[str]) -> list[str]:
        lost = {f"_trial_{trial}" for trial in range(self.trials)} & set(unusable)
        kept = [suffix for suffix in suffixes if suffix not in lost]
        return kept if any(suffix.startswith("_trial_") for suffix in kept) else super().measured(suffixes, unusable)

    def predicted_networks(self) -> Networks:
        if self.trainer.state.fn != "fit":
            return super().predicted_networks()
        trials = enumerate(self.trial_predictors.each)
        return {f"_trial_{number}": self.representation.weights(trial) for number, trial in trials}

    def log_results(self, stage: str, results: Mapping[str, Tensor]) -> None:
        if self.trainer.state.fn != "fit":
            super().log_results(stage, results)
            return
        layout, measured = self.representation.layout, self.measurements.networks
        networks = [layout.vector(weights) for weights in measured.values()]
        target = layout.vector(layout.weights(self.round_target))
        original = layout.vector(self.representation.original_weights())
        accs = {
            trial: float(results[name]) for trial in range(self.trials) if (name := f"acc_trial_{trial}") in results
        }
        rmses = [float(reconstruction_rmse(network, target)) for network in networks]
        usable = accs or [trial for trial, rmse in enumerate(rmses) if math.isfinite(rmse)]  # no images, no accuracies
        leader = max(usable, key=lambda trial: (accs.get(trial, 0.0), -rmses[trial]))
        self.representation.predictor.load_state_dict(self.trial_predictors.each[leader].state_dict())
        measured[""] = measured[f"_trial_{leader}"]
        everything = dict(results)
        if accs:
            everything |= {name: results[f"{name}_trial_{leader}"] for name in ("acc", "acc_top5")}
            everything[f"acc_round_{self.round}"] = everything["acc"]
        everything["round_rmse"] = torch.tensor(rmses[leader])
        if not self.trainer.sanity_checking:
            distance = float(reconstruction_rmse(networks[leader], original))
            of_trials = [accs.get(trial) for trial in range(self.trials)]
            record = Round(self.round, leader, accs.get(leader), of_trials, distance, rmses[leader], improved=True)
            # Each validation replaces the record of the current round; the last one is kept.
            self.ended[self.round - 1 :] = [record]
            self.ended = self._judged(self.ended)
        super().log_results(stage, everything)

    def _judged(self, ended: Sequence[Round]) -> list[Round]:
        """The rounds, each with whether it gained more than `min_delta`."""
        least = -math.inf if self.min_delta is None else self.min_delta
        gains = [math.inf, *(after.score - before.score for before, after in pairwise(ended))]
        return [replace(each, improved=gain > least) for each, gain in zip(ended, gains, strict=False)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["rounds"] = [asdict(ended) for ended in self.ended]
        checkpoint["round_target"] = self.round_target

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.ended = self._judged([Round(**ended) for ended in checkpoint["rounds"]])  # `min_delta` may have changed
        self.set_constant("round_target", checkpoint["round_target"].to(self.round_target.device))
        self._measure_target()
