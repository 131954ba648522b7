"""Every shipped configuration runs, and says what its name says."""

import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors.torch import save_file
from timm.data import ImageNetInfo

from nernlit.callbacks import RepresentationFigures
from nernlit.cli.configs import config_parts, expand_bases
from nernlit.cli.main import NernlitCLI, run
from nernlit.cli.shipped import merged_options, self_contained
from nernlit.errors import UsageError
from nernlit.originals import Original
from tests.fakes import CONFIGS, write_image_folder, write_stl10, write_weights

SHIPPED = sorted(CONFIGS.glob("*.yaml"))
#: What stands for the originals here: small ones, since a ResNet56 costs seconds a run.
ORIGINALS = {
    "cifar10": ("cifar_resnet20", 10),
    "cifar100": ("cifar_resnet20", 100),
    "stl10": ("cifar_resnet20", 10),
    "imagenet": ("test_resnet", 1000),
}


@pytest.fixture(scope="session")
def fakes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the fake data and weights of every dataset lie."""
    places = {}
    for dataset, (name, classes) in ORIGINALS.items():
        folder = places[dataset] = tmp_path_factory.mktemp(dataset)
        if dataset == "stl10":
            write_stl10(folder)
        else:
            imagenet = dataset == "imagenet"
            names = ImageNetInfo().label_names() if imagenet else [str(label) for label in range(classes)]
            write_image_folder(folder, classes, 2, ("train", "val" if imagenet else "test"), names)
        write_weights(name, folder / "original.safetensors", num_classes=classes)
    vit = merged_options(config_parts(expand_bases(["-c", str(CONFIGS / "base" / "digits_vit.yaml")])))["model"][
        "init_args"
    ]
    original = Original(**{**vit["representation"]["original"], "checkpoint": None})
    places["vit"] = tmp_path_factory.mktemp("vit") / "original.safetensors"
    save_file(original.net.state_dict(), places["vit"])
    return places


@pytest.fixture(autouse=True)
def _without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take a third of the time of a step, and are tested with their callback."""
    monkeypatch.setattr(RepresentationFigures, "on_train_end", lambda *_: None)


def _one_step(config: Path, fakes: dict[str, Path], *more: str) -> NernlitCLI:
    """A step of a shipped configuration (of each phase where there are two) on a tiny predictor and tiny fakes."""
    args = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.num_sanity_val_steps=0"]
    args += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false", "--data.val_share=0.5"]
    dataset, *words = config.stem.split("_")
    if dataset in ORIGINALS:
        args.append(f"--data.root={fakes[dataset]}")
        if "original" not in words:
            name, weights = ORIGINALS[dataset][0], fakes[dataset] / "original.safetensors"
            args.append(f"--model.representation.original.name={name}")
            args += ["--model.representation.original.pretrained=false", "--model.representation.order=none"]
            args.append(f"--model.representation.original.checkpoint={weights}")
    if dataset == "digits" and "vit" in words and "original" not in words:
        args.append(f"--model.representation.original.checkpoint={fakes['vit']}")
    if "codebooks" in words:
        args.append("--model.representation.predictor.beam=1")
    elif "original" not in words and "table" not in words:
        args.append("--model.representation.predictor.hidden=8")
    if words[-1] in ("original", "decoupled", "quantized", "teacher", "noise", "baseline", "distill"):
        args.append("--data.batch_size=2")
    if words[-1] == "quantized":
        args.append("--model.rate.target_bytes=4000")  # of the tiny predictor
    if words[-1] in ("decoupled", "quantized", "teacher", "noise") and "baseline" not in words:
        args += ["--model.reconstruction.steps=1", "--trainer.max_steps=2"]
    if words[-1] == "baseline" or "baseline" in words:
        args.append("--model.warmup_steps=0")
    if words[-1] == "teacher" or "kd" in words:
        # A small one: the shipped ResNet50 costs seconds.
        teacher: dict[str, object] = {"name": "cifar_resnet20", "num_classes": ORIGINALS[dataset][1]}
        args.append(
            f"--model.teacher={json.dumps({**teacher, 'checkpoint': str(fakes[dataset] / 'original.safetensors')})}"
        )
    if words[-1] in ("progressive", "distill"):
        args = [arg for arg in args if "representation" not in arg]
        first = config.stem.removesuffix("_progressive") if words[-1] == "progressive" else f"{dataset}_h140"
        first_run = _one_step(config.with_stem(first), fakes).trainer.log_dir
        args.append(f"--model.init_from={first_run}/checkpoints/last.ckpt")
    if dataset == "imagenet":
        args += ["--data.model=cifar_resnet20", "--data.num_workers=0"]
    return run(["fit", "-c", str(config), *args, *more])


