"""Loading of representations from .nern files and checkpoints."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from torch import Tensor, nn

from nernlit.coding import NernFile, is_nern, largest_change, predictor_classes
from nernlit.errors import CheckpointError, NernlitError, UsageError
from nernlit.originals import fitted_original, with_statistics
from nernlit.representation.fitting import without_fitting
from nernlit.representation.representation import Representation
from nernlit.storage.checkpoint import read_checkpoint
from nernlit.storage.weights import require_floats
from nernlit.utilities.modes import plain_modes
from nernlit.utilities.text import abbreviated
from nernlit.utilities.trust import known_names_only, refusal, refused_name

_PREFIX = "representation."
#: Most characters of another library's message.
_LONGEST = 2000
_STATISTICS = ("running_mean", "running_var")


def load(
    path: str | Path,
    net: nn.Module | None = None,
    max_gib: float | None = None,
) -> Representation:
    """The representation in a file, in evaluation mode; it can be trained further.

    For a .nern file, the original of the representation is the reconstructed network, because the file contains no
    other. A .nern file imports and executes nothing: networks are timm's, and its predictor's class must be imported
    already, as nernlit's are. A checkpoint names its predictor's class, which is imported only from this package and
    the working directory; import classes of other packages before you call this.

    Args:
        path: A .nern file, or a checkpoint (.ckpt) of a fit.
        net: For a .nern file, a network of its architecture, if timm cannot create it. Its weights are replaced.
        max_gib: For a .nern file, the most memory that decoding may need, in GiB; 8 by default. A small file can
            describe a large network.

    Raises:
        FileFormatError: If a .nern file is missing, damaged, of another version, describes what cannot be built, or
            needs a network that is not given, or a predictor class that is not imported.
        CheckpointError: If a checkpoint cannot be read, or does not say how its representation is built.
        UsageError: If an option for .nern files is given with another file.
    """
    if is_nern(path):
        return Representation.from_file(NernFile.read(path, max_gib), net)
    if net is not None or max_gib is not None:
        raise UsageError(f"{path} is not a .nern file; net and max_gib are options for .nern files only.")
    return load_representation(path)[0].eval()


@plain_modes()
def load_representation(
    path: str | Path | None, representation: Representation | None = None, original: str | Path | None = None
) -> tuple[Representation, dict[str, Any]]:
    """The representation in a file, or a given representation with the predictor, scale and order of a file.

    Args:
        path: A checkpoint or a .nern file. None returns what is given.
        representation: The predictor of the file is loaded into it instead of building a new representation. The
            file must have the same specification and the same original. Build it in `without_fitting()`, so that its
            predictor is not fitted in vain.
        original: File of the original's weights. For a checkpoint, if that file has moved (of a fit that started from
            a .nern file, that .nern file). For a .nern file, if the original is to be the network that the file was
            written from; by default it is the reconstructed network.

    Returns:
        The representation, and the hyper-parameters (`representation`, `init_from`) that a module trained from it must
        have, so that its checkpoints can be loaded without `path`, or with the .nern file alone.

    Raises:
        CheckpointError: If a checkpoint cannot be read, holds no representation or does not fit the given one.
        FileFormatError: If a .nern file cannot be decoded.
        UsageError: If neither is given.
    """
    if path is None:
        if representation is None:
            raise UsageError(
                "neither a representation nor a checkpoint or a .nern file (init_from) is given; pass one."
            )
        return representation, {}
    if representation is not None:
        state = _stored_state(NernFile.read(path), representation) if is_nern(path) else _fitted_state(path)[0]
        _load_state(representation, state, path)
        return representation, {"init_from": None}
    if is_nern(path):
        content = NernFile.read(path)
        fitted = None if original is None else fitted_original(content, original)
        return Representation.from_file(content, original=fitted), {"init_from": str(path)}
    rebuilt: dict[str, Any]
    state, hyper_parameters = _fitted_state(path)
    described, source = hyper_parameters.get("representation"), hyper_parameters.get("init_from")
    if described is not None:
        with _unbuildable(path):
            described = _with_original(path, described, original)
        representation = _described_representation(path, described)
        rebuilt = {"representation": described, "init_from": None}
    elif isinstance(source, str) and is_nern(source):
        file = Path(original or source)
        if original is None:
            _require_present(path, file)
        if not is_nern(file):
            raise CheckpointError(f"{path} was fitted from {source}; expected that .nern file as original, not {file}.")
        representation, rebuilt = load(file), {"init_from": str(file)}
    else:
        raise CheckpointError(
            f"{path} does not say how its representation is built (it was not written by the command line); "
            "build the same representation and pass it too."
        )
    _load_state(representation, state, path)
    return representation, rebuilt


def _described_representation(path: str | Path, described: Any) -> Representation:
    """The representation that a checkpoint describes, without its predictor's state.

    Raises:
        CheckpointError: If the description is none, or names a class that may not be imported.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Representation, "representation")
    with _unbuildable(path), without_fitting(), known_names_only(predictor_classes()):
        representation: Representation = parser.instantiate(
            parser.parse_object({"representation": described})
        ).representation
    return representation


