"""Command-line entry point. Do not define classes here: YAML cannot name a class of `__main__`.

`nernlit --help` imports neither PyTorch nor Lightning, which take seconds to import.
"""

import os
import sys
import threading

from nernlit import __version__
from nernlit.utilities.signals import SIGNALS, Interrupted

HELP = """usage: nernlit COMMAND -c CONFIG [options]      (also `lightning ...` and `python -m nernlit ...`)

Store a trained CNN as a small coordinate network.

commands:
  configs     list the shipped configurations, one for every cell of the paper's tables, or copy one
  fit         train as configured; --ckpt_path last resumes the newest run
  validate    measure a checkpoint on the validation images
  test        measure a checkpoint, or a .nern file, on the test images
  predict     write a checkpoint's reconstructed CNN as safetensors
  compress    compress a trained network into a small .nern file and measure its accuracy
  compare     compress a network by several methods: one table and one figure of accuracy and bytes
  export      write a trained run as a self-contained .nern file, or as ONNX
  inspect     show the contents of a .nern file and the size of each part in bytes
  reconstruct write a .nern file's network as safetensors
  sweep       fit configurations at several widths and seeds, test each, tabulate and compare
  search      search for the options with the best validation metric (needs optuna)
  analyze     spectrum, layers, interpolate, landscape, rounds or smooth: a table and a figure of a finished fit
  report      one HTML page about a finished fit, or several side by side
  doctor      check the installation: versions, devices, speed, caches

  -c CONFIG   shipped configurations by name, or YAML files; several are merged in order
  --import M  import a module of the working directory, which registers a network or defines a predictor
  --trust     import any module that a configuration or a checkpoint names, which runs its code
  --debug     show the traceback of an error
  --version   show the version

`nernlit COMMAND --help` lists a command's options, `nernlit COMMAND -c CONFIG --print_config` shows their values.
"""


def main() -> None:
    """Entry of `lightning`, `nernlit` and `python -m nernlit`."""
    if sys.argv[1:] == ["--version"]:
        print(f"nernlit {__version__}")
        raise SystemExit(0)
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        print(HELP, end="")
        raise SystemExit(0 if sys.argv[1:] else 2)
    SIGNALS.listen(ends_process=True)
    try:
        if sys.argv[1:] == ["doctor"]:
            # Before the imports below, so that doctor can report a library that cannot be imported.
            from nernlit.cli.doctor import main as examine

            return examine([])
        from nernlit.cli.main import main as run_command
        from nernlit.cli.main import report_failed_thread

        threading.excepthook = report_failed_thread
        try:
            run_command()
        finally:
            if sys.stdout is not None:  # it may be closed
                sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout, such as `head`, has ended: end as SIGPIPE would
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except Interrupted as interrupted:
        if interrupted.message:
            print(f"nernlit: {interrupted.message}", file=sys.stderr)
        raise
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):  # rich ends with 1
            raise SystemExit(141) from None
        raise


if __name__ == "__main__":
    main()
