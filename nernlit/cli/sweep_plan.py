"""The fits of a sweep, and the command of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

from nernlit.cli.configs import config_fingerprint


class Fit(NamedTuple):
    """One fit of a sweep.

    Attributes:
        config: Its configuration: a file, or the name of a shipped one.
        hidden: The width that was asked for; None for the configuration's own.
        seed: Of the run.
    """

    config: str
    hidden: int | None
    seed: int

    @property
    def name(self) -> str:
        width = [] if self.hidden is None else [f"hidden {self.hidden}"]
        return ", ".join([Path(self.config).stem, *width, f"seed {self.seed}"])

    @property
    def folder_name(self) -> str:
        width = [] if self.hidden is None else [f"h{self.hidden}"]
        return "_".join([Path(self.config).stem, *width, f"seed{self.seed}"])


@final
@dataclass(frozen=True)
class Sweep:
    """What the fits of a sweep have in common.

    Attributes:
        out: Folder of the table, the figures and the fits.
        select: `best` or `last`, the checkpoint that is tested.
        fit_args: Further options of `nernlit fit`.
    """

    out: Path
    select: str
    fit_args: Sequence[str]

    def key(self, fit: Fit) -> dict[str, str]:
        """What identifies a fit: its options, and the contents of its configuration files."""
        return {
            "config": Path(fit.config).stem,
            "seed": str(fit.seed),
            "select": self.select,
            "settings": " ".join(self.fit_args),
            "asked_hidden": str(fit.hidden or ""),
            "files": config_fingerprint(["-c", fit.config, *self.fit_args]),
        }

    def options(self, fit: Fit) -> list[str]:
        """The options of `nernlit fit` for a fit."""
        logger = "--trainer.logger.init_args"
        width = [f"--model.init_args.representation.predictor.init_args.hidden={fit.hidden}"] if fit.hidden else []
        named = [
            f"--seed_everything={fit.seed}",
            f"{logger}.save_dir={self.out}",
            f"{logger}.name={fit.folder_name}",
        ]
        return ["-c", fit.config, "--trainer.devices=1", *self.fit_args, *width, *named]

    def command(self, fit: Fit) -> list[str]:
        """The command that runs one fit of the sweep alone: `sweep` and its options."""
        width = ["--hidden", str(fit.hidden)] if fit.hidden else []
        own = ["--seeds", str(fit.seed), "--select", self.select, "--out", str(self.out)]
        return ["sweep", "--configs", fit.config, *width, *own, *self.fit_args]
