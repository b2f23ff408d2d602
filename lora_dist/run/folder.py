"""The run folder: its file names, and how each file is written so that a kill never leaves half of one."""

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

STEP = "train/global_step"  # optimizer steps done, in metrics.jsonl and samples.jsonl
STATUSES = ("running", "completed", "preempted", "failed")
LOCK_PATIENCE_S = 10.0  # a run that was killed a moment ago may still be going


def write_config(path: Path, config: TrainConfig) -> None:
    """All settings, as `--config` takes them back."""
    write_whole(path, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))


class RunFolder:
    """`resume_from`: the checkpoint this run goes on from. `begun`: what its settings do not say of its beginning."""

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
        self.job = root / "job"  # of `lora-dist submit`
        self.logs = root / "logs"
        self.checkpoints = root / "checkpoints"
        self.resume_from: Path | None = None
        self.begun: dict = {}
        self.previous: dict | None = None  # of the start before this one: its status, and its error
        self.logged_until = -1  # the last step in metrics.jsonl when this start found it
        self.wandb_run_id: str | None = None
        self.restarts = 0
        self.num_steps: int | None = None  # known once the data is laid out

    @property
    def step(self) -> int:
        """That this start goes on from."""
        return int(self.resume_from.name.removeprefix("step-")) if self.resume_from else 0

    def lock(self) -> None:
        """Make the folder, and keep other runs out of it until this process ends, however it ends. Raises UserError.

        The kernel's lock on an open file: it goes with its process, so there is no stale one to recognise.
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
        """Write config.yaml and a first state. Raises UserError."""
        try:
            self.write_config(config)
            self.write_state("running", 0)
        except OSError as error:
            raise UserError(f"--output_dir {self.root}: cannot be written: {error.strerror}") from None

    def write_config(self, config: TrainConfig) -> None:
        write_config(self.config, config)

    def write_state(self, status: str, step: int, summary: dict | None = None, *, rank_lost: bool = False) -> None:
        """`step`: the last one saved. `rank_lost`: whether the run failed because a rank or its machine was gone."""
        assert status in STATUSES
        state = {
            "status": status, "step": step, "num_steps": self.num_steps, "restarts": self.restarts,
            "rank_lost": rank_lost, "slurm_job_id": os.environ.get("SLURM_JOB_ID"), "wandb_run_id": self.wandb_run_id,
            "begun": self.begun, "summary": summary,
        }  # fmt: skip
        write_whole(self.state, json.dumps(state, indent=2) + "\n")

    def read_state(self) -> dict:
        return json.loads(self.state.read_text(encoding="utf-8"))

    @staticmethod
    def read_lines(path: Path) -> list[dict]:
        """What a .jsonl file holds, nothing where there is none; without lines that a kill or a full disk cut off."""
        found = []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
            with contextlib.suppress(ValueError):
                found += [json.loads(line)] if line.endswith("\n") else []
        return found

    def read_metrics(self) -> list[dict]:
        return self.read_lines(self.metrics)

    def record_start(self, start: dict) -> None:
        """Add a line to starts.jsonl. A full disk costs the line, not the run."""
        with contextlib.suppress(OSError):
            lines = [*self.read_lines(self.starts), start | {"previous": self.previous}]
            write_whole(self.starts, "".join(json.dumps(line) + "\n" for line in lines))

    @staticmethod
    def append_lines(path: Path, lines: list[dict]) -> None:
        """All at once. A full disk costs the lines, not the run."""
        with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))

    def wandb_starts(self) -> list[Path]:
        """W&B's own directories, one for each start, the oldest first: offline-run-TIME-ID, or run-TIME-ID."""
        directories = (self.root / "wandb").glob("*run-[0-9]*")
        return sorted(directories, key=lambda path: path.name.removeprefix("offline-"))

    def wandb_offline(self) -> list[Path]:
        """Those that reached no server, and are not uploaded yet."""
        starts = [path for path in self.wandb_starts() if path.name.startswith("offline-")]
        return [path for path in starts if not list(path.glob("*.wandb.synced"))]

    def wandb_sync(self) -> str | None:
        """The command that uploads them; None where nothing is left."""
        left = " ".join(map(str, self.wandb_offline()))
        return f"wandb sync {left}" if left else None

    def record_failure(self, why: str, *, rank_lost: bool = False) -> None:
        """Say failed, at the step that was last saved; where that cannot be written, it is not."""
        with contextlib.suppress(OSError):
            self.write_state("failed", self.read_state()["step"], {"error": why}, rank_lost=rank_lost)

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def saved_checkpoints(self) -> list[Path]:
        """Oldest first; whether they are whole is not looked at."""
        return sorted(path for path in self.checkpoints.glob("step-*") if path.suffix == "")

    def newest_whole_checkpoint(self) -> tuple[Path | None, list[Path]]:
        """(the newest whose manifest is there and fits every byte, newer ones of which that is not so)."""
        damaged = []
        for path in reversed(self.saved_checkpoints()):
            if is_complete(path):
                return path, damaged
            damaged.append(path)
        return None, damaged

    def prune_checkpoints(self, keep: int, best_step: int | None) -> None:
        """Remove all but the newest `keep` and the best one."""
        whole = [path for path in self.saved_checkpoints() if (path / MANIFEST).exists()]
        for path in whole[:-keep]:
            if best_step is None or path != self.checkpoint(best_step):
                self.remove(path)

    @staticmethod
    def set_aside(checkpoint: Path) -> None:
        """Rename one that is damaged, for whoever wants to look at it."""
        aside = checkpoint.with_suffix(".damaged")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)

    @staticmethod
    def remove(folder: Path) -> None:
        """What is left of an interrupted removal has another name, so that it is never taken for whole."""
        going = folder.with_suffix(".removed")
        shutil.rmtree(going, ignore_errors=True)
        folder.rename(going)
        shutil.rmtree(going)

    @staticmethod
    def partial_name(folder: Path) -> Path:
        return folder.with_suffix(".partial")

    def partial(self, folder: Path) -> Path:
        """An empty folder to write what will be `folder`."""
        path = self.partial_name(folder)
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def put_in_place(self, partial: Path, folder: Path) -> None:
        """Give what was written its name; where something has that name, damaged or older, in its place."""
        if folder.exists():
            self.remove(folder)
        partial.rename(folder)
        sync(folder.parent)

    def clear_leftovers(self) -> None:
        """Of saves and removals that a kill interrupted."""
        for path in [*self.checkpoints.glob("*.partial"), *self.checkpoints.glob("*.removed")]:
            shutil.rmtree(path)

    def trim_metrics(self, step: int, *, evaluated: bool = True) -> None:
        """Leave out what comes after `step`, and a last line that was cut off: those steps are taken again.

        An evaluation at `step` itself too, where the checkpoint was written before it and so was not `evaluated`.
        """
        self.logged_until = max((line[STEP] for line in self.read_metrics()), default=-1)
        for path, key in ((self.metrics, STEP), (self.samples, STEP), (self.bad_steps, "step")):
            if path.exists():
                again = "" if evaluated else "eval/loss" if path == self.metrics else "completion"
                lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
                write_whole(path, "".join(line for line in lines if _is_until(line, key, step, again)))


def _is_until(line: str, key: str, step: int, again: str) -> bool:
    """`again`: what marks a line of `step` itself as one that comes again; "" for none."""
    try:
        values = json.loads(line)
        return line.endswith("\n") and (values[key] < step or (values[key] == step and again not in values))
    except (ValueError, KeyError):
        return False
