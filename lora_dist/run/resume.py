"""Whether a run begins, goes on or is refused: decided by rank 0 from files, before a model is loaded."""

import dataclasses
import datetime
import json
import os
from pathlib import Path

import yaml

from lora_dist.config import ASK_ON_RESUME, FREE_ON_RESUME, TrainConfig
from lora_dist.errors import NothingToDo, UserError, require
from lora_dist.files import is_complete
from lora_dist.run.folder import RunFolder

# Settings by which the rows differ: they are named, and not the rows as well.
OF_ROWS = (
    "dataset_",
    "eval_fraction",
    "rename_columns",
    "chat_template",
    "train_on_inputs",
    "max_length",
    "overlong_rows",
)


def begin_or_resume(config: TrainConfig, recipe: str, begun: dict, num_shares: int) -> tuple[RunFolder, list[str]]:
    """Lock the run folder, and begin a run in it or go on with the one it holds. (Folder, what to say). Rank 0 only.

    `begun`: how this start would begin a run: num_ranks, micro_batches_per_step, mixed_precision, and a hash of the
    rows. A run that goes on keeps the micro-batches of its steps, whatever the `num_shares` they are divided into.
    Raises UserError, and NothingToDo where the run is completed.
    """
    restarted = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) and not config.output_dir
    why = "a restart would not find the run again; give --output_dir, or --max_restarts 0"
    require(not restarted, "output_dir", None, why)
    asked = config.resume_from_checkpoint
    source = Path(asked) if asked not in ("auto", "none") else None
    checkpoint = _find_checkpoint(source) if source else None
    source_root = checkpoint.parent.parent if checkpoint else None
    root = Path(config.output_dir or source_root or f"runs/{recipe}-{datetime.datetime.now():%Y%m%d-%H%M%S}")
    config = dataclasses.replace(config, output_dir=str(root))
    folder = RunFolder(root)
    folder.lock()
    if folder.state.exists():
        held = f"--output_dir {root}: holds a run already"
        if asked == "none":
            raise UserError(f"{held}; give another folder, remove this one, or leave out --resume_from_checkpoint none")
        return _go_on(folder, config, begun, num_shares, checkpoint)
    folder.begun, notes = begun, []
    if checkpoint:
        state = json.loads((checkpoint / "training_state.json").read_text(encoding="utf-8"))
        folder.resume_from = checkpoint
        folder.begun, notes = _check_changes(
            f"--resume_from_checkpoint {checkpoint}", state["config"], state["begun"], config, begun, num_shares
        )
        folder.begun["from"] = str(checkpoint.resolve())
    folder.begin(config)
    return folder, notes


def _go_on(
    folder: RunFolder, config: TrainConfig, begun: dict, num_shares: int, asked: Path | None
) -> tuple[RunFolder, list[str]]:
    try:
        state = folder.read_state()
        then = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"--output_dir {folder.root}: holds a run that cannot be read ({why}); remove it") from None
    newest, damaged = folder.newest_whole_checkpoint()
    began_from = state["begun"].get("from")
    if asked and asked.resolve() != (newest and newest.resolve()) and str(asked.resolve()) != began_from:
        what = f"the run has a newer one, {newest.name}" if newest and asked.parent == newest.parent else "is another's"
        raise UserError(
            f"--resume_from_checkpoint {asked}: {what}; --output_dir {folder.root} holds a run: give another"
        )
    if began_from and not newest:
        newest = _find_checkpoint(Path(began_from))
    folder.begun, notes = _check_changes(f"--output_dir {folder.root}", then, state["begun"], config, begun, num_shares)
    if state["status"] == "completed" and not notes:
        raise NothingToDo(f"{folder.root}: the run is completed, at step {state['step']}; nothing to do")
    notes += [f"warning: {path} is damaged or not whole, and is set aside as {path.name}.damaged" for path in damaged]
    folder.resume_from, folder.wandb_run_id = newest, state["wandb_run_id"]
    folder.restarts = state["restarts"] + 1
    folder.previous = {"status": state["status"], "error": (state["summary"] or {}).get("error")}
    step = int(newest.name.removeprefix("step-")) if newest else 0
    notes.append(f"going on from {newest}" if newest else f"{folder.root} holds no checkpoint: from the beginning")
    try:
        folder.clear_leftovers()
        for path in damaged:  # else it would count among the newest ones that are kept
            folder.set_aside(path)
        folder.trim_metrics(step if newest else -1, evaluated=bool(newest) and _knows_evaluation(newest, step))
        as_begun = {"gradient_accumulation_steps": then["gradient_accumulation_steps"]}  # for the ranks it began on
        folder.write_config(dataclasses.replace(config, **as_begun))
        folder.write_state("running", step)
    except OSError as error:
        raise UserError(f"--output_dir {folder.root}: cannot be written: {error.strerror}") from None
    return folder, notes


