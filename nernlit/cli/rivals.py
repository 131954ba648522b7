"""The methods of `nernlit compare`: each makes one file of a network, without training or by a fit."""

import copy
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import final

from safetensors.torch import load_file, save
from scipy.stats import entropy
from torch import Tensor

from nernlit.analysis import factorized, multiplied, pruned
from nernlit.cli.inputs import ORIGINAL
from nernlit.coding import is_nern
from nernlit.originals import Original
from nernlit.representation import Representation, load
from nernlit.storage.files import write_atomically
from nernlit.storage.weights import load_strictly, read_state_dict
from nernlit.training import Rate
from nernlit.training.compression import KEPT, quantized_table
from nernlit.utilities.sharing import names_of_weights, with_versions

#: Method -> its settings: bits per weight, or the share of the numbers that is kept (`svd`, `prune`).
SETTINGS: dict[str, tuple[float, ...]] = {
    "fp16": (16,),
    "svd": (0.75, 0.5, 0.25),
    "prune": (0.7, 0.5, 0.4, 0.3),
    "round": (8, 6, 5, 4, 3, 2),
    "round_distill": (4, 3, 2),
    "table": (3, 2, 1.5, 1),
    "codebooks": (3, 2, 1.5),
}
#: Methods whose bits can be chosen.
WITH_BITS = ("round", "round_distill", "table", "codebooks")
#: Methods that train.
TRAINED = ("round_distill", "table", "codebooks")
#: Bits of the weights that pruning keeps, and of the numbers of codewords.
_PRUNED_BITS, _CODEWORD_BITS = 6, 6
#: Bits of a code after entropy coding, and the most before it; the most
#: numbers of the codewords, as a share of the kernels' numbers.
_CODED_BITS, _MAX_CODE_BITS, _CODEWORD_SHARE = 6, 8, 0.1
_NO_RATE = "--model.rate=null"

#: A compressed network, as it is written into a file.
Network = Representation | Mapping[str, Tensor]


def rival_name(method: str, setting: float, separator: str = " ") -> str:
    """What a method with a setting is called.

    >>> rival_name("round", 4.0), rival_name("fp16", 16), rival_name("another_program", 0.5)
    ('round 4', 'fp16', 'another_program 0.5')
    """
    return method if len(SETTINGS.get(method, ())) == 1 else f"{method}{separator}{setting:g}"


@final
class Rivals:
    """The compressed forms of one network.

    Args:
        original: The network.
        options: The options of `Original`, by name.
    """

    def __init__(self, original: Original, options: Mapping[str, str]) -> None:
        self.original, self.options = original.freeze(), options

    @cached_property
    def _table(self) -> Representation:
        return quantized_table(self.original)

    @property
    def _weights(self) -> list[str]:
        return [layer.key for layer in self._table.layout.layers]

    def untrained(self, method: str, setting: float) -> Network:
        """The network by a method that does not train.

        Raises:
            UsageError: If the setting is out of its range.
        """
        state = self.original.net.state_dict()
        if method == "round":
            return quantized_table(self.original, setting, scale="filter")
        if method == "prune":
            smaller = copy.deepcopy(self.original)
            own = smaller.net.state_dict()
            for key, value in pruned({key: state[key] for key in self._weights}, setting).items():
                own[key].copy_(value)  # also under the weight's other names
            # The positions of the kept weights take bits too: the binary entropy of the density.
            bits = setting * _PRUNED_BITS + entropy([setting, 1 - setting], base=2)
            return quantized_table(smaller, float(bits), scale="filter")
        if method == "svd":
            state = factorized(state, self._weights, setting)
        names = names_of_weights(self.original.net)
        first = {key: value for key, value in state.items() if names.get(key, (key,))[0] == key}
        return {key: value.half() if value.is_floating_point() else value for key, value in first.items()}

    def fit_options(self, method: str, bits: float) -> list[str]:
        """`fit` and the options that train the network by a method."""
        representation, table = "--model.representation", self._table
        fit = ["fit", "-c", "compress", "--trainer.devices=1"]  # the user's configurations may name another
        fit += [f"{ORIGINAL}.{name}={value}" for name, value in self.options.items()]
        if method == "codebooks":
            size = table.layout.num_weights / table.layout.num_kernels
            codebooks = max(1, round(bits * size / _CODED_BITS))
            fit += [f"{representation}.predictor=Codebooks", f"{representation}.predictor.codebooks={codebooks}"]
            most = int(math.log2(_CODEWORD_SHARE * table.layout.num_kernels / size))
            code_bits = min(max(most, _CODED_BITS), _MAX_CODE_BITS)
            fit += [f"{representation}.predictor.bits={code_bits}", f"{representation}.predictor.move=0.003"]
            if code_bits > _CODED_BITS:
                fit += [f"{representation}.predictor.price={_code_price(bits, size):.2g}"]
        fit += [f"{representation}.predictor.kernel_size={json.dumps(table.predictor.kernel_size)}"]
        if method == "table":
            return [*fit, f"--model.rate.target_bits={bits:g}"]
        rounded = _CODEWORD_BITS if method == "codebooks" else bits
        return [
            *fit,
            f"{representation}.predictor.scale=filter",
            f"{representation}.quantize.bits={rounded:g}",
            _NO_RATE,
        ]

    def own_options(self, methods: Collection[str]) -> set[str]:
        """The options of a fit that these methods set, or that would change what their rows state."""
        trained = [method for method in TRAINED if method in methods]
        fits = [self.fit_options(method, setting) for method in trained for setting in SETTINGS[method]]
        named = {option.partition("=")[0] for fit in fits for option in fit if option.startswith("--model")}
        return named | {"--model.rate"} | {f"--model.rate.{field.name}" for field in fields(Rate)}

    def read(self, file: Path) -> Original:
        """The network of a file that `write` wrote."""
        if is_nern(file):
            return load(file).original
        network = copy.deepcopy(self.original)
        state = multiplied(load_file(file), network.net.state_dict())
        names = names_of_weights(network.net)
        named = {name: value for key, value in state.items() for name in names[key]}
        network.net.load_state_dict(with_versions(named, network.net.state_dict()))
        return network

    def with_weights(self, file: Path) -> Original:
        """The network with the weights of a file.

        Raises:
            CheckpointError: If the file has other weights than the network, or one is not finite.
        """
        network = copy.deepcopy(self.original)
        load_strictly(network.net, read_state_dict(file, network.net), str(file))
        return network.freeze()


def _code_price(bits: float, size: float) -> float:
    """The rate weight (`Codebooks.price`) at which a bit saves as much squared error as it costs, at `bits` per weight.

    At high rates the error is 4^-bits of the weights' power (Cover and Thomas, Elements of Information Theory, theorem
    10.3.2), so a bit more in a kernel of `size` weights saves 2 log(2) / size of it.
    """
    return 2 * math.log(2) / size * 4**-bits


def write(network: Network, folder: Path, name: str) -> Path:
    """Write a network as a .nern file, or tensors as a safetensors file.

    Raises:
        StorageError: If the file cannot be written.
    """
    if isinstance(network, Representation):
        file = folder / f"{name}.nern"
        network.eval().cpu().save(file, KEPT, fold_batch_norm=True)
    else:
        file = folder / f"{name}.safetensors"
        write_atomically(file, save({key: value.contiguous() for key, value in network.items()}))
    return file
