"""The fits of a sweep, and the folder and the command of each."""

import hashlib
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
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
    _keys: dict[Fit, dict[str, str]] = field(default_factory=dict, init=False, repr=False)

    @property
    def table(self) -> Path:
        """The file of the table."""
        return self.out / "sweep.csv"

    @property
    def settings(self) -> str:
        return shlex.join(self.fit_args)

    def key(self, fit: Fit) -> dict[str, str]:
        """What identifies a fit: its options, and the contents of its configuration files when they were first read.

        Raises:
            UsageError: If they cannot be read.
        """
        if fit not in self._keys:
            self._keys[fit] = {
                "config": Path(fit.config).stem,
                "seed": str(fit.seed),
                "select": self.select,
                "settings": self.settings,
                "asked_hidden": str(fit.hidden or ""),
                "files": config_fingerprint(["-c", fit.config, *self.fit_args]),
            }
        return self._keys[fit]

    @property
    def files(self) -> dict[str, str]:
        """Configuration -> the contents of its files, of those that were read."""
        return {key["config"]: key["files"] for key in self._keys.values()}

    def folder(self, fit: Fit) -> Path:
        """The folder of a fit, which its key determines, so that all processes find it at the same place."""
        key = hashlib.sha256(json.dumps(self.key(fit)).encode()).hexdigest()[:8]
        return self.out / fit.folder_name / f"version_{key}"

    def options(self, fit: Fit) -> list[str]:
        """The options of `nernlit fit` for a fit. An interrupted one continues from its last checkpoint."""
        logger = "--trainer.logger.init_args"
        width = [f"--model.init_args.representation.predictor.init_args.hidden={fit.hidden}"] if fit.hidden else []
        folder = self.folder(fit)
        placed = [
            f"{logger}.save_dir={self.out}",
            f"{logger}.name={fit.folder_name}",
            f"{logger}.version={folder.name}",
        ]
        last = folder / "checkpoints" / "last.ckpt"
        resumed = [f"--ckpt_path={last}"] if last.is_file() else []
        own = [*width, f"--seed_everything={fit.seed}", *placed, *resumed]
        return ["-c", fit.config, "--trainer.devices=1", *self.fit_args, *own]

    def command(self, fit: Fit) -> list[str]:
        """The command that runs one fit of the sweep alone: `sweep` and its options."""
        width = ["--hidden", str(fit.hidden)] if fit.hidden else []
        own = ["--seeds", str(fit.seed), "--select", self.select, "--out", str(self.out)]
        return ["sweep", "--configs", fit.config, *width, *own, *self.fit_args]
