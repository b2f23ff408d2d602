"""How a recipe or a command starts and how its process ends."""

import os
import sys
from collections.abc import Callable

from lora_dist.config import TrainConfig
from lora_dist.environment import has_gpu
from lora_dist.errors import NothingToDo, RunFailed, UserError
from lora_dist.flags import parse_config, parse_recipe_config
from lora_dist.signals import install_handlers


def run_recipe(
    main: Callable[[TrainConfig], None], defaults: TrainConfig, *, gpu: dict, embedded: dict, description: str
) -> None:
    """Entry point of a recipe: reads the settings, calls `main` with them and ends the process.

    `gpu` and `embedded` hold the recipe's base and data, with the settings that belong to them, on a machine with a GPU
    and on one without.
    """
    install_handlers()
    argv = [word for word in sys.argv[1:] if not word.startswith("--local_rank=")]  # the deepspeed launcher's

    def work() -> None:
        parse_config(defaults, argv, description=description)  # answers a typo before torch is imported
        main(parse_recipe_config(defaults, argv, gpu=gpu, embedded=embedded, on_gpu=has_gpu()))

    end_process(work)


def end_process(work: Callable[[], None]) -> None:
    """Do the work, then end the process.

    The exit code is 0; 2 for bad input and 1 for a run that cannot go on, both with one line from rank 0.
    """
    code, speaks = 0, os.environ.get("RANK", "0") == "0"
    try:
        work()
    except NothingToDo as reason:
        if speaks:
            print(reason)
    except (UserError, RunFailed) as error:
        code = 2 if isinstance(error, UserError) else 1
        if speaks:
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:  # in a command; a recipe has its own signal handlers
        code = 130
    # Not sys.exit: gloo's threads release the tensors of the last collective a moment after it. If Python is already
    # shutting down by then, taking its lock ends the thread inside a destructor: SIGABRT after a finished run.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
