"""LightningCLI with nernlit's base classes: one run of `fit`, `validate`, `test` or `predict`."""

import sys
from argparse import SUPPRESS, ArgumentError
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Literal

from jsonargparse import ArgumentError as ParserError
from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar, Timer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

# Imported so that YAML can name their classes without a module path.
from nernlit import __version__, kernels, optimizers, predictors  # noqa: F401
from nernlit.callbacks import (
    BestCheckpoint,
    CpuThreads,
    DurableCheckpointIO,
    Interruption,
    LastCheckpoint,
    LearningRate,
    ProgressLine,
    RepresentationFigures,
    RoundCheckpoint,
    Summary,
    ValidationLog,
    WeightsWriter,
)
from nernlit.callbacks.writer import run_folder
from nernlit.cli.arguments import require_writable, split_options
from nernlit.cli.config_parts import SCHEDULES
from nernlit.cli.configs import NO_DATA, ConfigFile, config_parts, expand_bases
from nernlit.cli.exact_parser import ExactParser
from nernlit.cli.fitted_options import place_weights, require_fitted_options, take_changes
from nernlit.cli.parser_errors import explain
from nernlit.cli.paths import resolve_paths
from nernlit.cli.resume import find_checkpoint, logger_options, require_usable
from nernlit.cli.run_folders import claimed_folder, refuse_replaced_checkpoints
from nernlit.data import ImageDataModule
from nernlit.errors import DataError, UsageError
from nernlit.representation import without_fitting
from nernlit.storage.files import write_atomically
from nernlit.training import ClassifierModule, Plan, refuse_sessions, refuse_sharded_strategies
from nernlit.utilities.progress import CONSOLE

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
#: The classes that top-level options take.
ROOTS = {"model": ClassifierModule, "data": ImageDataModule}
_PARSER = {"exit_on_error": False}
_NO_DATA = f"nernlit.{NO_DATA}"
#: Options of the trainer and values that commands do not support -> why.
_NOT_SUPPORTED = {
    ("enable_checkpointing", False): "fits keep best.ckpt and last.ckpt, which other commands read",
    ("barebones", True): "runs print and log their results",
}
_LARGEST_SEED = 2**32 - 1  # NumPy's


