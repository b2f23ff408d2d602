"""How far a run is: read from its folder, and from Slurm if it is a job. Imports no torch."""

import dataclasses
import datetime
import json
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from lora_dist.cluster.slurm import job_fields
from lora_dist.errors import UserError
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.units import count

RECENT_STEPS = 20  # their median is the rate
SILENT_S = 120  # a running run that logged nothing for longer than this is reported


@dataclass(frozen=True)
class RunStatus:
    """What the files and Slurm tell about a run; None if they do not tell it."""

    run: str  # the run folder
    status: str  # of state.json; "waiting" before the first start
    step: int  # optimizer steps completed; after a kill, `saved_step` of them are left
    saved_step: int
    num_steps: int | None
    restarts: int
    step_time_s: float | None
    tokens_per_second: float | None
    time_left_s: float | None
    silent_s: float | None  # since the last line of metrics.jsonl
    loss: float | None
    eval_loss: float | None
    error: str | None
    job_id: str | None
    job: dict[str, str]  # fields of `scontrol show job`
    log: str | None
    wandb_sync: str | None  # command that uploads what W&B kept on disk
    config: dict

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)

    def text(self) -> str:
        """A few lines for people."""
        of = f" of {self.num_steps}" if self.num_steps else ""
        lines = [f"run: {self.run}: {self.status}, step {self.step}{of}, {count(self.restarts, 'restart')}"]
        if self.status != "completed":
            lines.append(f"saved: step {self.saved_step}")
        lines += [self._job_line()] if self.job_id else []
        if self.step_time_s:
            rate = f"rate: {self.step_time_s:.2f} s per step, {self.tokens_per_second:.0f} tokens per second"
            lines.append(rate + (f"; {_hours(self.time_left_s)} left" if self.time_left_s else ""))
        losses = {"training": self.loss, "held-out": self.eval_loss}
        if any(value is not None for value in losses.values()):
            texts = (f"{value:.4f} {name}" for name, value in losses.items() if value is not None)
            lines.append(f"loss: {', '.join(texts)}")
        if self.error:
            lines.append(f"error: {self.error}")
        if self.status == "running" and self.silent_s and self.silent_s > SILENT_S:
            lines.append(f"warning: nothing was logged for {_hours(self.silent_s)}; the run may have ended")
        lines += [f"log: {self.log}"] if self.log else []
        lines += [f"wandb: upload with: {self.wandb_sync}"] if self.wandb_sync else []
        return "\n".join(lines)

    def _job_line(self) -> str:
        job = self.job
        if not job:
            return f"job: {self.job_id}, which Slurm does not know here, or no longer knows"
        reason, start, nodes, ran, limit, restarts = (
            job.get(name, "unknown") for name in ("Reason", "StartTime", "NodeList", "RunTime", "TimeLimit", "Restarts")
        )
        line = f"job: {self.job_id} {job['JobState']}"
        if job["JobState"] == "PENDING":
            return f"{line} ({reason}), expected to start {start}"
        return f"{line} on {nodes}, {ran} of {limit}, {restarts} {'requeue' if restarts == '1' else 'requeues'}"


def _hours(seconds: float) -> str:
    """H:MM:SS, with days in front if there are any."""
    return str(datetime.timedelta(seconds=round(seconds)))


def read_status(root: Path) -> RunStatus:
    """The status of the run in this folder. Raises UserError if there is none."""
    folder = RunFolder(root)
    submitted = _read_json(folder.job / "submitted.json")
    state = _read_json(folder.state)
    if not state and not submitted:
        raise UserError(f"{root}: holds no run: no state.json, no job/submitted.json; give a run folder")
    state = state or {"status": "waiting", "step": 0, "restarts": 0}
    lines = folder.read_metrics()
    step = max([state["step"], *(line[STEP] for line in lines[-1:])])
    num_steps, summary = state.get("num_steps"), state.get("summary") or {}
    step_time_s, tokens_per_second = _recent_rate(lines)
    has_estimate = state["status"] == "running" and step_time_s and num_steps
    job_id = submitted.get("job_id") or state.get("slurm_job_id")
    settings = folder.config if folder.config.exists() else folder.job / "config.yaml"
    return RunStatus(
        run=str(root), status=state["status"], step=step, saved_step=state["step"], num_steps=num_steps,
        restarts=state["restarts"], step_time_s=step_time_s, tokens_per_second=tokens_per_second,
        time_left_s=(num_steps - step) * step_time_s if has_estimate else None,
        silent_s=time.time() - lines[-1]["time"] if lines else None,
        loss=_last(lines, "train/loss"), eval_loss=_last(lines, "eval/loss"), error=summary.get("error"),
        job_id=job_id, job=job_fields(job_id) if job_id else {}, log=submitted.get("log"),
        wandb_sync=folder.wandb_sync_command(),
        config=yaml.safe_load(settings.read_text(encoding="utf-8")) if settings.exists() else {},
    )  # fmt: skip


def _recent_rate(lines: list[dict]) -> tuple[float | None, float | None]:
    """(seconds per step, tokens per second): medians over the recent steps, which one slow step does not change."""
    timed = [line for line in lines if "perf/step_time_s" in line][-RECENT_STEPS:]
    if not timed:
        return None, None
    return tuple(statistics.median(line[name] for line in timed)
                 for name in ("perf/step_time_s", "perf/tokens_per_second"))  # fmt: skip


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _last(lines: list[dict], name: str) -> float | None:
    return next((line[name] for line in reversed(lines) if name in line), None)


def comparison(runs: list[RunStatus]) -> str:
    """Several runs as a table, the lowest held-out loss first, with the settings that differ among them."""
    names = [
        name for name in runs[0].config if name != "output_dir" and len({str(r.config.get(name)) for r in runs}) > 1
    ]
    runs = sorted(runs, key=lambda run: (run.eval_loss is None, run.eval_loss))
    rows = [["run", "status", "step", *names, "loss", "held-out"]]
    for run in runs:
        losses = ["" if loss is None else f"{loss:.4f}" for loss in (run.loss, run.eval_loss)]
        rows.append([run.run, run.status, str(run.step), *(str(run.config.get(name)) for name in names), *losses])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
