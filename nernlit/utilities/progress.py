"""Progress bars on stderr for work that may take seconds, and readable durations."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

T = TypeVar("T")

#: Shared by all progress bars of a process, so that one may start while another is shown.
CONSOLE = Console(stderr=True)

#: Work that takes less time shows nothing.
DELAY_SECONDS = 2.0


@contextmanager
def progress(description: str, total: int, delay: float = DELAY_SECONDS) -> Iterator[Callable[[int], None]]:
    """Show the progress of the block once it has taken `delay` seconds.

    A terminal shows a bar that is removed at the end; other outputs, such as a log file, get one line. With several
    processes only the first one of each machine shows it.

    Args:
        description: What is done, such as "decoding 50,000 images".
        total: Units of work.
        delay: Seconds before anything is shown.

    Yields:
        A function to call with the units done since its last call; it is thread-safe.
    """
    bar = Progress(console=CONSOLE, transient=True)
    task = bar.add_task(escape(description), total=total)

    def show() -> None:
        if CONSOLE.is_terminal:
            bar.start()
        else:
            CONSOLE.print(f"{description} ...", highlight=False, soft_wrap=True, markup=False)

    # In a separate thread, because the first unit of work may take minutes.
    timer = threading.Timer(delay, show)
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":
        timer.start()
    try:
        yield lambda done: bar.advance(task, done)
    finally:
        timer.cancel()
        if timer.is_alive():
            timer.join()
        if bar.live.is_started:
            bar.stop()


def counted(items: Iterable[T], advance: Callable[[int], None]) -> Iterator[T]:
    """The items; each counts as done when the next one is asked for."""
    for item in items:
        yield item
        advance(1)


def duration(seconds: float) -> str:
    """A duration in words.

    >>> [duration(seconds) for seconds in (0.4, 59, 61, 200, 5400)]
    ['1 second', '59 seconds', '1 minute', '3 minutes', '1.5 hours']
    """
    if seconds < 60:
        number, unit = f"{max(1, round(seconds))}", "second"
    elif seconds < 3600:
        number, unit = f"{round(seconds / 60)}", "minute"
    else:
        number, unit = f"{seconds / 3600:.1f}", "hour"
    return f"{number} {unit}{'' if number == '1' else 's'}"


def clock(seconds: float) -> str:
    """Seconds as `h:mm:ss`.

    >>> clock(3725.9)
    '1:02:05'
    """
    minutes, second = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