@contextmanager
def _unbuildable(path: str | Path) -> Iterator[None]:
    """Turn errors while a checkpoint's representation is built into one error that names the file.

    Raises:
        CheckpointError: Instead of any error that an invalid description or state can cause.
    """
    try:
        yield
    except CheckpointError as error:
        raise error if str(path) in str(error) else CheckpointError(f"{path}: {error}") from error
    except (NernlitError, ArgumentError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
        refused = refused_name(str(error))
        reason = " ".join(str(error).split())[:_LONGEST] if refused is None else refusal(refused)
        raise CheckpointError(f"{path}: its representation cannot be built: {reason}") from error


def _stored_state(file: NernFile, representation: Representation) -> dict[str, Any]:
    """The state dict of the representation that a .nern file was written from, with the kept tensors of the given one.

    Raises:
        CheckpointError: If the file has trained kept tensors that the given representation does not train.
    """
    extra = {
        "original": file.checks.original,
        "specification": file.specification,
        "scale": file.scale,
        "order": file.packed_order,
        "class_names": file.header["class_names"],
    }
    predictor = {f"predictor.{name}": value for name, value in file.predictor.state_dict().items()}
    original, keys, kept = representation.original, representation.tuned.keys, file.kept.values
    values: Mapping[str, Tensor] = {}
    if file.checks.original == original.fingerprint():  # otherwise `load_state_dict` refuses the file
        own = original.net.state_dict()
        folded = {key: value for key, value in kept.items() if _is_folded(key, value)}
        expected = {**own, **with_statistics(original.net, own, {**own, **folded})}
        error = 1.06 * float(file.header["kept"]["error"]) + 1e-5  # of rounding; the header has two digits of it
        trained = [
            key for key, value in kept.items() if key not in keys and largest_change(expected[key], value) > error
        ]
        if trained:
            raise CheckpointError(
                f"{file.path} holds {len(trained)} trained kept tensors ({abbreviated(trained, 1)}), and the given "
                "representation has the original's; pass the same --model.representation.tune_kept, or leave "
                "`representation` out."
            )
        # Only folded statistics move back into weights and biases, not the rounding of others.
        rounded = {key: own[key] for key in kept if key.endswith(_STATISTICS) and key not in folded}
        values = {**kept, **with_statistics(original.net, {**kept, **rounded}, own)}
    tuned = {f"tuned.values.{number}": values[key] for number, key in enumerate(keys) if key in values}
    return {**predictor, **tuned, "_extra_state": extra}


def _is_folded(key: str, value: Tensor) -> bool:
    """Whether these are the statistics of a BatchNorm layer that has been folded into its weight and bias."""
    constant = dict(zip(_STATISTICS, (0, 1), strict=True)).get(key.rpartition(".")[2])
    return constant is not None and bool((value == constant).all())


def _fitted_state(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dict of a checkpoint's representation, and the hyper-parameters of its module."""
    content = read_checkpoint(path)
    state = {k.removeprefix(_PREFIX): v for k, v in content["state_dict"].items() if k.startswith(_PREFIX)}
    if not state:
        raise CheckpointError(f"{path} holds no representation; pass a checkpoint of Recon-only or another scheme.")
    return state, content.get("hyper_parameters", {})


def _load_state(representation: Representation, state: dict[str, Tensor], path: str | Path) -> None:
    own = {f"tuned.{name}": value for name, value in representation.tuned.state_dict().items()}
    if more := [name for name in state if name.startswith("tuned.") and name not in own]:
        raise CheckpointError(
            f"{path} was fitted with {len(more)} more trained kept tensors; pass the same "
            "--model.representation.tune_kept, or leave `representation` out."
        )
    values = representation.tuned.values
    vectors = [number for number, value in enumerate(values) if value.dim() == 1]
    if 0 < sum(name.startswith("tuned.") for name in state) == len(vectors) < len(values):
        # Fitted with tune_kept: affine, continued with all: the others are the original's.
        moved = {f"tuned.values.{number}": state[f"tuned.values.{n}"] for n, number in enumerate(vectors)}
        state = {**{name: value for name, value in state.items() if not name.startswith("tuned.")}, **moved}
    with _unbuildable(path):
        require_floats(representation.state_dict(), state, str(path))
        representation.load_state_dict({**own, **state})  # a fit without tune_kept has the original's


def _with_original(path: str | Path, described: dict[str, Any], original: str | Path | None) -> dict[str, Any]:
    """The description of a representation, with the original's weights where they are now."""
    fitted = described["original"]
    if original is not None:
        return {**described, "original": {**fitted, "checkpoint": str(original), "pretrained": False}}
    if fitted.get("checkpoint"):
        _require_present(path, Path(fitted["checkpoint"]))
    return described


def _require_present(path: str | Path, file: Path) -> None:
    if not file.exists():
        raise CheckpointError(
            f"{path} was fitted with {file}, which does not exist any more. Pass its new path: "
            "--original FILE (export, analyze, report), or, with --model.init_from, a complete --model.representation."
        )