def _kind(config: Path) -> str:
    """What a configuration is, without its sizes: every option but the run's name, numbers as zero or not."""
    options = merged_options(config_parts(expand_bases(["-c", str(config)])))
    del options["trainer"]["logger"]["init_args"]["name"]
    return json.dumps(_without_sizes(options), sort_keys=True)


def _without_sizes(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_sizes(inner) for key, inner in value.items()}
    return value != 0 if isinstance(value, int | float) and not isinstance(value, bool) else value


#: The first configuration of every kind.
KINDS = sorted({_kind(config): config for config in reversed(SHIPPED)}.values())


def test_every_scheme_on_every_dataset_is_among_the_kinds_that_run_a_step() -> None:
    def combinations(configs: list[Path]) -> set[tuple[Any, ...]]:
        merged = [merged_options(config_parts(expand_bases(["-c", str(config)]))) for config in configs]
        return {
            (
                *(options["data"]["class_path"], options["data"]["init_args"].get("train_on")),
                *(options["model"]["class_path"], str(options["model"]["init_args"].get("teacher"))),
            )
            for options in merged
        }

    assert combinations(KINDS) == combinations(SHIPPED)
    assert len(KINDS) < len(SHIPPED) / 2


_SHORT = pytest.mark.filterwarnings("ignore:The fit ended within round 1")  # after one step, as it is asked to


@_SHORT
@pytest.mark.parametrize("config", KINDS, ids=lambda path: path.stem)
def test_every_kind_of_shipped_configuration_runs_a_step(config: Path, fakes: dict[str, Path]) -> None:
    trainer = _one_step(config, fakes).trainer
    assert trainer.global_step == trainer.max_steps
    assert torch.isfinite(trainer.callback_metrics["train/loss"])


@pytest.fixture(scope="session")
def parse() -> Callable[..., dict[str, Any]]:
    """All options of `fit` with these arguments, as the command's parser gives them."""
    parsers = []

    def keep(_: NernlitCLI, parser: Any, __: list[str]) -> None:
        parsers.append(parser)
        raise InterruptedError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NernlitCLI, "parse_arguments", keep)
        with pytest.raises(InterruptedError):
            run(["fit"])

    def parsed(*args: str) -> dict[str, Any]:
        options: dict[str, Any] = parsers[0].parse_args(expand_bases(["fit", *args]))["fit"].as_dict()
        del options["config"]  # the files' names
        return options

    return parsed


