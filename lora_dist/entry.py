"""How a recipe or a command starts and how its process ends."""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import TextIO

from lora_dist.config import TrainConfig
from lora_dist.environment import env_count, has_gpu
from lora_dist.errors import NothingToDo, RunFailed, UserError
from lora_dist.signals import install_handlers

LAUNCHER_PID = "LORA_DIST_LAUNCHER_PID"  # environment variable that `lora-dist train` sets for its ranks
# Ranks other than 0 wait this long before they end by a refusal: a launcher that sees one rank end stops the others at
# once, and rank 0 has the line to print.
REFUSAL_S = 1.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def run_recipe(
    main: Callable[[TrainConfig], None], defaults: TrainConfig, *, gpu: dict, embedded: dict, description: str
) -> None:
    """Entry point of a recipe: reads the settings, calls `main` with them and ends the process.

    `gpu` and `embedded` hold the recipe's base and data, with the settings that belong to them, on a machine with a GPU
    and on one without.
    """
    install_handlers()
    stop_with_launcher()
    go_on_without_reader()
    from lora_dist.flags import other_batch, parse_recipe_config  # imports transformers

    argv = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]  # the deepspeed launcher adds it

    def work() -> None:
        config = parse_recipe_config(
            defaults, argv, gpu=gpu, embedded=embedded, on_gpu=has_gpu, description=description
        )
        warning = other_batch(argv, config, env_count("WORLD_SIZE", 1, least=1))
        if warning and os.environ.get("RANK", "0") == "0":
            print(warning, file=sys.stderr)
        main(config)

    end_process(work)


def stop_with_launcher() -> None:
    """Let the kernel send SIGTERM to this rank if the launcher that started it dies without passing one on.

    Launchers that are known to be the parent of their ranks: lora-dist train, torchrun and accelerate.
    """
    launcher = os.environ.get(LAUNCHER_PID)
    if sys.platform == "linux" and (launcher or "TORCHELASTIC_RUN_ID" in os.environ):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if launcher and str(os.getppid()) != launcher:  # it died before the call above
            os.kill(os.getpid(), signal.SIGTERM)


def end_process(work: Callable[[], int | None]) -> None:
    """Do the work, then end the process.

    The exit code is the one that `work` returns, if it returns one; 0 if not; 2 for bad input and 1 for a run that
    cannot go on, both with one line from rank 0.
    """
    rank = os.environ.get("RANK", "0")
    code, is_rank_0 = 0, rank == "0" or not rank.isdecimal()  # what is wrong with RANK has to be said too
    try:
        code = work() or 0
    except NothingToDo as reason:
        if is_rank_0:
            print(reason)
    except (UserError, RunFailed) as error:
        code = 2 if isinstance(error, UserError) else 1
        tell_launcher(f"error: {error}")
        if is_rank_0:
            print(f"error: {error}", file=sys.stderr)
        elif code == 2:
            time.sleep(REFUSAL_S)
    except KeyboardInterrupt:  # in a command; a recipe has its own signal handlers
        code = 130
    except BrokenPipeError:  # in a command: `lora-dist status | head`
        code = 128 + signal.SIGPIPE
    # Not sys.exit: gloo's threads release the tensors of the last collective a moment after it. If Python is already
    # shutting down by then, taking its lock ends the thread inside a destructor: SIGABRT after a finished run.
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError):
            stream.flush()
    os._exit(code)


class _WithoutReader:
    """A text stream that goes on into nothing when the process that read it is gone, as after `... | head`."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._unbroken(self._stream.write, text) or len(text)

    def flush(self) -> None:
        self._unbroken(self._stream.flush)

    def _unbroken(self, call: Callable, *args):
        try:
            return call(*args)
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def go_on_without_reader() -> None:
    """A training does not end because nobody reads what it prints."""
    sys.stdout, sys.stderr = _WithoutReader(sys.stdout), _WithoutReader(sys.stderr)


def tell_launcher(line: str) -> None:
    """Write the line to the file that torchrun or `lora-dist train` named, if one did.

    torchrun prints it in its box of failures (torch.distributed.elastic.multiprocessing.errors.ProcessFailure).
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": line, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump({"message": {"message": line, "extraInfo": extra}}, file)
