"""Progress of work that may take seconds, on stderr."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress

#: Work that is done sooner shows nothing.
DELAY_SECONDS = 2.0


@contextmanager
def progress(description: str, total: int, delay: float = DELAY_SECONDS) -> Iterator[Callable[[int], None]]:
    """Show how far the work in the block is, once it has taken `delay` seconds.

    A terminal shows a bar that vanishes at the end, anything else (a log file) gets one line. In a group of processes
    the first one of each machine shows it.

    Args:
        description: What is done: "decoding 50,000 images".
        total: Units of work.
        delay: Seconds.

    Yields:
        A function that takes the units done since its last call; threads may call it.
    """
    console = Console(stderr=True)
    bar = Progress(console=console, transient=True)
    task = bar.add_task(description, total=total)
    started = time.monotonic()
    shown = os.environ.get("LOCAL_RANK", "0") != "0"

    def advance(done: int) -> None:
        nonlocal shown
        bar.advance(task, done)
        if shown or time.monotonic() - started < delay:
            return
        shown = True
        if console.is_terminal:
            bar.start()
        else:
            console.print(f"{description} ...", highlight=False, soft_wrap=True)

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()
