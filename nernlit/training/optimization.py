"""Creates the optimizer and the schedule that the options name, in the form that Lightning expects."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.nn import Parameter
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from nernlit.errors import UsageError


def build_optimizer(make: OptimizerCallable, parameters: Mapping[Parameter, float], options: str) -> Optimizer:
    """The optimizer of these parameters.

    Args:
        make: Makes it, from the list of parameters, or of groups of them where their rates differ.
        parameters: The trained parameters, and the ratio of the learning rate of each to the optimizer's. Steps apply
            it (`lr_ratio` of the group), so that schedules that set the rates of all groups alike keep it.
        options: Prefix of its options on the command line, for messages.

    Raises:
        UsageError: If it does not accept the options or the parameters, or the learning rate is not above 0.
    """
    # The first group has the optimizer's own rate where any has: schedules and messages take it as the reference.
    ratios = sorted(set(parameters.values()), key=lambda ratio: (ratio != 1.0, -ratio))
    groups = [{"params": [p for p, own in parameters.items() if own == ratio]} for ratio in ratios]
    try:
        optimizer = make(list(parameters) if ratios == [1.0] else groups)
    except (TypeError, ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())
        advice = "; timm.optim.Muon takes all of them" if "2D" in reason else ""
        raise UsageError(f"{options}.optimizer cannot be built: {reason}{advice}.") from error
    if isinstance(optimizer, SparseAdam):
        raise UsageError(f"{options}.optimizer SparseAdam needs sparse gradients, and these are dense; pass Adam.")
    if len(ratios) > 1 and getattr(optimizer, "schedules_itself", False):
        raise UsageError(
            f"{options}.optimizer {type(optimizer).__name__} has one learning rate for all parameters. Trained kept "
            "tensors (tune_kept) and step sizes (quantize) need rates of their own; pass another optimizer."
        )
    for group in optimizer.param_groups:
        rate = float(group.get("lr", 1.0))
        if not 0 < rate < math.inf:
            raise UsageError(f"lr={rate:g}; expected a finite learning rate above 0 ({options}.optimizer.lr).")
    for group in optimizer.param_groups:
        of_group = {parameters[parameter] for parameter in group["params"]}
        if len(of_group) > 1:
            raise UsageError(
                f"{options}.optimizer puts parameters with different learning rates into one group: the kept tensors "
                "that are trained (tune_kept) and step sizes (quantize) come as groups, which must stay separate."
            )
        if (ratio := next(iter(of_group), 1.0)) != 1.0:
            group["lr_ratio"] = ratio
    return optimizer


def build_schedule(make: LRSchedulerCallable, optimizer: Optimizer, trainer: Any, options: str) -> dict[str, Any]:
    """Lightning's description of the optimizer's schedule: stepped once per optimizer step.

    `ReduceLROnPlateau` is stepped after epochs that end with a validation, with the metric that it monitors.

    Raises:
        UsageError: If the scheduler does not accept its options, or monitors no metric.
    """
    try:
        schedule = make(optimizer)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise UsageError(f"{options}.scheduler cannot be built: {' '.join(str(error).split())}.") from error
    if not isinstance(schedule, LRScheduler):
        raise UsageError(
            f"{options}.scheduler made a {type(schedule).__name__}; expected a torch.optim.lr_scheduler.LRScheduler."
        )
    if not isinstance(schedule, ReduceLROnPlateau):
        return {"scheduler": schedule, "interval": "step"}
    monitor = getattr(schedule, "monitor", None)
    if monitor is None:
        raise UsageError(
            f"{options}.scheduler ReduceLROnPlateau does not say which metric it follows; "
            "pass lightning.pytorch.cli.ReduceLROnPlateau with monitor, for example val/acc and mode max."
        )
    frequency = trainer.check_val_every_n_epoch
    if frequency is None:
        raise UsageError(
            f"{options}.scheduler ReduceLROnPlateau is stepped at the end of epochs; "
            "pass a number as --trainer.check_val_every_n_epoch."
        )
    return {"scheduler": schedule, "monitor": monitor, "interval": "epoch", "frequency": frequency}


def relative_rate(optimizer: Optimizer) -> float:
    """The learning rate as a share of the highest one: the one that the optimizer was created with, or OneCycleLR's.

    Both are those of the first group, during a step.

    >>> import torch
    >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(()))], lr=0.5)
    >>> schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.25)
    >>> relative_rate(optimizer)
    0.25
    """
    group = optimizer.param_groups[0]
    initial = group.get("initial_lr", optimizer.defaults.get("lr", group["lr"]))
    return float(group["lr"]) / float(group.get("max_lr", initial) * group.get("lr_ratio", 1.0))


#: Callbacks of Lightning that do not work with the modules here -> what to do instead.
_UNSUPPORTED = {
    GradientAccumulationScheduler: "schedules need a fixed number of steps; pass --trainer.accumulate_grad_batches N",
    BatchSizeFinder: "pass a batch size (--data.batch_size)",
    LearningRateFinder: "compare learning rates with `nernlit search`",
    BackboneFinetuning: "the module chooses the parameters that are trained",
}


def refuse_callbacks(trainer: Any) -> None:
    """Refuse callbacks that the modules here do not work with.

    Raises:
        UsageError: If the trainer has one; the message says what to do instead.
    """
    for callback in trainer.callbacks:
        for kind, instead in _UNSUPPORTED.items():
            if isinstance(callback, kind):
                raise UsageError(f"{kind.__name__} does not work here: {instead}, and remove the callback.")
        if isinstance(callback, ModelPruning) and not callback._make_pruning_permanent:
            raise UsageError(
                "ModelPruning with make_pruning_permanent=False would write checkpoints that cannot be read; pass True."
            )


def refuse_callbacks_on_weights(trainer: Any) -> None:
    """Refuse callbacks that change weights after the last validation and the last checkpoint of a scheme.

    Raises:
        UsageError: If the trainer has one; the message says what to do instead.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            raise UsageError(
                "StochasticWeightAveraging averages after the last validation and checkpoint, so the average would be "
                "lost; pass EMAWeightAveraging, or the option ema of DecoupledDistill."
            )
        if isinstance(callback, ModelPruning):
            raise UsageError(
                "ModelPruning would prune the predictor's parameters after the last validation; prune the original, "
                "and pass keep_zeros: true for its representation."
            )


def refuse_stops_without_validation(trainer: Any) -> None:
    """Refuse callbacks that may end a fit after an epoch without validation: its last state would not be measured.

    Raises:
        UsageError: If the trainer has one.
    """
    every = trainer.check_val_every_n_epoch
    for callback in trainer.callbacks:
        early = isinstance(callback, EarlyStopping) and callback._check_on_train_epoch_end
        timed = isinstance(callback, Timer) and callback._interval == "epoch"
        if every != 1 and (early or timed):
            instead = "check_on_train_epoch_end: false" if early else "interval: step"
            raise UsageError(
                f"{type(callback).__name__} may end the fit after an epoch without validation (check_val_every_n_epoch "
                f"is {every}); pass {instead} to it, or --trainer.check_val_every_n_epoch 1."
            )


def refuse_averaging(trainer: Any, reason: str) -> None:
    """Refuse callbacks that average weights.

    Raises:
        UsageError: If the trainer has one; the message names it and says what it would average.
    """
    for callback in getattr(trainer, "callbacks", []):
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise UsageError(f"{type(callback).__name__} would average {reason}, or remove the callback.")
