"""How far a run is: read from its folder, and from Slurm if it is a job. Imports no torch."""

import dataclasses
import datetime
import os
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from lora_dist.boundary import read_json, read_yaml_settings
from lora_dist.cluster.slurm import job_fields
from lora_dist.errors import UserError
from lora_dist.run.folder import RunFolder
from lora_dist.tracking.record import RunRecord, is_finite_number
from lora_dist.units import count

RECENT_STEPS = 20  # their median is the rate
MAX_SECONDS = 10**9  # 31 years: no longer time is shown
JOB_ID = re.compile(r"[0-9]+(_[0-9]+)?")  # of Slurm
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
    problems: list[str]  # what of the folder could not be read

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
        lines += [f"warning: cannot be read: {problem}" for problem in self.problems]
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
    return str(datetime.timedelta(seconds=round(min(max(seconds, 0), MAX_SECONDS))))


def read_status(root: Path) -> RunStatus:
    """The status of the run in this folder. Raises UserError if there is none."""
    folder = RunFolder(root)
    record, submission = RunRecord(folder), folder.job / "submitted.json"
    if not os.path.lexists(folder.state) and not os.path.lexists(submission):
        raise UserError(f"{root}: holds no run: no state.json, no job/submitted.json; give a run folder")
    submitted = record.part_of_file(submission, read_json)
    state = {
        "status": "unknown" if os.path.lexists(folder.state) else "waiting",
        "step": 0,
        "restarts": 0,
    } | record.state
    num_steps = state.get("num_steps")
    step_time_s, tokens_per_second = _recent_rate(record.lines)
    has_estimate = state["status"] == "running" and step_time_s and num_steps
    job_id, log = (
        value if isinstance(value, str) else None for value in (submitted.get("job_id"), submitted.get("log"))
    )
    job_id = job_id or state.get("slurm_job_id")
    logged = record.lines[-1].get("time") if record.lines else None
    return RunStatus(
        run=str(root), status=state["status"], step=record.step, saved_step=state["step"], num_steps=num_steps,
        restarts=state["restarts"], step_time_s=step_time_s, tokens_per_second=tokens_per_second,
        time_left_s=max(num_steps - record.step, 0) * step_time_s if has_estimate else None,
        silent_s=time.time() - logged if is_finite_number(logged) else None,
        loss=record.last("train/loss"), eval_loss=record.last("eval/loss"), error=record.summary.get("error"),
        job_id=job_id, job=job_fields(job_id) if job_id and JOB_ID.fullmatch(job_id) else {}, log=log,
        wandb_sync=folder.wandb_sync_command(),
        config=record.config or record.part_of_file(folder.job / "config.yaml", read_yaml_settings),
        problems=record.problems,
    )  # fmt: skip


def _recent_rate(lines: list[dict]) -> tuple[float | None, float | None]:
    """(seconds per step, tokens per second): medians over the recent steps, which one slow step does not change."""
    names = ("perf/step_time_s", "perf/tokens_per_second")
    timed = [line for line in lines if all(is_finite_number(line.get(name)) for name in names)][-RECENT_STEPS:]
    if not timed:
        return None, None
    return tuple(statistics.median(line[name] for line in timed) for name in names)


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
