"""The run folder: the names of its files, and how each is written so that a kill never leaves half a file."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import time
from pathlib import Path

import yaml

from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.files import MANIFEST, is_complete, sync, write_whole

STEP = "train/global_step"  # optimizer steps completed; in each line of metrics.jsonl and samples.jsonl
STATUSES = ("running", "completed", "preempted", "failed")
LOCK_PATIENCE_S = 10.0  # a run that was killed a moment ago may still hold the lock


def write_config(path: Path, config: TrainConfig) -> None:
    """Write all settings as YAML that `--config` reads back. Raises OSError."""
    write_whole(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))


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
        # mixed_precision, rows (a hash of the data); and `from`, the checkpoint of another run that it continues.
        self.facts: dict = {}
        self.resume_from: Path | None = None  # the checkpoint that this start continues from
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
        Raises UserError if another process holds it.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.root / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
            deadline = time.monotonic() + LOCK_PATIENCE_S
            while not self._try_lock():
                if time.monotonic() > deadline:
                    holder = os.pread(self._lock, 200, 0).decode()
                    raise UserError(f"--output_dir {self.root}: is in use by {holder}; give another folder")
                time.sleep(0.2)
            os.truncate(self._lock, 0)
            job = f", Slurm job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
            os.pwrite(self._lock, f"process {os.getpid()} on {os.uname().nodename}{job}".encode(), 0)
        except OSError as error:
            raise UserError(f"--output_dir {self.root}: cannot be written: {error.strerror}") from None

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def begin(self, config: TrainConfig) -> None:
        """Write config.yaml and the first state.json. Raises UserError."""
        try:
            self.write_config(config)
            self.write_state("running", 0)
        except OSError as error:
            raise UserError(f"--output_dir {self.root}: cannot be written: {error.strerror}") from None

    def write_config(self, config: TrainConfig) -> None:
        write_config(self.config, config)

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

    def read_state(self) -> dict:
        return json.loads(self.state.read_text(encoding="utf-8"))

    @staticmethod
    def read_lines(path: Path) -> list[dict]:
        """The lines of a .jsonl file; [] if there is no file. Lines that a kill or a full disk cut off are left out."""
        found = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
            with contextlib.suppress(ValueError):
                found += [json.loads(line)] if line.endswith("\n") else []
        return found

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
        pending = " ".join(map(str, self.wandb_pending()))
        return f"wandb sync {pending}" if pending else None

    def record_failure(self, why: str, *, rank_lost: bool = False) -> None:
        """Set the status to "failed", at the step that was last saved. Does nothing if that cannot be written."""
        with contextlib.suppress(OSError):
            self.write_state("failed", self.read_state()["step"], {"error": why}, rank_lost=rank_lost)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def saved_checkpoints(self) -> list[Path]:
        """All checkpoints, oldest first, damaged ones included."""
        return sorted(path for path in self.checkpoints.glob("step-*") if path.suffix == "")

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
                self.remove(path)

    @staticmethod
    def mark_damaged(checkpoint: Path) -> None:
        """Rename a damaged checkpoint to NAME.damaged, so that it is not used but can still be examined."""
        damaged = checkpoint.with_suffix(".damaged")
        shutil.rmtree(damaged, ignore_errors=True)
        checkpoint.rename(damaged)

    @staticmethod
    def remove(folder: Path) -> None:
        """Remove a folder. It is renamed first, so that an interrupted removal never looks like a complete folder."""
        removed = folder.with_suffix(".removed")
        shutil.rmtree(removed, ignore_errors=True)
        folder.rename(removed)
        shutil.rmtree(removed)

    @staticmethod
    def partial_name(folder: Path) -> Path:
        return folder.with_suffix(".partial")

    def make_partial(self, folder: Path) -> Path:
        """Create the empty folder in which the content of `folder` is written, for `put_in_place`."""
        path = self.partial_name(folder)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def put_in_place(self, partial: Path, folder: Path) -> None:
        """Rename a partial folder to its final name; an older or damaged folder of that name is removed."""
        if folder.exists():
            self.remove(folder)
        partial.rename(folder)
        sync(folder.parent)

    def clear_leftovers(self) -> None:
        """Remove what saves and removals left behind that a kill interrupted."""
        for path in [*self.checkpoints.glob("*.partial"), *self.checkpoints.glob("*.removed")]:
            shutil.rmtree(path)

    def trim_metrics(self, step: int, *, evaluated: bool = True) -> None:
        """Remove lines after `step`, and a last line that was cut off: this start takes those steps again.

        The evaluation at `step` itself is removed too if the checkpoint was written before it (not `evaluated`).
        """
        self.last_logged_step = max((line[STEP] for line in self.read_metrics()), default=-1)
        for path, key in ((self.metrics, STEP), (self.samples, STEP), (self.bad_steps, "step")):
            if path.exists():
                evaluation = "" if evaluated else "eval/loss" if path == self.metrics else "completion"
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                write_whole(path, "".join(line for line in lines if _is_kept(line, key, step, evaluation)))


def _is_kept(line: str, step_key: str, step: int, evaluation_key: str) -> bool:
    """True if a complete line is from before `step`, or from `step` without `evaluation_key` ("" matches no line)."""
    try:
        values = json.loads(line)
        line_step = values[step_key]
        return line.endswith("\n") and (line_step < step or (line_step == step and evaluation_key not in values))
    except (ValueError, KeyError):
        return False
