"""Checkpoints: the whole state of a training, for any number of ranks, written while the training continues.

    step-00000100/adapter/                 PEFT's format, with the tokenizer
    step-00000100/optimizer.safetensors    exp_avg.NAME, exp_avg_sq.NAME and step.NAME of each trained parameter, fp32
    step-00000100/training_state.json      counts, the loss scaler, settings, versions
    step-00000100/manifest.json            sizes and sha256 of the other files, written last

No random state is saved, because every draw depends on the seed, the step and the micro-batch alone.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lora_dist.boundary import boundary
from lora_dist.environment import numerics, versions
from lora_dist.errors import RunFailed, UserError
from lora_dist.files import read_manifest, sync_files, write_manifest, write_whole
from lora_dist.model.adapters import check_identical, compare_tensors, save_adapter, trainable_parameters
from lora_dist.parallel.ranks import any_rank, copy_from_rank_0, from_rank_0
from lora_dist.parallel.zero import load_zero2_state, zero2_state
from lora_dist.run.folder import is_count, read_training_state
from lora_dist.training.run import Progress, Run

OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of each parameter


@dataclass(frozen=True)
class Snapshot:
    """Copies in host memory, so that training can continue while they are written."""

    params: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict

    @property
    def step(self) -> int:
        return self.state["progress"]["step"]


def take_snapshot(run: Run) -> Snapshot | None:
    """Copy the state as it is now; None on ranks other than 0. Collective.

    Raises RuntimeError if the ranks hold different adapters.
    """
    digest = check_identical(run.model)
    states = optimizer_states(run)
    if not run.is_main:
        return None
    scaler = run.accelerator.scaler
    return Snapshot(
        params={name: _on_host(param) for name, param in trainable_parameters(run.model).items()},
        optimizer={f"{key}.{name}": _on_host(t) for name, s in states.items() for key, t in s.items()},
        state={
            "progress": dataclasses.asdict(run.progress),
            "adapter_sha256": digest,
            "loss_scaler": scaler.state_dict() if scaler else None,
            "facts": dict(run.folder.facts),
            "wandb_run_id": run.folder.wandb_run_id,
            "config": dataclasses.asdict(run.config),
            "world_size": run.accelerator.num_processes,
            "numerics": numerics(_attention(run)),
            "versions": versions(),
        },
    )


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True)


def optimizer_states(run: Run) -> dict[str, dict[str, torch.Tensor]]:
    """AdamW's state by parameter name; empty before the first step. Collective under ZeRO-2."""
    names = list(trainable_parameters(run.model))
    if run.training.zero2:
        return dict(zip(names, zero2_state(run.training.zero2, run.training.params), strict=False))
    states = {
        name: run.training.optimizer.state.get(param) for name, param in zip(names, run.training.params, strict=True)
    }
    return {name: state for name, state in states.items() if state}


def write_checkpoint(run: Run, snapshot: Snapshot, folder: Path) -> None:
    """Write a checkpoint, read it back, and only then rename it to `folder`. Rank 0 only.

    Raises OSError if it could not be written; then neither `folder` nor anything half-written is left.
    """
    partial = run.folder.make_partial(folder)
    try:
        save_adapter(run.model, run.tokenizer, partial / "adapter", snapshot.params)
        save_file(snapshot.optimizer, partial / "optimizer.safetensors")
        write_whole(partial / "training_state.json", json.dumps(snapshot.state, indent=2) + "\n")
        saved = load_file(partial / "adapter" / "adapter_model.safetensors")
        expected = get_peft_model_state_dict(run.model, snapshot.params, save_embedding_layers=False)
        if saved.keys() != expected.keys() or not all(torch.equal(saved[name], expected[name]) for name in saved):
            raise OSError(f"{partial}: the adapter that was read back differs")
        sync_files(partial)
        write_manifest(partial)
        run.folder.put_in_place(partial, folder)
    except (OSError, SafetensorError) as error:  # the latter is how safetensors says that a disk is full
        run.folder.drop_partial(partial)
        raise OSError(f"{folder}: {error}") from None


