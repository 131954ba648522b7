"""The .nern file: a representation that can be decoded, tested and trained further without the original.

It holds the predictor, the packed order, the scale, every tensor of the network that is not predicted, and a header
that says how network, layout and predictor are built. Numbers are stored as they are: the network that comes out of the
file is that of the representation, to the bit where the machine computes the same bits.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import timm
import torch
from safetensors.torch import save as serialized
from torch import Tensor, nn

from nernlit import predictors
from nernlit.errors import FileFormatError, LayoutError, NernlitError, UsageError
from nernlit.kernels import LayerFilter, Layout, OrderName, pack_order, unpack_order
from nernlit.originals import Original
from nernlit.predictors import Predictor
from nernlit.representation.representation import Representation
from nernlit.storage.container import Contents, fingerprint, read_container, write_container
from nernlit.utilities.sharing import names_of_weights

_GIB = 2**30
#: How much the energy of a layer may differ between machines: sums of products in another order, and no damage.
_TOLERANCE = 1e-3


def save(representation: Representation, path: str | Path) -> None:
    """Write a representation as a .nern file, whole or not at all.

    Raises:
        StorageError: If the file cannot be written.
        UsageError: If the path does not end in .nern.
    """
    if Path(path).suffix != ".nern":
        raise UsageError(f"{path}: expected a file name that ends in .nern.")
    write_container(Path(path), _contents(representation))


def load(
    path: str | Path,
    net: nn.Module | None = None,
    predictor_classes: Sequence[type[Predictor]] = (),
    max_gib: float = 8.0,
) -> Representation:
    """The representation of a .nern file. Its original is the reconstructed network: the file holds no other.

    Nothing is imported or executed that the file names: networks are timm's or ours, predictors this package's.

    Args:
        path: The file.
        net: A network of the file's architecture, for one that timm cannot make. Its weights are replaced.
        predictor_classes: Predictors of your own that the file may name.
        max_gib: Largest network, in GiB of weights. A small file can describe a large one.

    Raises:
        FileFormatError: If the file is missing, damaged, of another version, describes what cannot be built, or needs a
            network or a predictor class that is not given.
    """
    contents = read_container(Path(path))
    try:
        return _built(contents, Path(path), net, predictor_classes, max_gib)
    except FileFormatError:
        raise
    except (NernlitError, RuntimeError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise FileFormatError(f"{path} describes a representation that cannot be built: {reason}") from error


def part_bytes(contents: Contents) -> dict[str, int]:
    """Bytes of each part of a file's tensors: `predictor`, `order`, `kept` and `scale`."""
    sizes = dict.fromkeys(("predictor", "order", "kept", "scale"), 0)
    for name, value in contents.tensors.items():
        sizes[name.partition(".")[0]] += value.nbytes
    return sizes


def _contents(representation: Representation) -> Contents:
    original, layout = representation.original, representation.layout
    predicted = {key for layer in layout.layers for key in (layer.key, *layer.aliases)}
    names = names_of_weights(original.net)
    state = original.net.state_dict()
    kept = {k: v for k, v in state.items() if k not in predicted and names[k][0] == k}
    reconstructed = representation.reconstructed()
    header = {
        "network": original.architecture,
        "network_class": original.name,
        "num_classes": original.num_classes,
        "in_chans": original.in_chans,
        "class_names": list(original.class_names),
        "mean": original.mean.flatten().tolist(),
        "std": original.std.flatten().tolist(),
        "specification": representation.specification(),
        "original": {
            "sha256": original.fingerprint(),
            "bytes": len(serialized({k: v.contiguous() for k, v in state.items() if names[k][0] == k})),
        },
        "reconstructed": {"sha256": fingerprint(reconstructed), "norms": _norms(layout, reconstructed)},
    }
    tensors = {
        "scale": representation.scale,
        "order": pack_order(layout, representation.addresses, representation.order),
        **{f"predictor.{name}": value for name, value in representation.predictor.state_dict().items()},
        **{f"kept.{name}": value for name, value in kept.items()},
    }
    return Contents(header, tensors)


def _norms(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, float]:
    return {layer.key: float(state[layer.key].double().norm()) for layer in layout.layers}


def _built(
    contents: Contents,
    path: Path,
    net: nn.Module | None,
    predictor_classes: Sequence[type[Predictor]],
    max_gib: float,
) -> Representation:
    header, tensors = contents
    specification = header["specification"]
    kept = {name.removeprefix("kept."): value for name, value in tensors.items() if name.startswith("kept.")}
    original = _original(header, specification, kept, path, net, max_gib)
    layers = list(specification["layers"])
    layout = Layout.of(original.net, LayerFilter(include=[_escaped(key.removesuffix(".weight")) for key in layers]))
    described = {layer.key: list(layer.shape) for layer in layout.layers}
    if described != specification["layers"] or list(described) != layers:
        raise LayoutError("its layers are not those of its network.")
    order = specification["order"]
    if order not in get_args(OrderName):
        raise LayoutError(f"it has an unknown order, {order!r}.")
    address_N3 = unpack_order(layout, tensors["order"], order)
    scale = tensors["scale"]
    if scale.shape != () or scale.dtype != torch.float32 or not bool(scale.isfinite()):
        raise LayoutError("its scale is no finite number.")
    predictor = _predictor(specification["predictor"], tensors, predictor_classes)
    _require_memory(layout.num_kernels * predictor.kernel_size**2, path, max_gib)
    representation = Representation.of_parts(
        original, predictor, layout, order, bool(specification["standardize"]), address_N3, scale
    )
    representation.adopt_reconstruction()
    stored, found = header["reconstructed"]["norms"], _norms(layout, representation.original.net.state_dict())
    for key, norm in found.items():
        if not math.isclose(norm, stored[key], rel_tol=_TOLERANCE):
            raise FileFormatError(
                f"{path} decodes to another network than it was written from: the weights of {key!r} have norm "
                f"{norm:.6g} instead of {stored[key]:.6g}. Its architecture has changed in this version of timm or "
                "nernlit; use the versions that wrote it."
            )
    original.weights_from = str(path)
    return representation


