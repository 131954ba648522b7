"""SIGTERM and SIGINT: a run ends at a safe point, with the exit codes that shells expect (143 and 130)."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import final

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
#: Seconds within which a second signal is ignored: a terminal and a parent process may both send the same one.
_SAME = 0.5
#: Seconds that cleaning up may take when no results are to be saved.
_PATIENCE = 5.0


class Interrupted(SystemExit):
    """A signal ended the run. If it is not caught, the process ends with exit code 128 + signal number.

    Attributes:
        signum: The signal's number.
        message: What was interrupted and how to resume; empty if another process prints it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum = signum
        self.message = "interrupted"


@final
class Signals:
    """Handles signals to this process.

    By default a signal raises `Interrupted` at once. Between `hold()` and `release()` it only sets `received`, which
    the caller of `hold` checks at its next safe point. A second signal ends the process at once.

    Attributes:
        received: The number of the first signal; None if there was none.
        forward: Passes a signal on to child processes.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.forward: Callable[[int], None] | None = None
        self._held, self._released = False, False
        self._first = 0.0
        self._ends_process = False

    def listen(self, ends_process: bool = False, also: Sequence[int] = ()) -> None:
        """Handle signals from now on. In other threads than the main thread this does nothing.

        Args:
            ends_process: Whether the process is a command: it then ends within seconds even if cleaning up hangs.
            also: Signals that are handled in the same way as SIGTERM and SIGINT.
        """
        self._ends_process |= ends_process
        if threading.current_thread() is threading.main_thread():
            for each in (*_SIGNALS, *also):
                signal.signal(each, self._handle)

    def restart(self) -> None:
        """Reset at the beginning of a new run."""
        self.received = None
        self._held, self._released = False, False

    def hold(self) -> None:
        """From now on a signal only sets `received`."""
        self._held, self._released = True, False

    def release(self) -> None:
        """From now on a signal raises `Interrupted`."""
        self._held, self._released = False, False

    @contextmanager
    def released(self) -> Iterator[None]:
        """A context in which a signal raises `Interrupted` although `hold` was called, because no state is changed."""
        self.release_until_hold()
        try:
            yield
        finally:
            self._released = False

    def release_until_hold(self) -> None:
        """Like `released`, but until the next call of `hold`."""
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
    """End the process without cleaning up."""
    if sys.stderr.isatty():
        sys.stderr.write("\x1b[?25h")  # a progress bar may have hidden the cursor
    print("nernlit: interrupted", file=sys.stderr, flush=True)
    os._exit(128 + signum)


#: The signals of this process.
SIGNALS = Signals()
