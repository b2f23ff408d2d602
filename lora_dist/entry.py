"""How a recipe or a command starts and how its process ends."""

import os
import sys
from collections.abc import Callable

from lora_dist.config import TrainConfig, parse_config
from lora_dist.errors import NothingToDo, RunFailed, UserError
from lora_dist.signals import install_handlers


def run_recipe(main, defaults: TrainConfig, *, description: str) -> None:
    """Entry point of a recipe. Ends the process."""
    install_handlers()
    argv = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]  # the deepspeed launcher's
    end_process(lambda: main(parse_config(defaults, argv, description=description)))


def end_process(work: Callable[[], None]) -> None:
    """Do the work and end the process: exit code 0; for bad input one line from rank 0, and 2 on all ranks.

    A run that cannot go on is one line and 1 in the same way.
    """
    code = 0
    try:
        work()
    except NothingToDo as reason:
        if os.environ.get("RANK", "0") == "0":
            print(reason)
    except (UserError, RunFailed) as error:
        code = 2 if isinstance(error, UserError) else 1
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:  # of a command; recipes have handlers of their own
        code = 130
    # Not sys.exit: gloo's threads drop the tensors of the last collective a moment after it, and where Python is
    # already shutting down, taking its lock ends such a thread inside a destructor: SIGABRT after a finished run.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
