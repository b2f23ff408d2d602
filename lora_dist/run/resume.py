"""Decides whether a run begins, continues or is refused. Rank 0 decides it from files, before a model is loaded."""

import dataclasses
import datetime
import os
from pathlib import Path

from lora_dist.boundary import boundary, read_yaml_settings
from lora_dist.config import ASK_ON_RESUME, FREE_ON_RESUME, TrainConfig
from lora_dist.errors import NothingToDo, UserError, require
from lora_dist.files import is_complete
from lora_dist.run.folder import STATUSES, RunFolder, check_facts, check_groups, is_count, read_training_state
from lora_dist.run.ours import CHECKPOINT_NAME

# Prefixes of the settings that decide which rows there are. If one of them changed, it is named instead of the rows.
ROW_SETTINGS = (
    "dataset_",
    "eval_fraction",
    "rename_columns",
    "chat_template",
    "train_on_inputs",
    "max_length",
    "overlong_rows",
)


def begin_or_resume(config: TrainConfig, recipe: str, facts: dict, num_groups: int) -> tuple[RunFolder, list[str]]:
    """Lock the run folder, and begin a run in it or continue the run that it holds. Rank 0 only.

    `facts` are this start's num_ranks, micro_batches_per_step, mixed_precision and rows (a hash of the data). A run
    that is continued keeps the micro-batches per step of its first start; `num_groups` is the number of groups of ranks
    that they are divided among now.

    Returns the folder and lines to print. Raises UserError, and NothingToDo if the run is completed.
    """
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not config.output_dir
    why = "a restart would not find the run again; give --output_dir, or --max_restarts 0"
    require(not restarts, "output_dir", None, why)
    requested = config.resume_from_checkpoint
    checkpoint = _find_checkpoint(Path(requested).absolute()) if requested not in ("auto", "none") else None
    source_root = checkpoint.parent.parent if checkpoint else None
    root = Path(config.output_dir or source_root or f"runs/{recipe}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    config = dataclasses.replace(config, output_dir=str(root))
    folder = RunFolder(root)
    try:
        folder.lock()
        if not folder.holds_a_run():
            return folder, _begin(folder, config, facts, num_groups, checkpoint)
        if requested == "none":
            what = f"--output_dir {root}: holds a run already"
            raise UserError(f"{what}; give another folder, remove this one, or leave out --resume_from_checkpoint none")
        return folder, _resume(folder, config, facts, num_groups, checkpoint)
    except UserError:
        folder.undo()
        raise


def _begin(folder: RunFolder, config: TrainConfig, facts: dict, num_groups: int, checkpoint: Path | None) -> list[str]:
    """Begin a run in an empty folder, from another run's checkpoint if one was requested. Returns lines to print."""
    folder.facts, notes = facts, []
    if checkpoint:
        state = read_training_state(checkpoint)
        folder.resume_from = checkpoint
        folder.facts, notes = _check_changes(
            f"--resume_from_checkpoint {checkpoint}", state["config"], state["facts"], config, facts, num_groups
        )
        folder.facts["from"] = str(checkpoint.resolve())
    folder.begin(config)
    return notes


def _resume(folder: RunFolder, config: TrainConfig, facts: dict, num_groups: int, requested: Path | None) -> list[str]:
    """Continue the run that the folder holds, from its newest complete checkpoint. Returns lines to print."""
    state, old_settings = _read_run(folder)
    newest, damaged = folder.newest_whole_checkpoint()
    parent = state["facts"].get("from")
    if requested:
        _check_request(requested, folder, newest, parent)
    if parent and not newest:
        newest = _find_checkpoint(Path(parent))
    folder.facts, notes = _check_changes(
        f"--output_dir {folder.root}", old_settings, state["facts"], config, facts, num_groups
    )
    if state["status"] == "completed" and not notes:
        raise NothingToDo(f"{folder.root}: the run is completed, at step {state['step']}; nothing to do")
    notes += [
        f"warning: {path} is damaged or incomplete; it is not used, and is renamed to {path.name}.damaged"
        for path in damaged
    ]
    folder.resume_from, folder.wandb_run_id = newest, state["wandb_run_id"]
    folder.restarts = state["restarts"] + 1
    folder.previous = {"status": state["status"], "error": (state.get("summary") or {}).get("error")}
    notes.append(f"continuing from {newest}" if newest else f"{folder.root} holds no checkpoint: starting from step 0")
    # gradient_accumulation_steps belongs to the ranks of the first start, so config.yaml keeps it.
    kept = {"gradient_accumulation_steps": old_settings["gradient_accumulation_steps"]}
    folder.damaged, folder.last_logged_step = damaged, folder.newest_metrics_step()
    folder.begin(dataclasses.replace(config, **kept))
    return notes


def _read_run(folder: RunFolder) -> tuple[dict, dict]:
    """(state.json, config.yaml) of the run that the folder holds. Raises UserError if one cannot be read."""
    what = f"--output_dir {folder.root}: holds a run that cannot be read"
    with boundary(what, "give another folder"):
        state = folder.read_state(f"{what}: {folder.state.name}")
        settings = read_yaml_settings(folder.config, f"{what}: {folder.config.name}")
        _check_state(state)
        accumulation = settings.get("gradient_accumulation_steps")
        if not is_count(accumulation) or not accumulation:
            raise ValueError(f"gradient_accumulation_steps in {folder.config.name} is {accumulation}, no count")
    return state, settings


def _check_state(state: dict) -> None:
    """Raises ValueError unless a state.json holds what a start that continues the run needs."""
    check_groups(state, "facts")
    check_facts(state["facts"])
    for name in ("step", "restarts"):
        if not is_count(state.get(name)):
            raise ValueError(f"{name} in state.json is {state.get(name)}, no count")
    summary, wandb_run_id = state.get("summary"), state.get("wandb_run_id")
    if state.get("status") not in STATUSES or not isinstance(summary, dict | None) or "wandb_run_id" not in state:
        raise ValueError("state.json does not hold the state of a run")
    if not isinstance(wandb_run_id, str | None):
        raise ValueError(f"wandb_run_id in state.json is {wandb_run_id}, no name")


def _check_request(requested: Path, folder: RunFolder, newest: Path | None, parent: str | None) -> None:
    """Raises UserError unless the requested checkpoint is the run's newest one, or the one that the run began from."""
    path = requested.resolve()
    if path == (newest and newest.resolve()) or str(path) == parent:
        return
    if newest and requested.parent == newest.parent:
        what = f"holds a newer checkpoint, {newest.name}"
    else:
        what = "holds another run"
    where = f"--output_dir {folder.root}"
    raise UserError(f"--resume_from_checkpoint {requested}: {where} {what}; give another --output_dir")


def _find_checkpoint(path: Path) -> Path:
    """The checkpoint at `path`, or the newest complete one if `path` is a run folder. Raises UserError."""
    setting = f"--resume_from_checkpoint {path}"
    if (path / "checkpoints").is_dir():
        newest, damaged = RunFolder(path).newest_whole_checkpoint()
        if newest is None:
            raise UserError(f"{setting}: holds no complete checkpoint{f', {len(damaged)} damaged' if damaged else ''}")
        return newest
    if not CHECKPOINT_NAME.fullmatch(path.name) or not path.is_dir():
        raise UserError(f"{setting}: no such checkpoint; give auto, none, a run folder or its checkpoints/step-N")
    if not is_complete(path):
        raise UserError(f"{setting}: is damaged or incomplete: its files do not match its manifest")
    return path


def _check_changes(
    where: str, old_settings: dict, old_facts: dict, config: TrainConfig, facts: dict, num_groups: int
) -> tuple[dict, list[str]]:
    """Compare settings and facts with those of the run. Raises UserError if a change is not allowed.

    Returns the run's facts from now on, and a line for each allowed change.
    """
    total, num_ranks = old_facts["micro_batches_per_step"], facts["num_ranks"]
    why = f"a step of this run has {total} micro-batches, so 1 to {total * num_ranks // num_groups} ranks can share it"
    require(num_groups <= total, "num_processes", num_ranks, why)
    changes = _changes(old_settings, old_facts, config, facts)
    refused = [name for name in changes if name not in (config.allow_config_change or ())]
    if refused:
        what = "; ".join(changes[name] for name in refused)
        able = [name for name in refused if name in ASK_ON_RESUME]
        hint = f", or --allow_config_change {' '.join(able)}" if len(able) == len(refused) else ""
        raise UserError(
            f"{where}: holds a run with other settings: {what}; give the old values, another --output_dir{hint}"
        )
    notes = [f"changed in this run: {change}" for change in changes.values()]
    return old_facts | {name: facts[name] for name in ("mixed_precision", "rows")}, notes


def _changes(old_settings: dict, old_facts: dict, config: TrainConfig, facts: dict) -> dict[str, str]:
    """Name of each setting that changed and may not change freely -> the change in words."""
    now = dataclasses.asdict(config) | {"mixed_precision": facts["mixed_precision"]}
    old = old_settings | {"mixed_precision": old_facts["mixed_precision"]}
    changed = [name for name in now if name not in FREE_ON_RESUME and old.get(name, "not recorded") != now[name]]
    changes = {name: f"{name} was {old.get(name, 'not recorded')}, is now {now[name]}" for name in changed}
    if facts["rows"] != old_facts["rows"] and not any(name.startswith(ROW_SETTINGS) for name in changed):
        changes["dataset_name"] = f"dataset_name {config.dataset_name} has other rows now"
    if facts["micro_batches_per_step"] == old_facts["micro_batches_per_step"]:
        changes.pop("gradient_accumulation_steps", None)
    return changes
