"""Signals that ask a run to stop: noted at once, obeyed by all ranks together after the step they are in."""

import os
import signal
import time

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# A terminal's Ctrl-C reaches each rank twice, from the terminal and from the launcher: only a later one is impatience.
REPEAT_S = 2.0

_first_asked_s: float | None = None


def install_handlers() -> None:
    """Called before the slow imports, so that a signal during them is not lost."""
    for number in SIGNALS:
        signal.signal(number, _note)


def ask_to_stop() -> None:
    """What a signal does; for what else asks, W&B's stop button."""
    global _first_asked_s
    _first_asked_s = _first_asked_s or time.monotonic()


def stop_asked() -> bool:
    """Whether this rank was asked. Other ranks learn of it in the step's reduction."""
    return _first_asked_s is not None


def _note(number: int, frame) -> None:
    if _first_asked_s is None:
        ask_to_stop()
    elif time.monotonic() - _first_asked_s > REPEAT_S:  # asked again: leave at once
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