def _escaped(name: str) -> str:
    """A shell pattern that matches this name only."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def _original(
    header: Mapping[str, Any],
    specification: Mapping[str, Any],
    kept: Mapping[str, Tensor],
    path: Path,
    net: nn.Module | None,
    max_gib: float,
) -> Original:
    """The network with its kept tensors; what is predicted is still random."""
    architecture = header["network"]
    if net is None:
        if architecture is None:
            raise FileFormatError(
                f"{path} holds a {str(header['network_class'])[:100]} that timm cannot make; pass a network of this "
                "architecture: nernlit.load(path, net=...)."
            )
        _require_fitting_architecture(architecture, specification, kept, path, max_gib)
        original = Original(**architecture, mean=header["mean"], std=header["std"])
    else:
        original = Original.of(net, header["num_classes"], header["mean"], header["std"], header["in_chans"])
        original.name = str(header["network_class"])
        original.architecture = architecture
    state = original.net.state_dict()
    names = names_of_weights(original.net)
    predicted = {name for key in specification["layers"] for name in names.get(key, ())}
    wrong = [
        key
        for key, value in state.items()
        if key not in predicted
        and (
            names[key][0] not in kept
            or kept[names[key][0]].shape != value.shape
            or kept[names[key][0]].dtype != value.dtype
        )
    ]
    wrong += [key for key in kept if key not in state or key in predicted]
    if wrong:
        raise FileFormatError(f"{path} does not fit {original.name}: {', '.join(wrong[:3])} is missing or wrong.")
    original.net.load_state_dict({**state, **{key: kept[names[key][0]] for key in state if key not in predicted}})
    original.class_names = tuple(str(name) for name in header["class_names"])
    return original


def _require_fitting_architecture(
    architecture: Mapping[str, Any],
    specification: Mapping[str, Any],
    kept: Mapping[str, Tensor],
    path: Path,
    max_gib: float,
) -> None:
    """Compare the architecture's shapes with the file's before any memory is taken for them."""
    if not isinstance(architecture, dict) or not architecture.keys() <= {"name", "num_classes", "in_chans"}:
        raise FileFormatError(f"{path} describes its network by unknown options.")
    if not isinstance(architecture["name"], str) or not timm.is_model(architecture["name"]):
        raise FileFormatError(
            f"{path} holds a network that this timm does not know: {str(architecture['name'])[:100]}."
        )
    with torch.device("meta"):
        net = timm.create_model(architecture["name"], **_shape(architecture))
    shapes, names = {key: list(value.shape) for key, value in net.state_dict().items()}, names_of_weights(net)
    _require_memory(sum(math.prod(shape) for shape in shapes.values()), path, max_gib)
    given = {**{key: list(value.shape) for key, value in kept.items()}, **specification["layers"]}
    odd = [key for key in {**shapes, **given} if shapes.get(key) != given.get(names.get(key, (key,))[0])]
    if odd:
        raise FileFormatError(f"{path} does not fit {architecture['name']}: {', '.join(odd[:3])} is missing or wrong.")


def _require_memory(numbers: int, path: Path, max_gib: float) -> None:
    gib = 4 * numbers / _GIB
    if gib > max_gib:
        raise FileFormatError(f"{path} describes a network of {gib:.3g} GiB; pass max_gib={math.ceil(gib)} to load it.")


def _shape(architecture: Mapping[str, Any]) -> dict[str, Any]:
    return {key: architecture[key] for key in ("num_classes", "in_chans") if key in architecture}


def _predictor(
    described: Mapping[str, Any], tensors: Mapping[str, Tensor], predictor_classes: Sequence[type[Predictor]]
) -> Predictor:
    own = [getattr(predictors, name) for name in predictors.__all__]
    known = [*predictor_classes, *(cls for cls in own if isinstance(cls, type) and issubclass(cls, Predictor))]
    by_path = {f"{cls.__module__}.{cls.__qualname__}": cls for cls in known}
    path = str(described["class_path"])
    if path not in by_path:
        raise FileFormatError(f"the file's predictor is a {path[:100]}; pass the class: predictor_classes=[...].")
    state = {n.removeprefix("predictor."): v for n, v in tensors.items() if n.startswith("predictor.")}
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in by_path[path](**described["init_args"]).state_dict().items()}
    if shapes != {name: value.shape for name, value in state.items()}:
        raise LayoutError("its predictor's tensors are not those of its predictor's description.")
    predictor: Predictor = by_path[path](**described["init_args"])
    predictor.load_state_dict(state)
    return predictor
