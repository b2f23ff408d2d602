"""The run folder: the names of its files, and how each is written so that a kill never leaves half a file."""

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shlex
import time
from pathlib import Path

import yaml

from lora_dist.boundary import boundary, parse_json, read_json, read_text
from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.files import MANIFEST, is_complete, remove_files, sync, write_whole
from lora_dist.run import ours

STEP = "train/global_step"  # optimizer steps completed; in each line of metrics.jsonl and samples.jsonl
STATUSES = ("running", "completed", "preempted", "failed")
LOCK_PATIENCE_S = 10.0  # a run that was killed a moment ago may still hold the lock


def config_text(config: TrainConfig) -> str:
    """All settings as YAML that `--config` reads back."""
    settings = dataclasses.asdict(config)
    # PyYAML writes U+0085 as it is if it may, and reads it back as the end of a line.
    readable = not any("\x85" in str(value) for value in settings.values())
    return yaml.safe_dump(settings, sort_keys=False, allow_unicode=readable)


def read_training_state(checkpoint: Path) -> dict:
    """The content of a checkpoint's training_state.json. Raises UserError if it is not what a run wrote."""
    what = f"{checkpoint}/training_state.json"
    state = read_json(checkpoint / "training_state.json", what)
    with boundary(what, "remove the checkpoint to use an earlier one"):
        check_groups(state, "progress", "facts", "config", "numerics")
        check_facts(state["facts"])
        if not is_count(step := state["progress"].get("step")) or f"step-{step:08d}" != checkpoint.name:
            raise ValueError(f"progress.step is {step}, which is not the step of this checkpoint")
    return state


def check_groups(state: dict, *names: str) -> None:
    """Raises ValueError unless these entries are there and have entries themselves."""
    if others := [name for name in names if not isinstance(state.get(name), dict)]:
        raise ValueError(f"it has no entry {others[0]} with the values of a run")


def check_facts(facts: dict) -> None:
    """Raises ValueError unless these can be the facts of a run."""
    counts = [facts.get(name) for name in ("num_ranks", "micro_batches_per_step")]
    names = {"mixed_precision", "rows"} - facts.keys()
    if names or not all(is_count(count) and count > 0 for count in counts):
        raise ValueError(f"its facts are not those of a run: {facts}")
    if not isinstance(facts.get("from"), str | None):
        raise ValueError(f"facts.from is {facts['from']}, which is no path")


def is_count(value: object) -> bool:
    """True for a number of things that a run can have counted. bool, a subclass of int, is no number."""
    return type(value) is int and 0 <= value < 2**53


