import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, SingleDeviceStrategy

from nernlit.errors import UsageError
from nernlit.training import ReconOnly, refuse_sharded_strategies
from tests.fakes import quiet_trainer, tiny_representation


@pytest.mark.parametrize(
    "strategy",
    ["fsdp", "fsdp_cpu_offload", "deepspeed", "model_parallel", "lightning.pytorch.strategies.FSDPStrategy"],
)
def test_strategies_that_split_parameters_are_refused_by_name(strategy: str) -> None:
    message = f"--trainer.strategy {strategy} splits parameters over devices, and every process needs the whole"
    with pytest.raises(UsageError, match=message):
        refuse_sharded_strategies(strategy)


def test_objects_are_refused_as_names_are() -> None:
    for strategy in (FSDPStrategy(), ModelParallelStrategy()):
        with pytest.raises(UsageError, match=f"{type(strategy).__name__} splits parameters over devices"):
            refuse_sharded_strategies(strategy)
    for allowed in ("auto", "ddp", "ddp_find_unused_parameters_true", DDPStrategy(), SingleDeviceStrategy()):
        refuse_sharded_strategies(allowed)


def test_a_fit_checks_its_strategy_first(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ReconOnly(tiny_representation(), optimizer=torch.optim.Adam)
    trainer = quiet_trainer(max_epochs=1)
    monkeypatch.setattr(L.Trainer, "strategy", FSDPStrategy())
    module._trainer = trainer
    with pytest.raises(UsageError, match="FSDPStrategy splits parameters"):
        module.configure_callbacks()
