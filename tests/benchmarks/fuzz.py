"""Fuzzing of the readers with atheris: `python -m tests.benchmarks.fuzz READER [--seconds 60]`, or `make fuzz` for all.

libFuzzer changes bytes towards branches of the package that no input has reached. An input may give a value or an error
of `nernlit.errors`; anything else stops the run and is written to a file. `pip install atheris` (Linux).
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["nernlit"]):
    import numpy as np
    import torch

    import nernlit
    from nernlit.cli.rounds import read_rounds, rounds_record
    from nernlit.cli.sweep_results import RESULT, read_results
    from nernlit.cli.sweep_table import read_rows
    from nernlit.cli.yaml_files import read_config
    from nernlit.data.decode import read_image
    from nernlit.errors import NernlitError
    from nernlit.storage.checkpoint import read_checkpoint
    from nernlit.storage.container import Contents, container_bytes, read_container
    from nernlit.storage.entropy import decode, decode_weights, encode, encode_weights
    from nernlit.storage.weights import read_state_dict
from tests.hostile_files import swept, tested, write_good_files

_GROUPS = [3, 50, 0, 7]
_PARTS = [(4, 3, 3, 3), (5, 2, 1, 1)]


_SEEDS = {
    "integers": [encode(torch.arange(60), _GROUPS).numpy().tobytes()],
    "coded_weights": [encode_weights(torch.arange(118) % 5, _PARTS).numpy().tobytes()],
    "table": [str(content).encode() for content in swept().values()],
    "result": [str(content).encode() for content in tested().values()],
}


def _bytes(content: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(content, dtype=np.uint8).copy())


def _sealed(content: bytes, path: Path) -> None:
    """A .nern file whose checksum is right, so that its header and tensors are changed and not only refused."""
    good = read_container(path.with_name("good.nern"))
    half = len(content) // 2
    tensors = {**good.tensors, "order": _bytes(content[:half])}
    header = {**good.header, "network_class": content[half:].decode("latin-1")}
    path.write_bytes(container_bytes(Contents(header, tensors)))
    nernlit.load(path)


def _written(read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    def run(content: bytes, path: Path) -> None:
        path.write_bytes(content)
        read(path)

    return run


def _rounds(path: Path) -> None:
    record = rounds_record(path.parent / "fuzzed")
    record.parent.mkdir(parents=True, exist_ok=True)
    path.replace(record)
    read_rounds(path.parent / "fuzzed")


def _result(path: Path) -> None:
    file = path.parent / "fuzzed" / "a" / "version_1" / RESULT
    file.parent.mkdir(parents=True, exist_ok=True)
    path.replace(file)
    read_results(path.parent / "fuzzed")


#: Reader -> what it does with bytes and the path of a file, and the files of `write_good_files` to start from.
READERS: dict[str, tuple[Callable[[bytes, Path], object], list[str]]] = {
    "nern": (_written(nernlit.load), ["good.nern"]),
    "sealed": (_sealed, []),
    "checkpoint": (_written(read_checkpoint), ["good.ckpt"]),
    "weights": (_written(read_state_dict), ["good.safetensors", "good.ckpt"]),
    "image": (_written(lambda path: read_image(path, 3)), ["images/train/3/0.png"]),
    "yaml": (_written(read_config), ["run/config.yaml"]),
    "rounds": (_written(_rounds), ["run/rounds/rounds.json"]),
    "table": (_written(read_rows), []),
    "result": (_written(_result), []),
    "integers": (lambda content, path: decode(_bytes(content), _GROUPS), []),
    "coded_weights": (lambda content, path: decode_weights(_bytes(content), _PARTS), []),
}


def _fuzz(reader: str, seconds: int) -> None:
    run, seeds = READERS[reader]
    folder = Path(tempfile.mkdtemp())
    write_good_files(folder)
    corpus = folder / "corpus"
    corpus.mkdir()
    contents = [(folder / seed).read_bytes() for seed in seeds]
    contents += _SEEDS.get(reader, [])
    for number, content in enumerate(contents):
        (corpus / str(number)).write_bytes(content)
    suffix = {"nern": ".nern", "sealed": ".nern", "yaml": ".yaml", "image": ".png"}.get(reader, ".bin")

    def once(content: bytes) -> None:
        with contextlib.suppress(NernlitError):  # what most inputs end with
            run(content, folder / f"input{suffix}")

    flags = [
        f"-max_total_time={seconds}",
        "-max_len=100000",
        "-timeout=30",
        "-rss_limit_mb=8000",
        f"-artifact_prefix={reader}-",
    ]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], once)
    atheris.Fuzz()


def main() -> None:
    """Fuzz one reader, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reader", nargs="?", choices=READERS)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    if options.reader is not None:
        _fuzz(options.reader, options.seconds)
        return
    for reader in READERS:
        command = [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.benchmarks.fuzz",
            reader,
            f"--seconds={options.seconds}",
        ]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=os.environ, check=False)
        last = [line for line in done.stderr.splitlines() if line.startswith("Done ")]
        print(f"{reader}: {last[-1] if last and done.returncode == 0 else done.stderr[-3000:]}", flush=True)
        if done.returncode:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
