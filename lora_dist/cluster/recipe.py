"""Finds a recipe and an accelerate config by path or name, and makes the environment that its ranks need."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import yaml

from lora_dist.environment import shipped
from lora_dist.errors import UserError, did_you_mean

# Prefixes of the variables that `accelerate launch` sets for the ranks.
LAUNCHER_PREFIXES = ("ACCELERATE_", "FSDP_", "MEGATRON_LM_", "PARALLELISM_CONFIG_")


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
    """The recipe's module, not run. Raises UserError if it cannot be imported or lacks a name that a recipe has."""
    spec = importlib.util.spec_from_file_location(recipe.stem, recipe)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(recipe.parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"recipe {recipe}: {type(error).__name__}: {error}") from None
    finally:
        sys.path.pop(0)
    missing = [name for name in ("CONFIG", "GPU", "EMBEDDED", "main") if not hasattr(module, name)]
    if missing:
        raise UserError(f"recipe {recipe}: has no {', '.join(missing)}; see recipes/opt_quotes.py")
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
    try:
        args = launch.launch_command_parser().parse_args(words)
        args, defaults, _ = launch._validate_launch_command(args)
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            env = prepare_deepspeed_cmd_env(args)[1]
        elif args.use_fsdp or args.use_megatron_lm or args.multi_gpu:
            env = prepare_multi_gpu_env(args)
        else:
            env = prepare_simple_launcher_cmd_env(args)[1]
    except (ValueError, TypeError, KeyError, OSError, yaml.YAMLError) as error:
        raise UserError(f"--config_file {config_file}: {' '.join(str(error).split())}") from None
    env = {name: value for name, value in sorted(env.items()) if name.startswith(LAUNCHER_PREFIXES)}
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
    """What an accelerate config holds. Raises UserError if it cannot be read."""
    try:
        settings = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config_file {config_file}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--config_file {config_file}: must hold one `name: value` per line, as accelerate writes it")
    return settings
