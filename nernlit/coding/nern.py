"""The .nern file: everything from which a network's weights are computed, without the network that they came from.

It holds the predictor, the order, the scale, every tensor of the network that is not predicted, checks, and a
header that says how the network, the layout and the predictor are built. Decoding needs no network: the header has the
shape of every predicted weight.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, final, get_args

import torch
from torch import Tensor

from nernlit.coding.checks import Checks
from nernlit.coding.described import described_layout, described_predictor, require_memory
from nernlit.coding.kept import Kept, KeptForm, coded_numbers
from nernlit.coding.prediction import predicted_weights
from nernlit.coding.zeros import code_zeros, decode_zeros, with_zeros
from nernlit.errors import FileFormatError, LayoutError, NernlitError, UsageError, require_positive
from nernlit.kernels import Layout, OrderName, decode_order, encode_order, pack_order
from nernlit.predictors import Predictor
from nernlit.storage.container import Contents, container_bytes, read_container, write_container
from nernlit.storage.file_kinds import MAGIC
from nernlit.utilities.modes import plain_modes

_SUFFIX = ".nern"


def is_nern(path: str | Path) -> bool:
    """Whether a file is a .nern file, by its name or its first bytes: a download may have another name."""
    if Path(path).suffix.lower() == _SUFFIX:
        return True
    with suppress(OSError, ValueError):
        if Path(path).is_file():  # a pipe can be read only once
            with open(path, "rb") as file:
                return file.read(len(MAGIC)) == MAGIC
    return False


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """Turn errors while a file's content is built into one error that names the file.

    Raises:
        FileFormatError: Instead of any error that an invalid description can cause.
    """
    try:
        yield
    except FileFormatError as error:
        raise error if str(path) in str(error) else FileFormatError(f"{path}: {error}") from error
    except (NernlitError, RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:500] or type(error).__name__
        raise FileFormatError(f"{path} describes a representation that cannot be built: {reason}") from error


@final
@dataclass(frozen=True)
class NernFile:
    """The content of a .nern file.

    Attributes:
        path: The file.
        header: The description of the network and the representation, as JSON values.
        predictor: Maps addresses to kernels; bound to the layout.
        layout: The predicted weights and their rows in the kernel table.
        addresses: Address of every row, (N, 3).
        scale: One unit of the predictor's output in weight units, a scalar.
        kept: The tensors that are not predicted, each under its first name.
        checks: What is known of the network that the file was written from.
        nonzero: State-dict key -> booleans: the predicted weights that are not kept at 0; None if none is kept at 0.
    """

    path: Path
    header: Mapping[str, Any]
    predictor: Predictor
    layout: Layout
    addresses: Tensor
    scale: Tensor
    kept: Kept
    checks: Checks
    nonzero: Mapping[str, Tensor] | None = None

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
    @plain_modes()
    def read(cls, path: str | Path, max_gib: float | None = None) -> Self:
        """Read a file. It imports and executes nothing: its predictor is of a class that is imported already.

        Args:
            path: The file.
            max_gib: Limit of the memory for decoding, in GiB; 8 by default. A small file can describe a large network.

        Raises:
            FileFormatError: If the file is missing, damaged, of another version, describes what cannot be built, or
                has a predictor of a class that is not imported.
            UsageError: If `max_gib` is not above 0.
        """
        path, limit = Path(path), 8.0 if max_gib is None else max_gib
        require_positive(max_gib=limit)
        header, tensors = read_container(path)
        with unreadable(path):
            _require_valid_metadata(header)
            specification = header["specification"]
            layout = described_layout(specification)
            # While addresses are unpacked, they take three numbers of 8 bytes per kernel; kept integers take 64 bytes,
            # and positions of zeros 9.
            numbers = layout.num_weights + 6 * layout.num_kernels + 16 * coded_numbers(header["kept"])
            numbers += 3 * layout.num_weights if "zeros" in tensors else 0
            require_memory(numbers, path, limit)
            order = specification["order"]
            if order not in get_args(OrderName):
                raise LayoutError(f"it has an unknown order, {order!r}.")
            scale = tensors["scale"]
            if scale.shape != () or scale.dtype != torch.float32 or not bool(scale.isfinite()):
                raise LayoutError("its scale is not a finite number.")
            predictor = described_predictor(specification["predictor"], tensors, layout, path, limit)
            require_memory(layout.num_kernels * math.prod(predictor.block), path, limit)
            addresses_N3 = decode_order(layout, tensors["order"], order)
            kept, checks = Kept.read(header["kept"], tensors), Checks.from_tensors(tensors)
            if specification.get("keep_zeros", False) is not ("zeros" in tensors):
                raise LayoutError("the header and the tensors disagree about keep_zeros.")
            nonzero = decode_zeros(layout, tensors["zeros"]) if "zeros" in tensors else None
            return cls(path, header, predictor, layout, addresses_N3, scale, kept, checks, nonzero)

    @classmethod
    def from_network(
        cls,
        path: Path,
        header: Mapping[str, Any],
        predictor: Predictor,
        layout: Layout,
        addresses_N3: Tensor,
        scale: Tensor,
        state: Mapping[str, Tensor],
        names: Mapping[str, Sequence[str]],
        original: str,
        form: KeptForm = "fp32",
        nonzero: Mapping[str, Tensor] | None = None,
    ) -> Self:
        """The file of a reconstructed network.

        Args:
            path: The file; `write` writes it.
            header: What is known of the original, and the representation's `specification`.
            predictor: See the class.
            layout: See the class.
            addresses_N3: See the class.
            scale: See the class.
            state: The reconstructed network's state dict.
            names: Each of its keys -> all keys of the same tensor.
            original: SHA-256 of the original's weights.
            form: How the tensors that are not predicted are stored.
            nonzero: See the class.

        Raises:
            UsageError: If a predicted weight is not finite, or the form cannot store a tensor.
        """
        predicted = {key for layer in layout.layers for key in (layer.key, *layer.aliases)}
        kept = Kept.from_tensors(
            {k: value for k, value in state.items() if k not in predicted and names[k][0] == k}, form
        )
        aliases = {key: list(names[key][1:]) for key in kept.values if len(names[key]) > 1}
        stored = {name: value for key, value in kept.values.items() for name in names[key]}
        checks = Checks.from_state(original, layout, {**state, **stored})
        header = {**header, "aliases": aliases, "kept": kept.described}
        return cls(path, header, predictor, layout, addresses_N3, scale, kept, checks, nonzero)

    @property
    def packed_order(self) -> Tensor:
        """The addresses as a checkpoint has them, (P,) uint8; see `pack_order`."""
        return pack_order(self.layout, self.addresses, self.order)

    @plain_modes()
    @torch.no_grad()
    def state_dict(self) -> dict[str, Tensor]:
        """The network's state dict, with predicted weights as float32.

        Raises:
            FileFormatError: If the decoded weights differ from those that the file was written from.
        """
        with unreadable(self.path):
            block = self.predictor.block
            weights = predicted_weights(self.predictor, block, self.layout, self.addresses, self.scale)
            if self.nonzero is not None:
                weights = with_zeros(weights, self.nonzero)
            self.checks.require_norms(self.layout, weights)
            aliases = {layer.key: layer.aliases for layer in self.layout.layers} | self.header["aliases"]
            named = [
                (name, value)
                for key, value in [*self.kept.values.items(), *weights.items()]
                for name in (key, *aliases.get(key, ()))
            ]
            state = dict(named)
            if len(state) < len(named):
                raise LayoutError("two tensors have the same name.")
        return state

    def write(self) -> None:
        """Write the file atomically.

        Raises:
            StorageError: If the file cannot be written.
            UsageError: If the path does not end in .nern.
        """
        if self.path.suffix != _SUFFIX:
            raise UsageError(f"{self.path}: expected a file name that ends in {_SUFFIX}.")
        write_container(self.path, self._contents(self.predictor.stored()))

    def sizes(self) -> tuple[int, int]:
        """The exact bytes of the file that `write` writes, and the bits of the predictor's integers in it."""
        stored = self.predictor.stored()
        return len(container_bytes(self._contents(stored))), self.predictor.stored_code_bits(stored)

    def _contents(self, stored: Mapping[str, Tensor]) -> Contents:
        tensors = {
            "scale": self.scale,
            "order": encode_order(self.layout, self.addresses, self.order),
            **{f"predictor.{name}": value for name, value in stored.items()},
            **({} if self.nonzero is None else {"zeros": code_zeros(self.layout, self.nonzero)}),
            **self.kept.stored,
            **self.checks.tensors(),
        }
        return Contents(dict(self.header), tensors)


def _require_valid_metadata(header: Mapping[str, Any]) -> None:
    """Check the types of the header entries that only describe the original.

    Raises:
        LayoutError: With the entry.
    """
    counts = {name: header[name] for name in ("num_classes", "in_chans") if header[name] is not None}
    counts["original_bytes"] = header["original_bytes"]
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise LayoutError(f"{name} is {str(count)[:100]!r}; expected an integer of at least 1.")
    names = header["class_names"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise LayoutError(f"class_names is {str(names)[:100]!r}; expected a list of texts.")


def part_bytes(contents: Contents) -> dict[str, int]:
    """Bytes of each part of a file's tensors: `predictor`, `order`, `kept`, `scale`, `checks`; and `zeros`, if any."""
    sizes = dict.fromkeys(("predictor", "order", "kept", "scale", "checks"), 0)
    for name, value in contents.tensors.items():
        part = name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + value.nbytes
    return sizes
