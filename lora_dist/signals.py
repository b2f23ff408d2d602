"""Signals that ask a run to stop. They are only noted; all ranks stop together after the step they are in."""

import os
import signal
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Ctrl-C reaches each rank twice, from the terminal and from the launcher. Only a later signal means "stop now".
REPEAT_S = 2.0

_first_asked_s: float | None = None  # time.monotonic() of the first request


def install_handlers() -> None:
    """Call this before the slow imports, so that a signal during them is not lost."""
    for number in SIGNALS:
        signal.signal(number, _handle)


def ask_to_stop() -> None:
    """Do what a signal does. For other ways to ask, such as W&B's stop button."""
    global _first_asked_s
    _first_asked_s = _first_asked_s or time.monotonic()


def stop_asked() -> bool:
    """True if this rank was asked to stop. The reduction of the step tells the other ranks."""
    return _first_asked_s is not None


def _handle(number: int, frame) -> None:
    if _first_asked_s is None:
        ask_to_stop()
    elif time.monotonic() - _first_asked_s > REPEAT_S:  # asked twice: end now, by the signal's default action
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
