import shutil

import pytest
import torch

from nernlit.callbacks import Compile, Throughput
from nernlit.data import DigitsDataModule
from nernlit.errors import UsageError
from nernlit.kernels import Uniform
from nernlit.originals import Original
from nernlit.training import OriginalModule, Progressive, ReconOnly, Scheme
from tests.fakes import quiet_trainer, tiny_representation


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
@pytest.mark.parametrize("scheme", [ReconOnly, Progressive])
def test_a_compiled_fit_ends_with_the_same_predictor(scheme: type[Scheme]) -> None:
    def fitted(*callbacks: Compile) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        more = {"rounds": 1, "trials": 2} if scheme is Progressive else {}
        module = scheme(tiny_representation(), optimizer=torch.optim.SGD, sampling=Uniform(16), **more)  # type: ignore[arg-type]
        data = DigitsDataModule(train_on="none", steps_per_epoch=4)
        quiet_trainer(max_epochs=1, callbacks=list(callbacks)).fit(module, datamodule=data)
        assert any(part._compiled_call_impl is not None for part in module.modules()) == bool(callbacks)
        return dict(module.named_parameters())

    plain, compiled = fitted(), fitted(Compile())
    assert plain.keys() == compiled.keys()
    for name, values in plain.items():
        assert torch.allclose(values.double(), compiled[name].double(), rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("callback", [Compile, Throughput])
def test_a_network_without_a_predictor_is_refused(callback: type[Compile] | type[Throughput]) -> None:
    module = OriginalModule(Original("digits_resnet8"), torch.optim.SGD)
    with pytest.raises(UsageError, match=f"{callback.__name__} .* predictors, and OriginalModule has none; leave it"):
        quiet_trainer(max_steps=1, callbacks=[callback()]).fit(module, datamodule=DigitsDataModule())
