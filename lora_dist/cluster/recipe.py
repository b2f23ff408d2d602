"""Finds a recipe and an accelerate config by path or name, and makes the environment that its ranks need."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from lora_dist.boundary import boundary, read_yaml_settings
from lora_dist.config import TrainConfig
from lora_dist.environment import shipped
from lora_dist.errors import UserError, did_you_mean

# Prefixes of the variables that `accelerate launch` sets for the ranks.
LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")

SETTINGS = {field.name for field in dataclasses.fields(TrainConfig)}
COUNTS = {"num_processes": 1, "num_machines": 1, "machine_rank": 0}  # of an accelerate config, and the least of each
RECIPE_HAS = {
    "CONFIG": lambda value: isinstance(value, TrainConfig),
    "GPU": lambda value: isinstance(value, dict) and {"model_name_or_path", "dataset_name"} <= value.keys() <= SETTINGS,
    "EMBEDDED": lambda value: RECIPE_HAS["GPU"](value),
    "main": callable,
}


def find_recipe(recipe: str) -> Path:
    """The file of a recipe, given as a path or as the name of a recipe that ships. Raises UserError."""
    return _find("recipe", "recipe", recipe, "recipes", ".py")


def find_config_file(config_file: str) -> Path:
    """The file of an accelerate config, given as a path or as the name of one that ships. Raises UserError."""
    return _find("--config_file", "accelerate config", config_file, "accelerate_configs", ".yaml")


def _find(setting: str, kind: str, asked: str, folder: str, suffix: str) -> Path:
    if not asked.isprintable():
        raise UserError(f"{setting} {ascii(asked)}: the name must be printable characters")
    path = Path(asked)
    ships = {file.stem: file for file in sorted(shipped(folder).glob(f"*{suffix}"))}
    names = " ".join(ships)
    if path.suffix == suffix:
        if path.is_file():
            return path
        raise UserError(f"{setting} {asked}: no such file; the names of those that ship are {names}")
    if asked not in ships:
        every = f"give one of {names}, or a {suffix} file"
        raise UserError(f"{setting} {asked}: no such {kind}; {did_you_mean(asked, ships, every)}")
    return ships[asked]


def load_recipe(recipe: Path) -> ModuleType:
    """The recipe's module, not run. Raises UserError if it cannot be imported or lacks what a recipe has."""
    what = f"recipe {recipe}"
    spec = importlib.util.spec_from_file_location(recipe.stem, recipe)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(recipe.parent))
    try:
        with boundary(what):
            spec.loader.exec_module(module)
    except SystemExit as error:
        raise UserError(f"{what}: ends Python while it is imported (exit code {error.code})") from None
    finally:
        sys.path.pop(0)
    wrong = [name for name, fits in RECIPE_HAS.items() if not fits(getattr(module, name, None))]
    if wrong:
        raise UserError(f"{what}: has no {', '.join(wrong)}, or not as recipes do; see recipes/opt_quotes.py")
    return module


def launcher_env(config_file: Path, num_ranks: int) -> dict[str, str]:
    """The variables that `accelerate launch` would set for every rank. Imports torch. Raises UserError.

    It calls accelerate's own functions (version 1.15).
    """
    from accelerate.commands import launch
    from accelerate.utils.launch import (
        prepare_deepspeed_cmd_env,
        prepare_multi_gpu_env,
        prepare_simple_launcher_cmd_env,
    )

    words = ["--config_file", str(config_file), "--num_processes", str(num_ranks), "--main_process_port", "0"]
    words += [*launcher_flags(config_file, num_ranks), "recipe.py"]
    with boundary(f"--config_file {config_file}", "compare it with the files in accelerate_configs/"):
        args = launch.launch_command_parser().parse_args(words)
        args, defaults, _ = launch._validate_launch_command(args)
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            env = prepare_deepspeed_cmd_env(args)[1]
        elif args.use_fsdp or args.use_megatron_lm or args.multi_gpu:
            env = prepare_multi_gpu_env(args)
        else:
            env = prepare_simple_launcher_cmd_env(args)[1]
    env = {name: value for name, value in sorted(env.items()) if name.startswith(LAUNCHER_PREFIXES)}
    for name, value in env.items():
        if not value.isprintable():  # no variable can hold every character
            raise UserError(f"--config_file {config_file}: {name}: {ascii(value)}: must be printable characters")
    deepspeed = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if deepspeed != "none" and not Path(deepspeed).is_file():
        # accelerate_configs/zero3.yaml names launch/deepspeed/zero3.json, a path from the folder above its own
        ships = config_file.parents[1] / deepspeed if len(config_file.parents) > 1 else Path(deepspeed)
        if ships.is_file():
            env["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(ships)
    return env


def launcher_flags(config_file: Path, num_ranks: int) -> list[str]:
    """Flags for what the file cannot know: the number of pipeline stages, and that Slurm starts DeepSpeed's nodes."""
    kind = read_config_file(config_file).get("distributed_type")
    if kind == "MEGATRON_LM":
        return ["--megatron_lm_pp_degree", str(num_ranks)]
    return ["--deepspeed_multinode_launcher", "standard"] if kind == "DEEPSPEED" else []


def read_config_file(config_file: Path) -> dict:
    """What an accelerate config holds. Raises UserError if it cannot be read, or holds something else."""
    what = f"--config_file {config_file}"
    settings = read_yaml_settings(config_file, what)
    if not settings:
        raise UserError(f"{what}: is empty; accelerate config writes such a file, see accelerate_configs/")
    for name, value in settings.items():
        fits, rule = True, ""
        if name.endswith("_config"):
            fits, rule = isinstance(value, dict | None), "must be a mapping"
        elif name in COUNTS:
            fits = value is None or (type(value) is int and COUNTS[name] <= value < 10**6)
            rule = f"must be a whole number, {COUNTS[name]} or more"
        elif name == "distributed_type":
            fits, rule = isinstance(value, str | bool), "must be a name, such as FSDP"
        if not fits:
            raise UserError(f"{what}: {name}: {ascii(value)[:60]}: {rule}")
    return settings