def restore(run: Run) -> None:
    """Load the checkpoint that the run continues from: adapter, optimizer, learning rate, loss scaler and progress.

    Rank 0 reads it and sends it to the others. Raises UserError if it does not fit the run, or unless every rank ends
    up with exactly the adapter that was saved. Collective.
    """
    state, optimizer, has_optimizer = _load(run, run.folder.resume_from)
    if run.is_main:
        _warn_of_other_numerics(state["numerics"], numerics(_attention(run)))
    _restore_optimizer(run, optimizer, has_state=has_optimizer)
    _check_adapter(run, run.folder.resume_from, state)
    if state["loss_scaler"] and run.accelerator.scaler:
        run.accelerator.scaler.load_state_dict(state["loss_scaler"])
    run.progress = Progress(**state["progress"])
    set_schedule(run, run.progress.step)


def restore_adapter(run: Run, checkpoint: Path) -> None:
    """Put only the adapter of a checkpoint into the model. Raises as `restore` does. Collective."""
    state, _, _ = _load(run, checkpoint)
    _check_adapter(run, checkpoint, state)


def _load(run: Run, checkpoint: Path) -> tuple[dict, dict[str, torch.Tensor], bool]:
    """Load a checkpoint's adapter into the model. Collective.

    Returns the training state, the optimizer's tensors ({} on ranks other than 0) and whether there are any.
    """
    saved = _Saved({}, {}, {}, None)
    if run.is_main:
        try:
            saved = _read_checkpoint(run, checkpoint)
        except UserError as error:
            saved = _Saved({}, {}, {}, error)
    state, has_optimizer, error = from_rank_0((saved.state, bool(saved.optimizer), saved.error))
    if error:
        raise error
    if run.is_main:
        set_peft_model_state_dict(run.model, saved.adapter)
    for param in run.training.params:
        copy_from_rank_0(param.data)
    return state, saved.optimizer, has_optimizer


def _check_adapter(run: Run, checkpoint: Path, state: dict) -> None:
    if check_identical(run.model) != state["adapter_sha256"]:
        raise UserError(
            f"{checkpoint}: its adapter is not the one that it was saved with (adapter_sha256 in training_state.json); "
            "remove this checkpoint to continue from an earlier one"
        )


class _Saved(NamedTuple):
    """What a checkpoint holds; the tensors on rank 0 only. Or the error that it cannot be used."""

    state: dict
    adapter: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    error: UserError | None


def _read_checkpoint(run: Run, folder: Path) -> _Saved:
    """Read a checkpoint, and compare names, shapes and types of all tensors with those of the run. Rank 0 only.

    Raises UserError if they differ: a moment of another shape could be broadcast into place without an error.
    """
    state = read_training_state(folder)
    with boundary(f"{folder}", "remove this checkpoint to continue from an earlier one"):
        if lacks := {"adapter/adapter_model.safetensors", "optimizer.safetensors"} - read_manifest(folder).keys():
            raise ValueError(f"its manifest does not name {min(lacks)}")
        adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
        optimizer = load_file(folder / "optimizer.safetensors")
        _check_progress(Progress(**state["progress"]))
        _check_scaler(state["loss_scaler"], run.accelerator.scaler)
        if not isinstance(state["adapter_sha256"], str):
            raise ValueError(f"adapter_sha256 is {state['adapter_sha256']}")
        compare_tensors("adapter", adapter, get_peft_model_state_dict(run.model, save_embedding_layers=False))
        moments = {
            f"{key}.{name}": torch.empty((), dtype=torch.float32) if key == "step" else param
            for name, param in trainable_parameters(run.model).items()
            for key in OPTIMIZER_KEYS
        }
        if optimizer:
            compare_tensors("optimizer", optimizer, moments)
    return _Saved(state, adapter, optimizer, None)


FITS: dict[object, Callable[[object], bool]] = {  # by the type of a field of Progress
    int: is_count,
    int | None: lambda value: value is None or is_count(value),
    float: lambda value: type(value) in (int, float) and 0 <= value < math.inf,
    float | None: lambda value: value is None or type(value) in (int, float),  # NaN: a base may have such a loss
    list[float]: lambda value: isinstance(value, list) and all(FITS[float](abs(v)) for v in value),
}


def _check_progress(progress: Progress) -> None:
    """Raises ValueError for a value that no run can have."""
    for field in dataclasses.fields(progress):
        value = getattr(progress, field.name)
        if not FITS[field.type](value):
            raise ValueError(f"progress.{field.name} is {value}")


def _check_scaler(saved: dict | None, scaler: torch.amp.GradScaler | None) -> None:
    """Raises ValueError unless these are values of a loss scaler."""
    if scaler and saved:
        fits = saved.keys() == scaler.state_dict().keys() and all(type(v) in (int, float) for v in saved.values())
        if not fits or not all(0 <= value < 2**120 for value in saved.values()) or not saved["scale"]:
            raise ValueError(f"loss_scaler is {saved}")