def _knows_evaluation(checkpoint: Path, step: int) -> bool:
    """Whether the evaluation at a checkpoint's step, if there is one, came before it; else it comes again."""
    state = json.loads((checkpoint / "training_state.json").read_text(encoding="utf-8"))
    return state["progress"]["eval_step"] == step


def _find_checkpoint(path: Path) -> Path:
    """A checkpoint, or the newest whole one of a run folder. Raises UserError."""
    setting = f"--resume_from_checkpoint {path}"
    if (path / "checkpoints").is_dir():
        newest, damaged = RunFolder(path).newest_whole_checkpoint()
        if newest is None:
            raise UserError(f"{setting}: holds no whole checkpoint{f', {len(damaged)} damaged' if damaged else ''}")
        return newest
    if not path.name.startswith("step-") or not path.is_dir():
        raise UserError(f"{setting}: no such checkpoint; give auto, none, a run folder or its checkpoints/step-N")
    if not is_complete(path):
        raise UserError(f"{setting}: is damaged or not whole: its files are not those of its manifest")
    return path


def _check_changes(
    where: str, then: dict, begun_then: dict, config: TrainConfig, begun: dict, num_shares: int
) -> tuple[dict, list[str]]:
    """(how the run was begun, what changes now, in words). Raises UserError where a change is not allowed."""
    total, num_ranks = begun_then["micro_batches_per_step"], begun["num_ranks"]
    why = f"a step of this run has {total} micro-batches, so 1 to {total * num_ranks // num_shares} ranks can share it"
    require(num_shares <= total, "num_processes", num_ranks, why)
    now = dataclasses.asdict(config) | {"mixed_precision": begun["mixed_precision"]}
    then = then | {"mixed_precision": begun_then["mixed_precision"]}
    changed = [name for name in now if name not in FREE_ON_RESUME and then[name] != now[name]]
    if begun["rows"] != begun_then["rows"] and not any(name.startswith(OF_ROWS) for name in changed):
        changed.append("dataset_name")
        then, now = then | {"dataset_name": "with other rows"}, now | {"dataset_name": "as it is"}
    if begun["micro_batches_per_step"] == begun_then["micro_batches_per_step"]:
        changed = [name for name in changed if name != "gradient_accumulation_steps"]
    refused = [name for name in changed if name not in (config.allow_config_change or ())]
    if refused:
        what = "; ".join(f"{name} {then[name]}, now {now[name]}" for name in refused)
        able = [name for name in refused if name in ASK_ON_RESUME]
        hint = f", or --allow_config_change {' '.join(able)}" if len(able) == len(refused) else ""
        raise UserError(f"{where}: holds a run with other settings: {what}; give those, another --output_dir{hint}")
    notes = [f"changed in this run: {name} {then[name]}, now {now[name]}" for name in changed]
    return begun_then | {name: begun[name] for name in ("mixed_precision", "rows")}, notes
