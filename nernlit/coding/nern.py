"""The .nern file: everything from which a network's weights are computed, without the network that they came from.

It holds the predictor, the packed order, the scale, every tensor of the network that is not predicted, and a header
that says how the network, the layout and the predictor are built. Numbers are stored as they are. Decoding needs no
network: the header has the shape of every predicted weight.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final, get_args

import torch
from torch import Tensor

from nernlit import predictors
from nernlit.coding.prediction import bind, predicted_weights, require_kernel_size
from nernlit.errors import FileFormatError, LayoutError, NernlitError, UsageError
from nernlit.kernels import Layout, OrderName, pack_order, unpack_order
from nernlit.predictors import Predictor
from nernlit.storage.container import Contents, container_bytes, fingerprint, read_container, write_container
from nernlit.utilities.progress import progress

_SUFFIX = ".nern"
_GIB = 2**30
#: How much a layer's norm may differ from the stored one: machines add numbers in different orders.
_TOLERANCE = 1e-3


def is_nern(path: str | Path) -> bool:
    """Whether a file is a .nern file, by its name."""
    return Path(path).suffix == _SUFFIX


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turn the errors of building what a file describes into one that names the file.

    Raises:
        FileFormatError: In place of any error that a wrong description can cause.
    """
    try:
        yield
    except FileFormatError:
        raise
    except (NernlitError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise FileFormatError(f"{path} describes a representation that cannot be built: {reason}") from error


@final
@dataclass(frozen=True)
class NernFile:
    """The content of a .nern file.

    Attributes:
        path: The file.
        header: How the network and the representation are built, in primitives.
        predictor: Maps addresses to kernels; bound to the layout.
        layout: Which weights are predicted, in which rows of the table of kernels.
        addresses: Address of every row, (N, 3).
        scale: Weight units of the predictor's unit, a scalar.
        kept: The tensors that are not predicted, each under its first name.
    """

    path: Path
    header: Mapping[str, Any]
    predictor: Predictor
    layout: Layout
    addresses: Tensor
    scale: Tensor
    kept: Mapping[str, Tensor]

    @property
    def specification(self) -> dict[str, Any]:
        """How the representation is built; see `Representation.specification`."""
        specification: dict[str, Any] = self.header["specification"]
        return specification

    @property
    def order(self) -> OrderName:
        """How kernels are numbered."""
        order: OrderName = self.specification["order"]
        return order

    @classmethod
    def read(
        cls, path: str | Path, predictor_classes: Sequence[type[Predictor]] = (), max_gib: float | None = None
    ) -> Self:
        """Read a file. Nothing that it names is imported or executed.

        Args:
            path: The file.
            predictor_classes: Predictors of your own that the file may name, beside this package's.
            max_gib: Most memory that decoding may need, in GiB; 8 by default. A small file can describe much.

        Raises:
            FileFormatError: If the file is missing, damaged, of another version, describes what cannot be built, or
                needs a predictor class that is not given.
        """
        path, limit = Path(path), 8.0 if max_gib is None else max_gib
        header, tensors = read_container(path)
        with unreadable(path):
            specification = header["specification"]
            layout = _layout(specification)
            # While addresses are unpacked, they take three numbers of 8 bytes per kernel.
            _require_memory(layout.num_weights + 6 * layout.num_kernels, path, limit)
            order = specification["order"]
            if order not in get_args(OrderName):
                raise LayoutError(f"it has an unknown order, {order!r}.")
            scale = tensors["scale"]
            if scale.shape != () or scale.dtype != torch.float32 or not bool(scale.isfinite()):
                raise LayoutError("its scale is no finite number.")
            predictor = _predictor(specification["predictor"], tensors, predictor_classes)
            require_kernel_size(predictor, layout)
            _require_memory(layout.num_kernels * predictor.kernel_size**2, path, limit)
            addresses_N3 = unpack_order(layout, tensors["order"], order)
            bind(predictor, addresses_N3)
            kept = {name.removeprefix("kept."): value for name, value in tensors.items() if name.startswith("kept.")}
            return cls(path, header, predictor, layout, addresses_N3, scale, kept)

    @property
    def packed_order(self) -> Tensor:
        """The addresses as the bits that a decoder needs, (P,) uint8."""
        return pack_order(self.layout, self.addresses, self.order)

    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The network's state dict, with predicted weights as float32.

        Raises:
            FileFormatError: If what the predictor gives is not what the file was written from.
        """
        with unreadable(self.path):
            kernels = self.layout.num_kernels
            with progress(f"predicting {kernels:,} kernels", kernels) as advance:
                weights = predicted_weights(
                    self.predictor, self.predictor.kernel_size, self.layout, self.addresses, self.scale, advance
                )
            self._require_norms(weights)
            aliases = {layer.key: layer.aliases for layer in self.layout.layers} | self.header["aliases"]
            named = [
                (name, value)
                for key, value in [*self.kept.items(), *weights.items()]
                for name in (key, *aliases.get(key, ()))
            ]
            state = dict(named)
            if len(state) < len(named):
                raise LayoutError("it has two tensors of one name.")
        return state

    def _require_norms(self, weights: Mapping[str, Tensor]) -> None:
        stored = self.header["reconstructed"]["norms"]
        for key, norm in norms(self.layout, weights).items():
            if not math.isclose(norm, float(stored[key]), rel_tol=_TOLERANCE):
                raise FileFormatError(
                    f"{self.path} decodes to another network than it was written from: the weights of {key!r} have "
                    f"norm {norm:.6e} instead of {stored[key]}. The predictor gives other values in this version "
                    "of nernlit or torch; use the versions that wrote the file."
                )

    def write(self) -> None:
        """Write the file, whole or not at all.

        Raises:
            StorageError: If the file cannot be written.
            UsageError: If the path does not end in .nern.
        """
        if not is_nern(self.path):
            raise UsageError(f"{self.path}: expected a file name that ends in {_SUFFIX}.")
        write_container(self.path, self._contents())

    def num_bytes(self) -> int:
        """The exact size of the file that `write` writes. It depends on names and shapes, not on trained values."""
        return len(container_bytes(self._contents()))

    def _contents(self) -> Contents:
        tensors = {
            "scale": self.scale,
            "order": self.packed_order,
            **{f"predictor.{name}": value for name, value in self.predictor.state_dict().items()},
            **{f"kept.{name}": value for name, value in self.kept.items()},
        }
        return Contents(dict(self.header), tensors)


def decoded_header(layout: Layout, state: Mapping[str, Tensor], names: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """What the header says of the reconstructed network. As JSON, it is equally long for all values of the weights.

    Args:
        layout: The predicted weights.
        state: The reconstructed network's state dict.
        names: Each of its keys -> all keys of the same tensor.

    Raises:
        UsageError: If a predicted weight is not finite.
    """
    predicted = {layer.key for layer in layout.layers}
    aliases = {k: list(names[k][1:]) for k in state if names[k][0] == k and len(names[k]) > 1 and k not in predicted}
    own_norms = norms(layout, state)
    if wrong := [key for key, norm in own_norms.items() if not math.isfinite(norm)]:
        raise UsageError(f"the predicted weights of {wrong[0]!r} are not finite; use a checkpoint of a better step.")
    fixed = {key: f"{norm:.6e}" for key, norm in own_norms.items()}
    return {"aliases": aliases, "reconstructed": {"sha256": fingerprint(state), "norms": fixed}}


def norms(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, float]:
    """The Euclidean norm of each predicted weight."""
    return {layer.key: float(state[layer.key].double().norm()) for layer in layout.layers}


def part_bytes(contents: Contents) -> dict[str, int]:
    """Bytes of each part of a file's tensors: `predictor`, `order`, `kept` and `scale`."""
    sizes = dict.fromkeys(("predictor", "order", "kept", "scale"), 0)
    for name, value in contents.tensors.items():
        sizes[name.partition(".")[0]] += value.nbytes
    return sizes


def _layout(specification: Mapping[str, Any]) -> Layout:
    layers = [(key, tuple(shape)) for key, shape in specification["layers"].items()]
    if any(len(shape) != 4 or any(type(size) is not int or size < 1 for size in shape) for _, shape in layers):
        raise LayoutError("the shapes of its layers are not four positive whole numbers each.")
    aliases = {key: tuple(names) for key, names in specification.get("aliases", {}).items()}
    return Layout(layers, aliases)


def _require_memory(numbers: int, path: Path, max_gib: float) -> None:
    gib = 4 * numbers / _GIB
    if gib > max_gib:
        raise FileFormatError(
            f"decoding {path} needs {gib:.3g} GiB; pass max_gib={math.ceil(gib)} to load it if you trust the file."
        )


def _predictor(
    described: Mapping[str, Any], tensors: Mapping[str, Tensor], predictor_classes: Sequence[type[Predictor]]
) -> Predictor:
    ours = [getattr(predictors, name) for name in predictors.__all__]
    known = [*predictor_classes, *(cls for cls in ours if isinstance(cls, type) and issubclass(cls, Predictor))]
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
