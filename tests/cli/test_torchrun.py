"""The command line, started by torchrun as on two machines."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import nernlit
from nernlit.cli.main import run
from tests.fakes import QUICK

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _on_two_nodes(*line: str) -> list[str]:
    """Run a command on two "nodes" of one process each, and return what each wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=fit"]
    torchrun += ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--local_addr=127.0.0.1"]
    paths = {"PYTHONPATH": str(Path(nernlit.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    command = [*torchrun, "-m", "nernlit", *line, "--trainer.num_nodes=2", "--trainer.strategy=ddp"]
    logs = [Path(f"node{number}.log") for number in range(2)]
    nodes = []
    for log in logs:
        with log.open("w") as file:
            nodes.append(subprocess.Popen(command, env={**os.environ, **paths}, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [node.wait(timeout=800) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    written = [log.read_text() for log in logs]
    assert codes == [0, 0], "\n".join(written)
    return written


def _end_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 10
    return {key: value for key, value in checkpoint["state_dict"].items() if isinstance(value, torch.Tensor)}


def test_two_nodes_fit_like_one_process_and_test_what_they_fitted() -> None:
    one, two = ([*QUICK, "--model.precision=fp32", f"--model.sampling.batch_size={size}"] for size in (128, 64))
    run(["fit", *one, "--trainer.logger.init_args.save_dir=alone"])
    written = _on_two_nodes("fit", *two)
    assert sum("TensorBoard: tensorboard" in text for text in written) == 1  # the table of results is printed once
    (folder,) = Path("runs").glob("*/version_*")
    assert sorted(file.name for file in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert len(list(folder.glob("events*"))) == 1
    (alone,) = Path("alone").glob("*/version_*")
    expected = _end_of(alone)
    for key, value in _end_of(folder).items():
        assert torch.allclose(value, expected[key], rtol=1e-3, atol=1e-4), key
    figures = run(["test", *two, "--ckpt_path=best"]).trainer.callback_metrics
    tested = "".join(_on_two_nodes("test", *two, "--ckpt_path=best"))
    assert f"{float(figures['test/acc']):.2%}" in tested
    assert list(Path("runs").glob("*/version_*")) == [folder]
