"""SIGTERM and SIGINT: a run ends at a safe point, with the exit codes that shells expect (143 and 130)."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import final

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds within which a signal counts as the same one: a terminal and a parent process may both send it.
_SAME = 0.5
#: Seconds that cleaning up may take where nothing is worth keeping.
_PATIENCE = 5.0


class Interrupted(SystemExit):
    """A signal ended the run. Not caught, it ends the process with 128 + the signal's number.

    Attributes:
        message: What was interrupted and how to go on; empty where another process says it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.message = "interrupted"


@final
class Signals:
    """What the process has received, and what happens when it does.

    Normally `Interrupted` is raised at once. Inside `held()` the signal is only noted, and who holds it asks `received`
    at its next safe point. A second signal ends the process at once.

    Attributes:
        received: The first signal's number.
        forward: Passes a signal on to child processes.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.forward: Callable[[int], None] | None = None
        self._held, self._released = False, False
        self._first = 0.0
        self._ends_process = False

    def listen(self, ends_process: bool = False) -> None:
        """Handle the signals from now on. Only the main thread can; in others this does nothing.

        Args:
            ends_process: The process is a command of its own: it ends within seconds even where cleaning up hangs.
        """
        self._ends_process |= ends_process
        if threading.current_thread() is threading.main_thread():
            for each in _SIGNALS:
                signal.signal(each, self._handle)

    def start_anew(self) -> None:
        """Forget what was received: a new run begins."""
        self.received = None
        self._held, self._released = False, False

    def hold(self) -> None:
        """From now on a signal is only noted."""
        self._held, self._released = True, False

    def release(self) -> None:
        """From now on a signal raises `Interrupted`, and nothing is worth keeping."""
        self._held, self._released = False, False

    @contextmanager
    def released(self) -> Iterator[None]:
        """A part of a held run that may end anywhere, because it changes nothing that is kept."""
        self.release_for_a_while()
        try:
            yield
        finally:
            self._released = False

    def release_for_a_while(self) -> None:
        """Begin such a part; `hold` ends it."""
        if self._held and self.received is not None:
            raise Interrupted(self.received)
        self._released = True

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if now - self._first > _SAME:
                _end(signum)
            return
        self.received, self._first = signum, now
        if self._held and not self._released:
            return
        if self.forward is not None:
            self.forward(signum)
        if self._ends_process and not self._held:
            watchdog = threading.Timer(_PATIENCE, _end, (signum,))
            watchdog.daemon = True
            watchdog.start()
        raise Interrupted(signum)


def _end(signum: int) -> None:
    """End the process as it is."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar may have hidden the cursor
    print("nernlit: interrupted", file=sys.stderr, flush=True)
    os._exit(128 + signum)


#: Of this process.
SIGNALS = Signals()