@pytest.mark.parametrize("config", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid_under_both_schedules(
    config: Path, parse: Callable[..., dict[str, Any]]
) -> None:
    if config.stem.endswith("_original"):
        options = parse("-c", config.stem)
        with pytest.raises(UsageError, match="none of the given configurations has a section `paper:`"):
            expand_bases(["fit", "-c", config.stem, "--schedule=paper"])
    else:
        # The parser checks every part of the files in turn, so that this checks those of the other schedule too.
        options = parse("-c", config.stem, "--schedule=paper")
        assert options["model"]["init_args"]["precision"] == "fp32"
        representation = options["model"]["init_args"].get("representation")
        if "_codebooks" in config.stem:
            assert representation["predictor"]["class_path"] == "nernlit.Codebooks"
            assert not representation["standardize"]
        elif "_table" in config.stem:
            assert representation["predictor"]["class_path"] == "nernlit.Table"
        elif representation is not None:
            assert representation["predictor"]["init_args"]["hidden"] == int(config.stem.split("_h")[1].split("_")[0])
    assert options["trainer"]["logger"]["init_args"]["name"] == config.stem


def _scheme_and_optimizer(config: Path) -> tuple[str, str]:
    model = merged_options(config_parts(expand_bases(["-c", str(config)])))["model"]
    return model["class_path"], model["init_args"]["optimizer"]["class_path"]


#: One configuration of every scheme with every optimizer; the last one, so that several datasets are among them.
COPIED = sorted({_scheme_and_optimizer(config): config for config in KINDS}.values())


@pytest.mark.parametrize("config", COPIED, ids=lambda path: path.stem)
def test_a_copy_of_a_shipped_configuration_has_the_same_options(
    config: Path, parse: Callable[..., dict[str, Any]]
) -> None:
    Path("copy.yaml").write_text(self_contained(config.stem), encoding="utf-8")
    assert [part.file for part in config_parts(expand_bases(["-c", "copy.yaml"]))] == [Path("copy.yaml")]
    has_paper = not config.stem.endswith("_original")
    for schedule in ["fast", "paper"] if has_paper else ["fast"]:
        copied = parse("-c", "copy.yaml", "--schedule", schedule)
        assert copied == parse("-c", config.stem, "--schedule", schedule)


@pytest.mark.parametrize("scheme", ["baseline", "progressive"])
def test_the_digits_transformer_is_represented_by_the_schemes_without_a_configuration_of_its_own(
    scheme: str, fakes: dict[str, Path]
) -> None:
    files = [f"-c={CONFIGS / 'base' / name}.yaml" for name in (scheme, "digits_vit")]
    args = ["--model.representation.predictor.hidden=8", "--model.representation.order=none"]
    args += [f"--model.representation.original.checkpoint={fakes['vit']}", "--trainer.max_epochs=1"]
    short = {"baseline": ["--model.warmup_steps=0", "--trainer.limit_train_batches=1"], "progressive": []}[scheme]
    short += ["--model.rounds=1", "--model.trials=1", "--data.steps_per_epoch=1"] if scheme == "progressive" else []
    cli = run(["fit", *files, *args, *short, "--trainer.enable_progress_bar=false"])
    assert cli.trainer.global_step == 1
    assert len(cli.model.representation.layout.layers) == 1 + 3 * 4 + 1  # patches, four matrices per block, classes


@_SHORT
@pytest.mark.parametrize("scheme", ["h140", "h140_baseline", "h140_decoupled", "h140_teacher", "h140_noise", "h300"])
def test_the_papers_schedule_runs_a_step(scheme: str, fakes: dict[str, Path]) -> None:
    cli = _one_step(CONFIGS / f"cifar10_{scheme}.yaml", fakes, "--schedule=paper")
    assert type(cli.trainer.optimizers[0]).__name__ == "Ranger"
    assert cli.model.representation.scale == 1


def _said(config: Path, *keys: str) -> Any:
    """What the files of a configuration say in the end under the paper's schedule."""
    values: list[Any] = [None]
    for part in config_parts(expand_bases(["-c", str(config), "--schedule", "paper"])):
        value: Any = part.options()
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        values += [value] if value is not None else []
    return values[-1]


#: Steps of Recon-only, of a round of Progressive and of Baseline-joint (arXiv 2407.00356, appendix D).
PAPER_STEPS = {"cifar10": 350 * 196, "cifar100": 450 * 196, "stl10": 350 * 20, "imagenet": 160_000}
IMAGES_EPOCH = {"cifar10": 175, "cifar100": 175, "stl10": 17, "imagenet": 39_636}  # steps


@pytest.mark.parametrize("config", [c for c in SHIPPED if "_h" in c.stem], ids=lambda path: path.stem)
def test_the_papers_schedule_has_the_papers_length(config: Path) -> None:
    dataset = config.stem.split("_")[0]
    epochs, every = _said(config, "trainer", "max_epochs"), _said(config, "trainer", "check_val_every_n_epoch")
    assert every <= epochs
    if dataset == "digits":  # not the paper's
        return
    scheme, recon = _said(config, "model", "class_path"), PAPER_STEPS[dataset]
    epoch = _said(config, "data", "init_args", "steps_per_epoch") or IMAGES_EPOCH[dataset]
    steps = min(epochs * epoch, _said(config, "trainer", "max_steps") or math.inf)
    if scheme == "DecoupledDistill":
        assert _said(config, "model", "init_args", "reconstruction", "steps") == recon
        assert steps - recon == pytest.approx(160_000 if dataset == "imagenet" else 100 * epoch, abs=epoch / 2)
    elif scheme == "BaselineJoint":
        assert steps == pytest.approx(recon, abs=epoch / 2)
        assert _said(config, "model", "init_args", "warmup_steps") < steps
    else:
        rounds = _said(config, "model", "init_args", "rounds") or 1
        assert steps == rounds * recon
        assert rounds == 1 or every * rounds == epochs


def test_configurations_name_a_known_network_and_say_their_width() -> None:
    for config in SHIPPED:
        if match := re.search(r"_h(\d+)", config.stem):
            contents = [part.options() for part in config_parts(expand_bases(["-c", str(config)]))]
            arguments = [content.get("model", {}).get("init_args", {}) for content in contents]
            if any("init_from" in tree for tree in arguments):  # the network and the width come with the checkpoint
                assert config.stem == "cifar100_h680_teacher_progressive"
                continue
            trees = [tree.get("representation") or {} for tree in arguments]
            predictors = [tree.get("predictor", {}) for tree in trees]
            names = [tree.get("original", {}).get("name") for tree in trees]
            assert timm.is_model(next(name for name in reversed(names) if name)), config.name
            widths = [tree["init_args"]["hidden"] for tree in predictors if "hidden" in tree.get("init_args", {})]
            assert widths[-1] == int(match[1]), config.name


def test_a_schedules_options_of_a_class_are_left_out_if_a_later_file_names_another_class(tmp_path: Path) -> None:
    _write(
        tmp_path,
        a="""
model: {class_path: One, init_args: {part: {class_path: Old, init_args: {x: 1}}}}
data: {class_path: Some, init_args: {y: 1}}
paper:
  model: {init_args: {z: 2, part: {init_args: {x: 2}}}}
  data: {init_args: {y: 2}}
""",
        same="base: a.yaml\nmodel: {init_args: {part: {class_path: mine.Old}}}\n",
        other="base: a.yaml\nmodel: {init_args: {part: New}}\ndata: {class_path: Other}\n",
        model="base: a.yaml\nmodel: {class_path: Two}\n",
    )

    def section(name: str) -> dict[str, Any]:
        part = config_parts(expand_bases(["-c", str(tmp_path / f"{name}.yaml"), "--schedule=paper"]))[-1]
        assert part.file.name == "a.yaml"
        return part.options()

    complete = {"model": {"init_args": {"z": 2, "part": {"init_args": {"x": 2}}}}, "data": {"init_args": {"y": 2}}}
    assert section("same") == complete
    assert section("other") == {"model": {"init_args": {"z": 2}}, "data": {"init_args": {"y": 2}}}
    assert section("model") == {"data": {"init_args": {"y": 2}}}


@pytest.mark.parametrize("predictor", [["Table"], ["Codebooks", "codebooks=2", "bits=3"]])
def test_the_papers_schedule_trains_other_predictors(predictor: list[str], fakes: dict[str, Path]) -> None:
    name, *options = predictor
    option = "--model.representation.predictor"
    given = [f"{option}={name}", *(f"{option}.{each}" for each in options)]
    cli = _one_step(CONFIGS / "cifar10_h140.yaml", fakes, "--schedule=paper", *given)
    assert type(cli.model.representation.predictor).__name__ == name
    assert type(cli.trainer.optimizers[0]).__name__ == "Ranger"


def test_a_schedule_that_nothing_has_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {max_epochs: 1}\n")
    with pytest.raises(UsageError, match="--schedule paper: none of the given configurations has a section `paper:`"):
        expand_bases(["fit", "-c", str(tmp_path / "mine.yaml"), "--schedule", "paper"])


def test_configurations_say_only_what_differs_from_their_bases() -> None:
    for config in SHIPPED:
        content = yaml.safe_load(config.read_text())
        assert content["base"], f"{config.name} has no base"
        assert content["trainer"]["logger"]["init_args"]["name"] == config.stem


def _files(args: list[str]) -> list[str]:
    return [Path(value).name for flag, value in itertools.pairwise(args) if flag == "-c"]


def _write(folder: Path, **contents: str) -> None:
    for name, content in contents.items():
        (folder / f"{name}.yaml").write_text(content, encoding="utf-8")


def test_bases_come_before_the_file_that_names_them(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("base: [sub/b.yaml]\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.yaml").write_text("base: [c.yaml]\n")
    (tmp_path / "sub" / "c.yaml").write_text("seed_everything: 1\n")
    args = expand_bases(["fit", f"--config={tmp_path / 'a.yaml'}", "--x"])
    assert _files(args) == ["c.yaml", "b.yaml", "a.yaml"]
    assert (args[0], args[-1]) == ("fit", "--x")
    (tmp_path / "sub" / "c.yaml").write_text("base: [b.yaml]\n")
    with pytest.raises(UsageError, match="builds on itself"):
        expand_bases(["fit", "-c", str(tmp_path / "a.yaml")])


def test_a_base_that_two_files_share_is_read_once(tmp_path: Path) -> None:
    _write(tmp_path, a="base: [b.yaml, c.yaml]\n", b="base: [d.yaml]\nx: 2\n", c="base: d.yaml\n", d="x: 1\n")
    _write(tmp_path, e="base: [./d.yaml]\n")
    assert _files(expand_bases(["fit", "-c", str(tmp_path / "a.yaml")])) == ["d.yaml", "b.yaml", "c.yaml", "a.yaml"]
    several = expand_bases(["fit", "-c", str(tmp_path / "a.yaml"), f"-c{tmp_path / 'e.yaml'}"])
    assert _files(several) == ["d.yaml", "b.yaml", "c.yaml", "a.yaml", "e.yaml"]


def test_options_win_over_files_wherever_they_stand(tmp_path: Path) -> None:
    _write(tmp_path, a="trainer: {max_epochs: 1}\n")
    line = ["fit", "--trainer.max_epochs", "2", "-c", str(tmp_path / "a.yaml")]
    assert expand_bases(line) == ["fit", "-c", str(tmp_path / "a.yaml"), "--trainer.max_epochs", "2"]


def test_the_message_about_a_missing_file_names_the_file_that_asks_for_it(tmp_path: Path) -> None:
    _write(tmp_path, a="base: [gone.yaml]\n", b="base: a.yaml\n", c="with: {lost.yaml: {x: 1}}\n")
    with pytest.raises(UsageError, match=r"a\.yaml: base: no configuration file \S*gone\.yaml"):
        expand_bases(["fit", "-c", str(tmp_path / "b.yaml")])
    with pytest.raises(UsageError, match=r"c\.yaml: with: no configuration file \S*lost\.yaml"):
        expand_bases(["fit", "-c", str(tmp_path / "c.yaml")])


def test_a_trainer_without_options_in_a_file_is_refused(tmp_path: Path) -> None:
    _write(tmp_path, a="base: digits_h96\ntrainer: null\n")
    with pytest.raises(UsageError, match=r"a\.yaml: trainer: expected options such as `trainer: \{max_epochs: 8\}`"):
        run(["fit", "-c", str(tmp_path / "a.yaml")])


def test_a_schedule_may_stand_in_a_file(tmp_path: Path) -> None:
    _write(tmp_path, a="schedule: paper\nbase: [b.yaml]\n", b="x: 1\npaper: {x: 2}\n")
    assert _files(expand_bases(["fit", "-c", str(tmp_path / "a.yaml")])) == ["b.yaml", "a.yaml", "b.yaml::paper"]
    fast = expand_bases(["fit", "-c", str(tmp_path / "a.yaml"), "--schedule=fast"])
    assert _files(fast) == ["b.yaml", "a.yaml"]
    _write(tmp_path, b="x: 1\n")
    with pytest.raises(UsageError, match=r"a\.yaml: schedule: paper: none of the given configurations has a section"):
        expand_bases(["fit", "-c", str(tmp_path / "a.yaml")])


def test_a_section_for_another_file_follows_the_later_of_both(tmp_path: Path) -> None:
    sections = "with: {scheme.yaml: {x: 2, paper: {x: 4}}, other.yaml: {x: 5}}\n"
    _write(tmp_path, data=f"x: 1\n{sections}paper: {{x: 3}}\n", scheme="x: 0\n", other="x: 9\n")
    _write(tmp_path, a="base: [data.yaml, scheme.yaml]\n", b="base: [scheme.yaml, data.yaml]\n")
    pair = "data.yaml::with::scheme.yaml"
    expanded = [expand_bases(["fit", "-c", str(tmp_path / f"{name}.yaml")]) for name in "ab"]
    assert _files(expanded[0]) == ["data.yaml", "scheme.yaml", pair, "a.yaml"]
    assert _files(expanded[1]) == ["scheme.yaml", "data.yaml", pair, "b.yaml"]
    paper = expand_bases(["fit", "-c", str(tmp_path / "b.yaml"), "--schedule=paper"])
    assert _files(paper)[4:] == ["data.yaml::paper", f"{pair}::paper"]
    assert [part.options() for part in config_parts(paper)] == [{"x": 0}, {"x": 1}, {"x": 2}, {}, {"x": 3}, {"x": 4}]


NESTED = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n" for old, new in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "bad.yaml is empty; expected options"),
        (b"# nothing\n", "bad.yaml is empty; expected options"),
        (b"- a\n- b\n", "bad.yaml holds no options; expected a YAML mapping"),
        (b"just text", "bad.yaml holds no options; expected a YAML mapping"),
        (b"base: [1, 2]\n", "bad.yaml: base: [1, 2]; expected a list of YAML files"),
        (b"base: {a: b}\n", "bad.yaml: base: {'a': 'b'}; expected a list of YAML files"),
        (b"base: nowhere.yaml\n", "no configuration file nowhere.yaml"),
        (b"base: bad.yaml\n", "bad.yaml builds on itself: bad.yaml -> bad.yaml"),
        (b"a: {b: 1}\nc: 1\na: {b: 2}\n", "bad.yaml, line 3: 'a' is given again (first in line 1)"),
        (b"a: {b: 1, b: 2}\n", "bad.yaml, line 1: 'b' is given again (first in line 1)"),
        (b"a: [1\n", "bad.yaml is not valid YAML"),
        (b"a: &x {b: *x}\n", "bad.yaml has more than 100,000 values"),
        (NESTED.encode(), "bad.yaml has more than 100,000 values"),
        (b"[" * 20_000, "bad.yaml is not valid YAML"),
        (b"\xff\xfe\x00a", "bad.yaml is not a text file in UTF-8"),
        (b"schedule: slow\n", "bad.yaml: schedule: slow: expected one of fast, paper"),
        (b"with: [a]\n", "bad.yaml: with: expected names of files, each with its options"),
        (b"with: {nowhere.yaml: {}}\n", "no configuration file nowhere.yaml"),
        (b"with: {bad.yaml: 1}\n", "bad.yaml: with: bad.yaml: expected options such as"),
        (b"schedule: paper\npaper: 1\n", "bad.yaml: paper: expected options such as"),
        (b"? [a]\n: 1\n", "bad.yaml, line 1: a list or a mapping as a name"),
    ],
)
def test_a_bad_configuration_is_refused_by_name(content: bytes, message: str) -> None:
    Path("bad.yaml").write_bytes(content)
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        expand_bases(["fit", "-c", "bad.yaml"])
    assert "\n" not in str(caught.value)


