"""Signals that ask a run to stop.

While it trains, they are only noted, and all ranks stop together after the step they are in. Before, there is nothing
to save: SIGTERM and SIGINT end the process at once, also one that waits for other ranks; SIGUSR1, which Slurm sends in
good time, is noted.
"""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Ctrl-C reaches each rank twice, from the terminal and from the launcher. Only a later signal means "stop now".
REPEAT_S = 2.0

_first_asked_s: float | None = None  # time.monotonic() of the first request
_trains = False
_before_leaving: Callable[[], None] | None = None


def install_handlers() -> None:
    """Call this before the slow imports, so that a signal during them is not lost.

    Python runs a handler only between two bytecodes of the main thread, which may sit in a library's wait for hours. So
    the signals are handled in a thread, which the C handler wakes through a pipe.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)  # without a handler Python would not write to the pipe
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    # A fork, for example a worker that tokenizes, has no such thread, and its signals are not this process's.
    os.register_at_fork(after_in_child=_remove_handlers)
    threading.Thread(target=_listen, args=(reader,), name="signals", daemon=True).start()


def begin_training() -> None:
    """From now on a signal is only noted."""
    global _trains
    _trains = True


def call_before_leaving(callback: Callable[[], None] | None) -> None:
    """Register a function that is called if a signal ends the process before it trains; None removes it."""
    global _before_leaving
    _before_leaving = callback


def ask_to_stop() -> None:
    """Do what a signal does while it trains. For other ways to ask, such as W&B's stop button."""
    global _first_asked_s
    _first_asked_s = _first_asked_s or time.monotonic()


def stop_asked() -> bool:
    """True if this rank was asked to stop. The reduction of the step tells the other ranks."""
    return _first_asked_s is not None


def _listen(reader: int) -> None:
    while True:
        for number in os.read(reader, 100):
            if number in SIGNALS:
                _handle(number)


def _handle(number: int) -> None:
    if not _trains and number != signal.SIGUSR1:
        if _before_leaving:
            with contextlib.suppress(Exception):
                _before_leaving()
        # When srun sees that a rank was refused (exit code 2), it sends SIGTERM to the others, and the job gets the
        # highest code of all ranks: 143 would look like a lost rank, and the job would be requeued.
        if "SLURM_PROCID" in os.environ:
            os._exit(1)
        _leave(number)
    elif _first_asked_s is None:
        ask_to_stop()
    elif time.monotonic() - _first_asked_s > REPEAT_S:  # asked twice: end now
        _leave(number)


def _leave(number: int) -> None:
    """End this process by the signal's default action. `signal.signal` may only be called in the main thread."""
    ctypes.CDLL(None).signal(number, None)
    os.kill(os.getpid(), number)


def _remove_handlers() -> None:
    signal.set_wakeup_fd(-1)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
