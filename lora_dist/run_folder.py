"""The run folder: its file names, and how each file is written so that a kill never leaves half of one."""

import dataclasses
import json
import shutil
from pathlib import Path

import yaml

from lora_dist.config import TrainConfig, UserError
from lora_dist.manifest import MANIFEST, is_complete, write_whole

STATUSES = ("running", "completed", "preempted", "failed")


class RunFolder:
    def __init__(self, root: Path):
        self.root = root
        self.config = root / "config.yaml"
        self.state = root / "state.json"
        self.metrics = root / "metrics.jsonl"
        self.report = root / "report.html"
        self.adapter = root / "adapter"
        self.checkpoints = root / "checkpoints"

    def create(self, config: TrainConfig) -> None:
        """Make the folder with config.yaml and a state. Raises UserError where it cannot be, or holds a run."""
        if self.state.exists():
            raise UserError(f"--output_dir {self.root}: holds a run already; give another folder, or remove this one")
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            write_whole(self.config, yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True))
            self.write_state("running", 0)
        except OSError as error:
            raise UserError(f"--output_dir {self.root}: cannot be written: {error.strerror}") from None

    def write_state(self, status: str, step: int, summary: dict | None = None) -> None:
        assert status in STATUSES
        write_whole(self.state, json.dumps({"status": status, "step": step, "summary": summary}, indent=2) + "\n")

    def record_failure(self, error: BaseException) -> None:
        """Say failed, at the step that was last written."""
        step = json.loads(self.state.read_text(encoding="utf-8"))["step"]
        self.write_state("failed", step, {"error": f"{type(error).__name__}: {error}"})

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step:08d}"

    def complete_checkpoints(self) -> list[Path]:
        """Oldest first; those whose manifest is written and fits."""
        return [path for path in sorted(self.checkpoints.glob("step-*")) if is_complete(path)]

    def prune_checkpoints(self, keep: int) -> None:
        for path in self.complete_checkpoints()[:-keep]:
            (path / MANIFEST).unlink()  # first: what is left of an interrupted removal is never taken for whole
            shutil.rmtree(path)