def _restore_optimizer(run: Run, saved: dict[str, torch.Tensor], *, has_state: bool) -> None:
    """Put AdamW's state into the optimizer, and under ZeRO-2 also the parameters. Collective.

    `saved`: the tensors by KEY.NAME on rank 0, {} on the others. `has_state`: False before the first step.
    """
    states = []
    for name, param in trainable_parameters(run.model).items():
        state = {}
        for key in OPTIMIZER_KEYS if has_state else ():
            value = torch.empty((), device=param.device) if key == "step" else torch.empty_like(param)
            if saved:
                value.copy_(saved[f"{key}.{name}"])
            copy_from_rank_0(value)
            state[key] = value.cpu() if key == "step" else value  # where AdamW keeps them
        states.append(state)
    if run.training.zero2:
        load_zero2_state(run.training.zero2, run.training.params, states)
    elif has_state:
        run.training.optimizer.state.update(zip(run.training.params, states, strict=True))


def set_schedule(run: Run, step: int) -> None:
    """Set the learning rates of `step`. They follow from the step and the settings, so no checkpoint holds them."""
    scheduler = run.training.scheduler
    scheduler.last_epoch, scheduler._step_count = step, step + 1
    scheduler._last_lr = [base * of(step) for base, of in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, lr in zip(run.training.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = lr


def _warn_of_other_numerics(then: dict, now: dict) -> None:
    changed = [f"{name} was {then.get(name)}, is now {now[name]}" for name in now if then.get(name) != now[name]]
    if changed:
        print(f"warning: {'; '.join(changed)}: the bits may differ from this step on", file=sys.stderr)


def _attention(run: Run) -> str:
    return str(run.model.config._attn_implementation)


class Saver:
    """Saves checkpoints in a thread of rank 0. The training waits only for the copy, and for an earlier save."""

    def __init__(self, run: Run):
        self.run = run
        self.failed = 0  # number of saves in a row that failed
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None
        self._waited_s = 0.0  # time that the training waited for the save that is being written
        self._ended: list[dict[str, float]] = []

    def save(self) -> None:
        """Start a save. Raises RunFailed if too many saves in a row have failed. Collective."""
        started = time.perf_counter()
        self._wait(max_failures=self.run.config.max_failed_saves - 1)
        snapshot = take_snapshot(self.run)
        if snapshot:
            self._writing = self._thread.submit(self._write, snapshot)
        self._waited_s = time.perf_counter() - started

    def finish(self) -> None:
        """Wait for the last save. Raises RunFailed if it failed. Collective."""
        self._wait(max_failures=0)

    def _wait(self, max_failures: int) -> None:
        if self._writing:
            self._writing.exception()
            self._collect()
        if any_rank(self.failed > max_failures, self.run.device):  # only rank 0 knows
            raise RunFailed(
                f"the last {self.failed or 'few'} checkpoint(s) could not be written to {self.run.folder.checkpoints}; "
                "the earlier ones are kept: make room, and start again with the same --output_dir"
            )

    def results(self) -> list[dict[str, float]]:
        """The metrics of the saves that have ended since the last call."""
        if self._writing and self._writing.done():
            self._collect()
        ended, self._ended = self._ended, []
        return ended

    def _collect(self) -> None:
        writing, self._writing = self._writing, None
        error = writing.exception()
        if error and not isinstance(error, OSError):
            raise error
        self.failed = self.failed + 1 if error else 0
        if error:
            left = self.run.config.max_failed_saves - self.failed
            what = (
                f"warning: could not save ({error}); training continues, and ends after {left} more failures in a row"
            )
            print(what, file=sys.stderr, flush=True)
            self._ended.append({"checkpoint/failed_saves": self.failed})
        else:
            seconds = {"checkpoint/save_time_s": self._waited_s, "checkpoint/write_time_s": writing.result()}
            self._ended.append(seconds)

    def _write(self, snapshot: Snapshot) -> float:
        started = time.perf_counter()
        folder = self.run.folder.checkpoint(snapshot.step)
        write_checkpoint(self.run, snapshot, folder)
        self.run.folder.prune_checkpoints(self.run.config.save_total_limit, snapshot.state["progress"]["best_step"])
        self.run.folder.write_state("running", snapshot.step)
        return time.perf_counter() - started