def test_a_folder_and_a_missing_value_are_no_configuration() -> None:
    Path("folder").mkdir()
    with pytest.raises(UsageError, match="cannot read the configuration folder: Is a directory"):
        expand_bases(["fit", "-c", "folder"])
    with pytest.raises(UsageError, match="-c needs a value: a YAML file"):
        expand_bases(["fit", "-c"])


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100", "stl10"])
def test_every_configuration_names_the_run_of_a_shipped_original(dataset: str) -> None:
    original = yaml.safe_load((CONFIGS / f"{dataset}_original.yaml").read_text(encoding="utf-8"))
    base = yaml.safe_load((CONFIGS / "base" / f"{dataset}.yaml").read_text(encoding="utf-8"))
    named = base["model"]["init_args"]["representation"]["original"]
    assert named.pop("checkpoint") == f"runs/{original['trainer']['logger']['init_args']['name']}"
    assert named == original["model"]["init_args"]["original"]
    assert base["data"]["class_path"] == original["data"]["class_path"]


def test_the_headline_commands_follow_each_other_as_written(fakes: dict[str, Path]) -> None:
    Path("data").symlink_to(fakes["cifar10"])
    short = ["--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=1", "--trainer.accelerator=cpu"]
    run(["fit", "-c", str(CONFIGS / "cifar10_original.yaml"), *short, "--data.val_share=0.5", "--data.batch_size=4"])
    short.append("--data.steps_per_epoch=2")
    cli = run(["fit", "-c", str(CONFIGS / "cifar10_h120.yaml"), *short, "--model.representation.order=none"])
    best = Path("runs/cifar10_original/version_0/checkpoints/best.ckpt").absolute()
    assert cli.model.representation.original.weights_from == str(best)
    expected = torch.load(best, weights_only=True)["state_dict"]["original.net.conv1.weight"]
    assert torch.equal(cli.model.representation.original.net.conv1.weight, expected)
