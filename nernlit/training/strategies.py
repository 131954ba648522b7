"""Which of Lightning's strategies distribute a fit."""

from nernlit.errors import UsageError

#: Parts of the names of strategies that split a module's parameters over devices.
_SPLITTING = ("fsdp", "deepspeed", "modelparallel")
#: Parts of the names of strategies that start processes from a running Python session.
_FOR_SESSIONS = ("_spawn", "_fork", "_notebook")


def refuse_sharded_strategies(strategy: object) -> None:
    """Refuse a strategy in which no process has all parameters.

    Schemes predict whole networks, save whole predictors and compare losses between processes, so every process needs
    all parameters.

    Args:
        strategy: Lightning's name of it (`ddp`), its class path, or the object.

    Raises:
        UsageError: If it splits parameters over devices.
    """
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if any(part in name.lower().replace("_", "") for part in _SPLITTING):
        raise UsageError(
            f"--trainer.strategy {name} splits parameters over devices, and every process needs the whole predictor; "
            "pass ddp, which gives each device a copy."
        )


def refuse_sessions(strategy: object) -> None:
    """Refuse a strategy that starts processes from a running Python session, which a command is not.

    Args:
        strategy: See `refuse_sharded_strategies`.

    Raises:
        UsageError: If it does.
    """
    options = (strategy.get("init_args") if hasattr(strategy, "get") else None) or {}
    method = options.get("start_method", "popen")
    name = strategy if isinstance(strategy, str) else f"with start_method {method}"
    if method != "popen" or any(part in name for part in _FOR_SESSIONS):
        raise UsageError(
            f"--trainer.strategy {name} is for notebooks and Python sessions; pass ddp, which starts each process "
            "with the same command."
        )
