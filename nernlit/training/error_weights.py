"""The weights of reconstruction errors in a fit: computed at its start by the option `sensitivity`, then unchanged.

Shapes: N kernels, K kernel side.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, final

import torch
from torch import Tensor

from nernlit.errors import CheckpointError, UsageError
from nernlit.kernels import Layout
from nernlit.predictors import Table
from nernlit.representation import Representation
from nernlit.training.filter_errors import FilterErrors, FilterWeights
from nernlit.training.sensitivity import Sensitivity, error_weights, weights_of_filters
from nernlit.utilities.constants import WithConstants
from nernlit.utilities.processes import Processes


@final
class ErrorWeights(WithConstants):
    """How much the squared error of each entry of the kernel table counts in a fit.

    Args:
        option: Says how they are computed.
        representation: The representation that is trained.
        reconstructs: Whether the error of weights is in the loss.

    Raises:
        UsageError: If they have no effect in this fit.
    """

    #: The weights (N, K, K); None for equal ones, for `kronecker`, and before they are computed.
    table: Tensor | None = None
    #: The error of filters, for `kronecker`; None before it is computed.
    filters: FilterErrors | None = None

    def __init__(self, option: Sensitivity, representation: Representation, reconstructs: bool) -> None:
        super().__init__()
        _require_effect(option, representation, reconstructs)
        self.option = option

    @property
    def are_missing(self) -> bool:
        """Whether a fit has to compute them; a resumed fit loads them from its checkpoint."""
        return self.option.kind != "none" and self.table is None and self.filters is None

    def compute(
        self,
        representation: Representation,
        data: Any,
        device: torch.device,
        processes: Processes,
        broadcast: Callable[[Any], Any],
    ) -> None:
        """Compute the weights, bitwise the same on all processes.

        Args:
            representation: The representation that is trained.
            data: The datamodule, after its setup.
            device: The device to compute them on.
            processes: The processes of the fit, which share the images.
            broadcast: Returns the first process's value on all processes.
        """
        representation.original.to(device)
        images = self.option.images(data, processes)
        if self.option.kind == "kronecker":
            weights = broadcast(weights_of_filters(representation, self.option, images, processes))
            self._set_filters(representation.layout, weights, representation.target.device)
        else:
            table_NKK: Tensor = broadcast(error_weights(representation, self.option, images, processes))
            self.set_constant("table", table_NKK.to(representation.target.device))

    def _set_filters(self, layout: Layout, weights: FilterWeights, device: torch.device) -> None:
        self.set_constant("filters", FilterErrors(layout, weights).to(device))

    def checkpoint(self) -> dict[str, Any] | None:
        """What a checkpoint holds of them; None if they are equal."""
        if self.filters is not None:
            return {"options": asdict(self.option), "filters": self.filters.weights()}
        return None if self.table is None else {"options": asdict(self.option), "error_weights": self.table}

    def load(self, stored: Mapping[str, Any] | None, representation: Representation) -> None:
        """Take over the weights of a checkpoint.

        Raises:
            CheckpointError: If they are those of other layers.
        """
        if stored is not None and "filters" in stored:
            layers = representation.layout.layers
            shapes = {layer.key: (layer.shape[0], layer.weights // layer.shape[0]) for layer in layers}
            if {key: (len(own), len(root)) for key, (own, root) in stored["filters"].items()} != shapes:
                raise CheckpointError(
                    "the checkpoint's sensitivities are of other layers; pass the configuration of its fit."
                )
            self._set_filters(representation.layout, stored["filters"], representation.target.device)
        elif stored is not None:
            self.set_constant("table", stored["error_weights"].to(representation.target.device))

    def require_same_options(self, stored: Mapping[str, Any] | None) -> None:
        """Refuse to resume a fit with another sensitivity than it was fitted with.

        Args:
            stored: What its checkpoint holds of the weights.

        Raises:
            CheckpointError: If the options differ.
        """
        if self.option.kind == "none" and stored is None:
            return
        own, fitted = asdict(self.option), "none" if stored is None else stored["options"]
        if fitted != own:
            raise CheckpointError(
                f"the checkpoint's fit had sensitivity {fitted}, this one has {own}; pass the same options, or start a "
                "new fit."
            )


def changes_fit(representation: Representation) -> bool:
    """Whether error weights change the initialization of the predictor: a new predictor whose `fit` is lossy."""
    inner = representation.predictor.unquantized
    return inner.is_fitted and not isinstance(inner, Table) and representation.is_new


def _require_effect(option: Sensitivity, representation: Representation, reconstructs: bool) -> None:
    if option is None:  # the option parser lets null pass
        raise UsageError("sensitivity: null; expected its options. With kind: none all weights count alike.")
    if option.kind == "kronecker" and changes_fit(representation):
        raise UsageError(
            f"sensitivity kronecker weighs the errors of whole filters, and {type(representation.predictor).__name__} "
            "chooses the code of each kernel by itself; pass fisher."
        )
    if option.kind != "none" and not reconstructs and not changes_fit(representation):
        raise UsageError(
            f"sensitivity {option.kind} has no effect: the error of weights is not in the loss, and no codes are "
            "computed here. Pass steps or a weight of reconstruction, or leave it out."
        )
