"""Evaluation of a scheme's networks: reconstruction errors, and a cache of the original's results."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

from torch import Tensor

from nernlit.losses import explained_power, reconstruction_rmse
from nernlit.representation import Representation
from nernlit.training.divergence import all_finite

#: Suffix of the metrics' names -> predicted weights: state-dict key -> weight.
Networks = dict[str, dict[str, Tensor]]
_ORIGINAL = "_original"


@final
class Measurements:
    """The networks of a representation that the evaluations of a run measure, and the original's results.

    The original does not change, so it is measured in the first evaluation of each kind only.

    Args:
        representation: The representation.
        save_options: Options of `Representation.save`: the networks are those of files that are written with them.

    Attributes:
        networks: The networks of the current evaluation; the one without a suffix is the representation's.
    """

    def __init__(self, representation: Representation, save_options: Mapping[str, Any]) -> None:
        self.networks: Networks = {}
        self._representation, self._save_options = representation, save_options
        self._original_results: dict[str, dict[str, Tensor]] = {}

    def start(self, stage: str, networks: Networks) -> dict[str, Callable[[Tensor], Tensor]]:
        """Start an evaluation: suffix -> classifier of pixels (B, C, H, W) in [0, 1].

        Args:
            stage: `val` or `test`.
            networks: The networks.
        """
        self.networks = networks
        classifiers: dict[str, Callable[[Tensor], Tensor]] = {
            suffix: partial(self._representation.original, weights=self._entries(weights))
            for suffix, weights in networks.items()
        }
        if stage not in self._original_results:
            classifiers[_ORIGINAL] = self._representation.original
        return classifiers

    def _entries(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        representation = self._representation
        # Numbers that are not finite cannot be rounded; the evaluation reports them.
        if self._save_options and all_finite(representation.tuned.parameters()):
            return representation.stored_entries(weights, **self._save_options)
        return representation.entries(weights)

    def finite_weights(self) -> dict[str, Tensor]:
        """Suffix -> whether the weights of this network are finite."""
        return {suffix: all_finite(weights.values()) for suffix, weights in self.networks.items()}

    def finish(self, stage: str, results: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
        """End an evaluation: its results with the original's and the errors of the network without a suffix.

        Args:
            stage: `val` or `test`.
            results: Name of a metric -> value.
            keep: Whether the original's results are those of all images.
        """
        of_original = {name: value for name, value in results.items() if name.endswith(_ORIGINAL)}
        if of_original and keep:
            self._original_results[stage] = of_original
        layout = self._representation.layout
        pair = layout.vector(self.networks[""]), layout.vector(self._representation.original_weights())
        self.networks = {}  # as large as the network
        return {
            **results,
            **self._original_results.get(stage, {}),
            "recon_rmse": reconstruction_rmse(*pair),
            "explained_power": explained_power(*pair),
        }
