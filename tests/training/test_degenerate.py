"""Unusual numbers: every scheme and predictor works with them, or refuses them by name."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nernlit.errors import NernlitError
from nernlit.kernels import Uniform
from nernlit.originals import Original
from nernlit.predictors import MLP, Codebooks, Quantize, Table
from nernlit.representation import Representation, load
from nernlit.training import BaselineJoint, DecoupledDistill, Progressive, ReconOnly, ReconstructionPhase, Scheme
from tests.fakes import STATISTICS, quiet_trainer


class _Net(nn.Module):
    """Convolutions one after the other, and a linear layer."""

    def __init__(self, *convolutions: nn.Conv2d) -> None:
        super().__init__()
        self.convs = nn.ModuleList(convolutions)
        self.head = nn.Linear(convolutions[-1].out_channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = torch.relu(conv(x))
        return self.head(x.mean((2, 3)))


def _plain() -> _Net:
    return _Net(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3))


def _filled(change: Callable[[list[Tensor]], None]) -> Callable[[], _Net]:
    def net() -> _Net:
        made = _plain()
        with torch.no_grad():
            change([conv.weight for conv in made.convs])
        return made

    return net


NETS: dict[str, Callable[[], _Net]] = {
    "zero kernels": _filled(lambda weights: weights[1][:, :2].zero_()),
    "a layer of zeros": _filled(lambda weights: weights[1].zero_()),
    "a filter of zeros": _filled(lambda weights: weights[1][1].zero_()),
    "constant layers": _filled(lambda weights: [weight.fill_(0.1) for weight in weights]),
    "one filter": lambda: _Net(nn.Conv2d(1, 1, 3)),
    "1x1 only": lambda: _Net(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 1)),
    "depthwise": lambda: _Net(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4)),
    "tiny": _filled(lambda weights: [weight.mul_(1e-30) for weight in weights]),
    "only zeros": _filled(lambda weights: [weight.zero_() for weight in weights]),
    "huge": _filled(lambda weights: [weight.mul_(1e25) for weight in weights]),
}
#: What is refused, and how.
REFUSED: dict[str, str] = {
    "only zeros": r"all weights of the predicted layers \(convs\.0, convs\.1\) are 0",
    "huge": "the original's weights or logits on the val images are not finite|at step [01] train/(kd|features) is nan",
}
PREDICTORS: dict[str, Callable[[], dict[str, Any]]] = {
    "mlp": lambda: {"predictor": MLP(4, 2, num_frequencies=2)},
    "quantized mlp": lambda: {"predictor": MLP(4, 2, num_frequencies=2), "quantize": Quantize(4.0)},
    "table": lambda: {"predictor": Table()},
    "quantized table": lambda: {"predictor": Table(scale="layer"), "quantize": Quantize(3.0)},
    "codebooks": lambda: {"predictor": Codebooks(2, 2, scale="filter")},
}


def _adam(params: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3)


SCHEMES: dict[str, Callable[[Representation], Scheme]] = {
    "recon": lambda representation: ReconOnly(representation, _adam, sampling=Uniform(8)),
    "recon bf16": lambda representation: ReconOnly(representation, _adam, sampling=Uniform(8), precision="bf16"),
    "joint": lambda representation: BaselineJoint(representation, _adam, taps=["convs.0"]),
    "decoupled": lambda representation: DecoupledDistill(
        representation, optimizer=_adam, reconstruction=ReconstructionPhase(1)
    ),
    "progressive": lambda representation: Progressive(representation, optimizer=_adam, rounds=2, trials=2),
}


#: Every predictor under two schemes, and every scheme with two predictors.
CASES = [(scheme, predictor) for scheme in ("recon", "decoupled") for predictor in PREDICTORS]
CASES += [
    (scheme, predictor) for scheme in ("recon bf16", "joint", "progressive") for predictor in ("mlp", "quantized table")
]


def _fit(net: str, scheme: str, predictor: str) -> Representation:
    torch.manual_seed(0)
    original = Original.from_module(NETS[net](), 3, **STATISTICS, in_chans=1)
    images = [(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])) for _ in range(2)]
    data = DataLoader(images, batch_size=None)  # type: ignore[arg-type]  # a list is a dataset
    representation = Representation(original, **PREDICTORS[predictor]())
    trainer = quiet_trainer(max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(SCHEMES[scheme](representation), data, data)
    assert trainer.callback_metrics["val/recon_rmse"].isfinite()
    assert 0 <= trainer.callback_metrics["val/acc"] <= 1
    return representation


@pytest.mark.filterwarnings("ignore:.*logits are not finite")
@pytest.mark.parametrize("net", NETS)
def test_unusual_numbers_work_or_are_refused_by_name(net: str) -> None:
    for scheme, predictor in CASES:
        if net in REFUSED:
            with pytest.raises(NernlitError, match=REFUSED[net]):
                _fit(net, scheme, predictor)
            continue
        representation = _fit(net, scheme, predictor)
        weights = representation.weights()
        assert all(bool(weight.isfinite().all()) for weight in weights.values()), (scheme, predictor)
        representation.eval().save("net.nern")
        stored = load("net.nern", net=NETS[net]()).reconstructed()
        for key, weight in weights.items():
            assert torch.allclose(stored[key], weight, rtol=2e-3, atol=1e-2 * float(weight.abs().max())), (scheme, key)