class RunFolder:
    """Paths in a run folder, and what this start knows about the run that the folder holds.

    A run is started several times if it is interrupted; a *start* is one of them.
    """

    def __init__(self, root: Path):
        self.root = root
        self.config = root / "config.yaml"
        self.state = root / "state.json"
        self.metrics = root / "metrics.jsonl"
        self.samples = root / "samples.jsonl"
        self.starts = root / "starts.jsonl"
        self.profile = root / "profile"
        self.bad_steps = root / "bad_steps.jsonl"
        self.report = root / "report.html"
        self.adapter = root / "adapter"
        self.job = root / "job"  # written by `lora-dist submit`
        self.logs = root / "logs"
        self.checkpoints = root / "checkpoints"
        # Facts fixed when the run first started, kept across restarts: num_ranks, micro_batches_per_step,
        # mixed_precision, rows (a hash of the data), strategy; and `from`, the checkpoint of another run that it
        # continues.
        self.facts: dict = {}
        self._lock: int | None = None  # file descriptor
        self._made: list[Path] = []  # folders that this start made, the innermost first
        self._made_lock = False
        self._before: dict[str, str | None] = {}  # by name, what a file held before this start; None if it was absent
        self.has_begun = False  # this start trains: from here on a failure is the run's, and `undo` is not called
        self.resume_from: Path | None = None  # the checkpoint that this start continues from
        self.damaged: list[Path] = []  # checkpoints that are newer than that one
        self.previous: dict | None = None  # status and error of the start before this one
        self.last_logged_step = -1  # in metrics.jsonl, when this start found it
        self.wandb_run_id: str | None = None
        self.restarts = 0
        self.num_steps: int | None = None  # of the whole run; known once the data is read

    @property
    def step(self) -> int:
        """The step that this start continues from; 0 at the first start."""
        return int(self.resume_from.name.removeprefix("step-")) if self.resume_from else 0

    def lock(self) -> None:
        """Create the folder and keep other runs out of it until this process ends.

        It is the kernel's lock on an open file: it ends with its process, so there is never a stale lock to recognise.
        Raises UserError if another process holds it, or if the folder holds files that are not a run's.
        """
        self.refuse_files_of_others()
        with boundary(f"--output_dir {self.root}: cannot be written", "give another folder"):
            self._made = [path for path in (self.root, *self.root.parents) if not path.exists()]
            self._made_lock = not os.path.lexists(self.root / ".lock")
            self.root.mkdir(parents=True, exist_ok=True)
            deadline = time.monotonic() + LOCK_PATIENCE_S
            while not self._try_lock():
                if time.monotonic() > deadline:
                    holder = os.pread(self._lock, 200, 0).decode(errors="replace")
                    raise UserError(f"--output_dir {self.root}: is in use by {holder}; give another folder")
                time.sleep(0.2)
            self._check_kinds()
            if (text := os.pread(self._lock, 200, 0)) and not text.startswith(b"process "):
                raise UserError(f"--output_dir {self.root}: .lock in it is of something else; move it away")
            for path in (self.state, self.config, self.starts):
                what = f"--output_dir {self.root}: {path.name} in it"
                self._before[path.name] = read_text(path, what) if os.path.lexists(path) else None
            os.truncate(self._lock, 0)
            job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
            os.pwrite(self._lock, f"process {os.getpid()} on {os.uname().nodename}{job}".encode(), 0)

    def refuse_files_of_others(self) -> None:
        """Raises UserError, before anything is written, unless the folder is absent, empty, or that of a run."""
        ours.refuse_files_of_others(self.root)
        if self.state.exists():
            what = f"--output_dir {self.root}: holds a run that cannot be read"
            state = self.read_state(f"{what}: {self.state.name}")
            if not self.holds_a_run() and not state.keys() >= {"status", "step", "facts"}:
                raise UserError(f"{what}: {self.state.name}: no run of lora-dist wrote it; give another folder")

    def _try_lock(self) -> bool:
        """True if this process holds the lock now. A start that is refused deletes its lock file: then open another."""
        if self._lock is not None and os.fstat(self._lock).st_nlink == 0:
            os.close(self._lock)
            self._lock = None
        if self._lock is None:
            flags = os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
            self._lock = os.open(self.root / ".lock", flags, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return os.fstat(self._lock).st_nlink > 0

    def _check_kinds(self) -> None:
        """Raises UserError if something else has the name of a file that is written later."""
        for path in (self.metrics, self.samples, self.bad_steps, self.report):
            if os.path.lexists(path) and not path.is_file():
                raise UserError(f"--output_dir {self.root}: {path.name} in it is not a file; move it away")
        if os.path.lexists(self.checkpoints) and not self.checkpoints.is_dir():
            raise UserError(f"--output_dir {self.root}: checkpoints in it is not a folder; move it away")

    def holds_a_run(self) -> bool:
        """False also if the start that began the run was killed after its first file, state.json."""
        others = (self.config, self.metrics, self.checkpoints, self.adapter)
        return self.state.exists() and any(path.exists() for path in others)

    def undo(self) -> None:
        """Leave the folder as this start found it, because the start is refused. Rank 0 only."""
        with contextlib.suppress(OSError, UserError):
            new = [self.root / name for name, text in self._before.items() if text is None]
            new += [self.metrics] if self.state in new else []
            remove_files([*new, *(path.with_name(f"{path.name}.partial") for path in new)])
            for name, text in self._before.items():
                if text is not None and text != read_text(self.root / name, name):
                    write_whole(self.root / name, text)
            if self._made_lock:
                remove_files([self.root / ".lock"])
            for path in self._made:
                ours.remove_if_empty(path)

    def begin(self, config: TrainConfig) -> None:
        """Write state.json and config.yaml of this start, which `undo` takes back. Raises UserError."""
        with boundary(f"--output_dir {self.root}: cannot be written"):
            self.write_state("running", self.step)  # the first file, because it says that the folder is a run's
            self.write_config(config)

    def begin_training(self) -> None:
        """Bring the folder to the state of the checkpoint that this start continues from. Rank 0 only.

        This cannot be taken back, so it is done when nothing more can be refused. Raises UserError.
        """
        with boundary(f"--output_dir {self.root}: cannot be written"):
            self.clear_leftovers()
            for path in self.damaged:  # otherwise they would count among the newest checkpoints, which are kept
                self.mark_damaged(path)
            # A checkpoint that was written before the evaluation at its step does not know it, so it is repeated.
            progress = read_training_state(self.resume_from)["progress"] if self.resume_from else {}
            evaluated = progress.get("eval_step") == self.step
            self.trim_metrics(self.step if self.resume_from else -1, evaluated=evaluated)
        self.has_begun = True
        with contextlib.suppress(OSError):  # a full disk
            self.write_state("running", self.step)

    def write_config(self, config: TrainConfig) -> None:
        write_whole(self.config, config_text(config))

    def write_state(self, status: str, step: int, summary: dict | None = None, *, rank_lost: bool = False) -> None:
        """Write state.json. Raises OSError.

        `step` is the last step that was saved. `rank_lost`: the run failed because a rank or its machine was gone.
        """
        assert status in STATUSES
        state = {
            "status": status, "step": step, "num_steps": self.num_steps, "restarts": self.restarts,
            "rank_lost": rank_lost, "slurm_job_id": os.environ.get("SLURM_JOB_ID"), "wandb_run_id": self.wandb_run_id,
            "facts": self.facts, "summary": summary,
        }  # fmt: skip
        write_whole(self.state, json.dumps(state, indent=2) + "\n")

    def read_state(self, what: str = "") -> dict:
        """The content of state.json. Raises UserError, about `what`, if it is not a JSON object."""
        return read_json(self.state, what or str(self.state))

    @staticmethod
    def read_lines(path: Path) -> list[dict]:
        """The objects in a .jsonl file; [] if there is no file. Lines cut off, or that hold no object, are left out."""
        return [values for line in lines_of(path) if (values := _parse(line)) is not None]

    def read_metrics(self) -> list[dict]:
        return self.read_lines(self.metrics)

    def record_start(self, start: dict) -> None:
        """Add a line to starts.jsonl. If the disk is full, the line is lost, but the run continues."""
        with contextlib.suppress(OSError):
            lines = [*self.read_lines(self.starts), start | {"previous": self.previous}]
            write_whole(self.starts, "".join(json.dumps(line) + "\n" for line in lines))

    @staticmethod
    def append_lines(path: Path, lines: list[dict]) -> None:
        """Append lines in one write. If the disk is full, they are lost, but the run continues."""
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def wandb_directories(self) -> list[Path]:
        """W&B's own directories, one per start, oldest first: offline-run-TIME-ID or run-TIME-ID."""
        directories = (self.root / "wandb").glob("*run-[0-9]*")
        return sorted(directories, key=lambda path: path.name.removeprefix("offline-"))

    def wandb_pending(self) -> list[Path]:
        """W&B directories of starts that reached no server and are not uploaded yet, oldest first."""
        offline = [path for path in self.wandb_directories() if path.name.startswith("offline-")]
        return [path for path in offline if not list(path.glob("*.wandb.synced"))]

    def wandb_sync_command(self) -> str | None:
        """The command that uploads the pending W&B directories; None if there are none."""
        pending = self.wandb_pending()
        return shlex.join(["wandb", "sync", *map(str, pending)]) if pending else None

    def record_failure(self, why: str, *, rank_lost: bool = False, refused: bool = False) -> None:
        """Set the status to "failed", at the step that was last saved. Does nothing if that cannot be written.

        `refused`: by bad input. If the training has not begun, the folder is left as this start found it.
        """
        if refused and not self.has_begun:
            return self.undo()
        with contextlib.suppress(OSError, UserError):
            self.write_state("failed", self.read_state()["step"], {"error": why}, rank_lost=rank_lost)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def saved_checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first, damaged ones included. A copy that a user made has another name."""
        return self._folders_named(ours.CHECKPOINT_NAME)

    def _folders_named(self, pattern: re.Pattern) -> list[Path]:
        found = self.checkpoints.iterdir() if self.checkpoints.is_dir() else []
        return sorted(p for p in found if pattern.fullmatch(p.name) and p.is_dir())

    def newest_whole_checkpoint(self) -> tuple[Path | None, list[Path]]:
        """(the newest checkpoint whose files match its manifest, the newer ones that are damaged or incomplete)."""
        damaged = []
        for path in reversed(self.saved_checkpoints()):
            if is_complete(path):
                return path, damaged
            damaged.append(path)
        return None, damaged

    def prune_checkpoints(self, keep: int, best_step: int | None) -> None:
        """Remove all but the newest `keep` checkpoints and the one of `best_step`."""
        whole = [path for path in self.saved_checkpoints() if (path / MANIFEST).exists()]
        for path in whole[:-keep]:
            if best_step is None or path != self.checkpoint(best_step):
                ours.remove(path)

    @staticmethod
    def mark_damaged(checkpoint: Path) -> None:
        """Rename a damaged checkpoint to NAME.damaged, so that it is not used but can still be examined."""
        damaged = checkpoint.with_suffix(".damaged")
        if os.path.lexists(damaged):
            ours.remove(damaged)
        checkpoint.rename(damaged)

    def drop_job(self) -> None:
        """Remove the files of a job that was not submitted, and the folders that are empty then."""
        ours.clear(self.job)
        for path in (self.logs, self.root):
            ours.remove_if_empty(path)

    @staticmethod
    def partial_name(folder: Path) -> Path:
        return folder.with_suffix(".partial")

    def make_partial(self, folder: Path) -> Path:
        """Create the empty folder in which the content of `folder` is written, for `put_in_place`."""
        path = self.partial_name(folder)
        if ours.clear(path):
            ours.remove(path)
        path.mkdir(parents=True)
        return path

    @staticmethod
    def drop_partial(partial: Path) -> None:
        """Delete what could not be written whole."""
        with contextlib.suppress(OSError):
            ours.clear(partial)

    @staticmethod
    def put_in_place(partial: Path, folder: Path) -> None:
        """Rename a partial folder to its final name. From an older folder of that name, files of others move along."""
        ours.put_in_place(partial, folder)
        sync(folder.parent)

    def clear_leftovers(self) -> None:
        """Remove what saves and removals left behind that a kill interrupted."""
        for path in self._folders_named(ours.LEFTOVER_NAME):
            ours.clear(path)

    def newest_metrics_step(self) -> int:
        """The last step in metrics.jsonl; -1 if there is none."""
        steps = [line.get(STEP) for line in self.read_metrics()]
        return max((step for step in steps if is_count(step)), default=-1)

    def trim_metrics(self, step: int, *, evaluated: bool = True) -> None:
        """Remove lines after `step`, and a last line that was cut off: this start takes those steps again.

        The evaluation at `step` itself is removed too if the checkpoint was written before it (not `evaluated`).
        """
        for path, key in ((self.metrics, STEP), (self.samples, STEP), (self.bad_steps, "step")):
            if path.exists():
                evaluation = "" if evaluated else "eval/loss" if path == self.metrics else "completion"
                write_whole(path, "".join(line for line in lines_of(path) if _is_kept(line, key, step, evaluation)))


def lines_of(path: Path) -> list[str]:
    """The lines of a file with their ends; [] if there is none, or something else of that name."""
    return path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.is_file() else []


def _parse(line: str) -> dict | None:
    """The object of a line; None if the line is cut off or holds no object."""
    with contextlib.suppress(UserError), boundary("line"):
        values = parse_json(line)
        return values if isinstance(values, dict) and line.endswith("\n") else None


def _is_kept(line: str, step_key: str, step: int, evaluation_key: str) -> bool:
    """True if a complete line is from before `step`, or from `step` without `evaluation_key` ("" matches no line)."""
    values = _parse(line) or {}
    line_step = values.get(step_key)
    return is_count(line_step) and (line_step < step or (line_step == step and evaluation_key not in values))