class SaveConfig(SaveConfigCallback):
    """Save the configuration in the run's folder. Without a logger there is no such folder, and nothing is saved."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        folder = run_folder(trainer)
        if trainer.is_global_zero and trainer.loggers and not self.already_saved:
            config = self.config.clone()
            config["ckpt_path"] = None  # a fit that is run again with this file starts from its beginning
            content = self.parser.dump(config, skip_none=False)
            write_atomically(folder / self.config_filename, content.encode())
        self.already_saved = True


class NernlitCLI(LightningCLI):
    """LightningCLI with the callbacks that every run has, and `--ckpt_path last|best` that survive a restart."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Listed by --help only: `expand_bases` has taken it out of the arguments.
        parser.add_argument(
            "--schedule",
            choices=SCHEDULES,
            default=SUPPRESS,
            help="Optimizers and numbers of steps of shipped configurations: nernlit's (fast), or the paper's.",
        )
        parser.add_argument(
            "--threads",
            type=PositiveInt | Literal["auto"],
            default="auto",
            help="CPU threads; auto uses the cores that other programs leave free.",
        )
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")
        parser.add_lightning_class_args(RepresentationFigures, "figures")
        parser.add_lightning_class_args(WeightsWriter, "writer")
        parser.set_defaults(
            {
                # One file, also after a fit is resumed.
                "best_checkpoint.enable_version_counter": False,
            }
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = ExactParser(dump_header=[f"nernlit=={__version__}"], **kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=ConfigFile,
            help="YAML file of options, or the name of a shipped configuration; several are merged in order.",
        )
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        self.args: list[str] = args  # type: ignore[assignment]  # always a list here
        try:
            self.config = parser.parse_args(args)  # type: ignore[arg-type]  # always a list here
        except (ParserError, ArgumentError) as error:
            options = self._subcommand_parsers[args[0]].get_defaults().keys()  # type: ignore[index]
            raise UsageError(explain(str(error), ROOTS, options)) from error
        seed = self.config[self.config["subcommand"]]["seed_everything"]
        if not isinstance(seed, bool) and not 0 <= seed <= _LARGEST_SEED:
            raise UsageError(f"--seed_everything {seed}: expected an integer from 0 to {_LARGEST_SEED}, true or false.")

    # LightningCLI has no public hooks between parsing and instantiating, nor around the run of a command. Three private
    # methods are extended here; pyproject.toml bounds lightning's version for them, and tests/cli/ tests what they do.

    def _parse_ckpt_path(self) -> None:
        command = self.config["subcommand"]
        config = self.config[command]
        path = find_checkpoint(config, command)
        config["ckpt_path"] = None if path is None else str(path)
        if path is not None:
            self._apply_checkpoint(path, command)

    def _apply_checkpoint(self, path: Path, command: str) -> None:
        """Build the module with the checkpoint's options, and refuse given options that differ."""
        content = require_usable(path, self.config[command]["model"]["class_path"], command)
        given = self.parser.parse_args(self.args, defaults=False)[command].as_dict()["model"].get("init_args", {})
        require_fitted_options(path, content.get("hyper_parameters", {}), given, command)
        if command == "fit" and (seed := content.get("sampling_seed")) is not None:
            asked = [option.partition("=")[2] for option in split_options(self.args, "--seed_everything")[1]]
            if asked and asked[-1].isdecimal() and asked[-1] != str(seed):
                raise UsageError(
                    f"--seed_everything {asked[-1]}: {path} is of a fit with seed {seed}; leave it out, or start a new "
                    "fit."
                )
            if seed <= _LARGEST_SEED:  # otherwise it was drawn, and the module and the data restore it
                self.config[command]["seed_everything"] = seed
        super()._parse_ckpt_path()
        arguments = self.config[command]["model"]["init_args"]
        take_changes(arguments, given)
        place_weights(path, arguments, given, command)

    def instantiate_classes(self) -> None:
        """Save the parsed options as the module's hyperparameters, so that its checkpoints say how it is built.

        The constructor does not do it: in a library call its arguments are whole networks.
        """
        config = self.config[self.subcommand]
        # The file's predictor replaces the one that is built here.
        is_loaded = config["ckpt_path"] or config["model"]["init_args"].get("init_from")
        with without_fitting() if is_loaded else nullcontext():
            super().instantiate_classes()
        parsed = self.config_dump["model"]
        self.model.save_hyperparameters(
            {
                "_class_path": parsed["class_path"],
                **parsed.get("init_args", {}),
                **parsed.get("dict_kwargs", {}),
                **self.model.replaced_hyperparameters,
                "_instantiator": "lightning.pytorch.cli.instantiate_module",  # for load_from_checkpoint
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        config = self.config_init[self.subcommand]
        trainer_config = config["trainer"]
        callbacks: list[Callback] = [CpuThreads(config["threads"])]
        has_timer = any(isinstance(callback, Timer) for callback in _listed(trainer_config["callbacks"]))
        if trainer_config["max_time"] is None and not has_timer:
            # `sweep` reads it. With a time limit Lightning adds a Timer itself.
            callbacks.append(Timer())
        if trainer_config["enable_progress_bar"] is not False:
            has_own = any(isinstance(callback, ProgressBar) for callback in _listed(trainer_config["callbacks"]))
            trainer_config["enable_progress_bar"] = has_own or CONSOLE.is_interactive
            callbacks += [ProgressLine()] if CONSOLE.is_interactive and not has_own else []
            callbacks += [] if sys.stdout.isatty() else [ValidationLog()]
        trainer_config["callbacks"] = [*_listed(trainer_config["callbacks"]), *callbacks]
        plugins = _listed(trainer_config["plugins"])
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            trainer_config["plugins"] = [*plugins, DurableCheckpointIO()]
        try:
            return super().instantiate_trainer(**kwargs)
        except (TypeError, ValueError, ModuleNotFoundError) as error:  # of an accelerator, a strategy, a precision
            raise UsageError(f"--trainer: {' '.join(str(error).split())}") from error
        except RuntimeError as error:
            if "stateful callback" not in str(error):
                raise
            raise UsageError(
                "--trainer.callbacks: two callbacks of one class with the same options would have the same state in "
                "checkpoints; leave one out, or change its monitor, mode or frequency."
            ) from error

    def before_instantiate_classes(self) -> None:
        if self.subcommand != "fit":
            self.save_config_callback = None  # the run's folder keeps the configuration that it was fitted with
        config = self.config[self.subcommand]
        for section in ("best_checkpoint", "last_checkpoint", "figures", "writer"):
            if config[section] is None:
                raise UsageError(f"{section}: null; leave the section out for its default options.")
        if self.subcommand == "predict":  # what is predicted is the network
            config["data"] = Namespace(class_path=_NO_DATA, init_args=Namespace())  # type: ignore[no-untyped-call]
            if config["trainer"]["limit_predict_batches"] == 0:
                raise UsageError("--trainer.limit_predict_batches 0: `predict` would write nothing; leave it out.")
        elif self.subcommand in ("validate", "test"):
            limit = {"validate": "limit_val_batches", "test": "limit_test_batches"}[self.subcommand]
            if config["trainer"][limit] == 0:
                raise UsageError(f"--trainer.{limit} 0: `{self.subcommand}` would measure nothing; leave it out.")
        if self.subcommand != "predict" and config["writer"]["path"] is not None:
            raise UsageError(f"--writer.path is for `predict`; leave it out of `{self.subcommand}`.")
        best = config["best_checkpoint"]
        given = split_options(self.args, "--best_checkpoint.monitor")[1]
        if config["data"]["class_path"] == _NO_DATA and best["monitor"] == "val/acc" and not given:
            best["monitor"] = "val/recon_rmse"
        for (option, value), why in _NOT_SUPPORTED.items():
            if config["trainer"][option] is value:
                raise UsageError(f"--trainer.{option} {str(value).lower()}: {why}; leave it out.")
        strategy = config["trainer"]["strategy"]
        # Lightning's own checks come first otherwise: for a GPU, or an installation of DeepSpeed.
        refuse_sharded_strategies(strategy["class_path"] if hasattr(strategy, "get") else strategy)
        refuse_sessions(strategy)
        files = [part.file for part in config_parts(self.args)]
        for part in ("model", "data"):
            resolve_paths(config[part], part, files)
        if self.subcommand == "fit":
            # Before the network's kernels are ordered, which takes long for large ones; the module checks it again.
            plan = Plan.from_trainer(config["trainer"], config["data"].get("init_args"))
            resolve_name(config["model"]["class_path"]).check_plan(plan, config["model"]["init_args"])
        for logger in logger_options(config):
            if logger.get("save_dir"):
                # Lightning expands `~` in some places only.
                folder = Path(str(logger["save_dir"])).expanduser()
                logger["save_dir"] = str(folder)
                require_writable(folder, "--trainer.logger.init_args.save_dir")

    def _run_subcommand(self, subcommand: str) -> None:
        loggers = logger_options(self.config[subcommand])
        numbered = not loggers or loggers[0].get("version") is None
        try:
            resumes = bool(self.config_init[subcommand].get("ckpt_path"))
            if subcommand == "fit" and not resumes:
                refuse_replaced_checkpoints(self.trainer)
            with claimed_folder(self.trainer.loggers, numbered, subcommand == "fit", resumes):
                super()._run_subcommand(subcommand)
        except DataError as error:
            if self.model.needs_images(subcommand):
                raise
            raise DataError(f"{error} To run without images and without accuracies, pass --data null.") from error

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in kwargs:
            kwargs["verbose"] = False  # our Summary prints the table
        return kwargs

    def _refuse_random_weights(self, command: str) -> None:
        if not self.config_init[command].get("ckpt_path") and not self.model.is_trained:
            raise UsageError(
                f"`{command}` without --ckpt_path would use a network with random weights; "
                "pass --ckpt_path FILE, or `best` or `last` for the newest run of this configuration."
            )

    def before_validate(self) -> None:
        self._refuse_random_weights("validate")
        self.model.logs_evaluations = False  # the fit has logged them where it validated

    def before_test(self) -> None:
        self._refuse_random_weights("test")
        # Figures of a part of the images would look like those of the run.
        self.model.logs_evaluations = tests_all_images(self.trainer)

    def before_predict(self) -> None:
        self._refuse_random_weights("predict")


def tests_all_images(trainer: Trainer) -> bool:
    """Whether tests are on all images; the integer 1 stands for one batch."""
    return isinstance(trainer.limit_test_batches, float) and trainer.limit_test_batches == 1.0


def _listed(given: Any) -> list[Any]:
    """An option that takes one value, a list or null, as a list."""
    return given if isinstance(given, list) else [] if given is None else [given]


def run(args: Sequence[str], callbacks: Sequence[Callback] = ()) -> NernlitCLI:
    """Run one of Lightning's commands (`fit`, `validate`, `test`, `predict`) with these arguments.

    Args:
        args: The command and its options.
        callbacks: Further ones than those of every run and of the options.
    """
    return NernlitCLI(
        ClassifierModule,
        ImageDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        trainer_defaults={
            "enable_model_summary": False,  # counts the frozen original's parameters too; our Summary prints the sizes
            "callbacks": [Summary(), RoundCheckpoint(), LearningRate(), Interruption(), *callbacks],
        },
        parser_kwargs={**_PARSER, **dict.fromkeys(TRAINER_COMMANDS, _PARSER)},
        args=expand_bases(args),
    )
