"""Mirrors a training in Weights & Biases: one W&B run per training, however often it was killed, with every step once.

W&B can only append. So each start first finds the last step that W&B has: from the server, or from W&B's files on this
disk. Then it sends the later steps that metrics.jsonl holds, and skips new steps that W&B has already.
"""

import json
import netrc
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import requests
import wandb

from lora_dist import signals
from lora_dist.boundary import boundary
from lora_dist.errors import UserError
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.tracking.metric_names import METRICS, PROJECT
from lora_dist.tracking.record import RunRecord

SAMPLE_COLUMNS = ("step", "prompt", "reference", "completion")
# Time-outs in seconds: of the request that tests the server, of wandb.init, and of the two ways to end. wandb sends its
# data every SEND_EVERY_S.
PROBE_S, INIT_S, FINISH_S, FAIL_S = 3, 6, 60, 10
SEND_EVERY_S = 5


class WandbMirror:
    """The W&B run of a training. Online if there is an account and a server that answers; otherwise kept on disk.

    Training never waits for the server. `print_line` prints one line for the user.
    """

    def __init__(self, folder: RunFolder, print_line: Callable[[str], None]):
        self.folder, self.print_line = folder, print_line
        self._failure_told = threading.Lock()  # held once W&B was told why the run failed
        offline = "WANDB_MODE" not in os.environ and not _reachable()
        try:
            self.wandb_run = _init(folder, offline)
        except wandb.errors.Error as error:  # CommError, AuthenticationError, UsageError
            why = str(error).splitlines()[0]
            print_line(f"wandb: no answer from the server ({why}); the run is kept on disk")
            wandb.teardown()
            self.wandb_run = _init(folder, offline=True)
        if self.wandb_run.offline:
            own = Path(self.wandb_run.dir).parent
            self.last_step = last_local_step(folder, [path for path in folder.wandb_directories() if path != own])
        else:
            self.last_step = self.wandb_run.starting_step - 1
            for path in folder.wandb_pending():  # `replay` now sends their steps to the server, from metrics.jsonl
                _mark_uploaded(path)
        folder.wandb_run_id = self.wandb_run.id
        folder.write_state("running", folder.read_state()["step"])
        self.replayed_to = replay(self.wandb_run, RunRecord(folder), after=self.last_step)
        print_line(f"wandb: {self.where()}")

    def where(self) -> str:
        """The address of the W&B run, or how to upload it."""
        if self.wandb_run.offline:
            return f"offline; upload with: {self.folder.wandb_sync_command()}"
        return self.wandb_run.url

    def log(self, values: dict, step: int) -> None:
        if step > self.last_step:
            self.wandb_run.log(values, step=step)
        elif step == self.last_step == self.replayed_to:
            # W&B has closed the row of this step, but these values are new: put them into the next row.
            self.wandb_run.log(values, step=step + 1)

    def log_samples(self, samples: list[dict], step: int) -> None:
        self.log({STEP: step, "eval/samples": _table(samples, step)}, step)

    def alert(self, title: str, text: str) -> None:
        self.wandb_run.alert(title=title[:63], text=text, level="WARN")  # W&B refuses longer titles

    def log_adapter(self) -> None:
        metadata = {"run": self.folder.root.name}
        artifact = wandb.Artifact(f"adapter-{self.wandb_run.id}", type="model", metadata=metadata)
        artifact.add_dir(str(self.folder.adapter))
        self.wandb_run.log_artifact(artifact)

    def finish(self, *, why: str | None) -> None:
        """End the W&B run and print where it is. Returns within FINISH_S, whatever the server does.

        `why` says why the training failed; None if it did not fail.
        """
        if why:
            self._tell_failure(why)
        started = time.monotonic()
        self.wandb_run.finish(exit_code=int(bool(why)))
        incomplete = ""
        if time.monotonic() - started >= FINISH_S:
            incomplete = f"; the server did not take all data within {FINISH_S} s: "
            incomplete += f"upload the run with: lora-dist push {shlex.quote(str(self.folder.root))}"
        self.print_line(f"wandb: {self.where()}{incomplete}")

    def fail(self, why: str) -> None:
        """Mark the W&B run as failed, within FAIL_S. The watchdog calls this before it ends the process."""

        def tell_and_finish():
            self._tell_failure(why)
            self.wandb_run.finish(exit_code=1)

        thread = threading.Thread(target=tell_and_finish, daemon=True)
        thread.start()
        thread.join(FAIL_S)

    def _tell_failure(self, why: str) -> None:
        """Send one alert. If a rank is lost, the main thread may fail by itself while the watchdog reports it too."""
        if self._failure_told.acquire(blocking=False):
            self.alert(f"{self.folder.root.name}: failed", why)


def _init(folder: RunFolder, offline: bool, **overrides) -> wandb.Run:
    """Start or continue the W&B run of this folder. `overrides` replace arguments of wandb.init."""
    settings = wandb.Settings(
        init_timeout=INIT_S, finish_timeout=FINISH_S, x_transaction_log_flush_interval=1,
        x_file_stream_transmit_interval=SEND_EVERY_S, silent=True,
        stop_fn=signals.ask_to_stop,  # wandb's own function would interrupt this rank alone
    )  # fmt: skip
    if offline:  # otherwise WANDB_MODE decides
        settings.mode = "offline"
    name = os.environ.get("WANDB_NAME", folder.root.name)
    arguments = {"id": folder.wandb_run_id, "resume": "allow", "project": os.environ.get("WANDB_PROJECT", PROJECT)}
    wandb_run = wandb.init(
        dir=str(folder.root), name=name, job_type="train", config=_wandb_config(folder), settings=settings,
        **(arguments | overrides),
    )  # fmt: skip
    wandb_run.define_metric(STEP)
    for group in sorted({metric.name.partition("/")[0] for metric in METRICS}):
        wandb_run.define_metric(f"{group}/*", step_metric=STEP)
    return wandb_run


def _wandb_config(folder: RunFolder) -> dict:
    """The `config` of the W&B run: all settings, and how the newest start of the training was made."""
    record = RunRecord(folder)
    start = (record.starts or [{}])[-1]
    return {"config": record.config} | {key: value for key, value in start.items() if key not in ("time", "previous")}


def replay(wandb_run: wandb.Run, record: RunRecord, after: int) -> int:
    """Log to W&B what metrics.jsonl and samples.jsonl hold of the steps after `after`.

    Returns the last step that metrics.jsonl holds; -1 if it holds none.
    """
    rows: dict[int, dict] = {}
    for line in record.lines:
        rows.setdefault(line[STEP], {}).update({name: value for name, value in line.items() if name != "time"})
    samples: dict[int, list[dict]] = {}
    for line in record.samples:
        samples.setdefault(line[STEP], []).append(line)
    for step in sorted(step for step in rows if step > after):
        table = {"eval/samples": _table(samples[step], step)} if step in samples else {}
        wandb_run.log(rows[step] | table, step=step)
    return max(rows, default=-1)


def _table(samples: list[dict], step: int) -> wandb.Table:
    rows = [[step, *(sample.get(name) for name in SAMPLE_COLUMNS[1:])] for sample in samples]
    return wandb.Table(columns=list(SAMPLE_COLUMNS), data=rows)


def _mark_uploaded(directory: Path) -> None:
    """Mark a W&B directory as `wandb sync` does, so that it is not uploaded: that would append the same steps again."""
    for file in directory.glob("*.wandb"):
        file.with_name(f"{file.name}.synced").touch()


def last_local_step(folder: RunFolder, directories: list[Path]) -> int:
    """Last step already in these W&B directories of earlier starts (uploaded or pending); -1 if there is none.

    An offline start has the steps in its file; steps that a killed process had not written yet are missing there. For
    an online start it is not known here what was sent. It counts as having all that was logged, so that no step is sent
    twice.
    """
    for directory in reversed(directories):
        if not directory.name.startswith("offline-"):
            return folder.last_logged_step
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)]
        shown = subprocess.run(command, capture_output=True, text=True).stdout
        records = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
        steps = [record["history"]["item"]["_step"] for record in records if "history" in record]
        if steps:
            return max(steps)
    return -1


def push(folder: RunFolder, project: str | None, entity: str | None) -> str:
    """Replay a run folder into one new W&B run. Returns its address. Raises UserError."""
    record = RunRecord(folder)
    if not record.starts:
        raise UserError(f"{folder.root}: has no starts.jsonl; give the folder of a run that was started")
    if "WANDB_MODE" not in os.environ and not _reachable():
        raise UserError(f"WANDB_BASE_URL {_base_url()}: no key, or no answer; log in with `wandb login`, or set "
                        "WANDB_MODE=offline")  # fmt: skip
    overrides = {"id": None, "resume": None, "entity": entity} | ({"project": project} if project else {})
    try:
        wandb_run = _init(folder, offline=False, **overrides)
    except wandb.errors.Error as error:
        raise UserError(f"WANDB_BASE_URL {_base_url()}: {str(error).splitlines()[0]}") from None
    with boundary(f"{folder.root}: cannot be sent"):
        replay(wandb_run, record, after=-1)
    where = wandb_run.url or f"offline; upload with: wandb sync {shlex.quote(str(Path(wandb_run.dir).parent))}"
    wandb_run.finish(exit_code=int(record.state.get("status") == "failed"))
    for problem in record.problems:
        print(f"warning: cannot be read: {problem}", file=sys.stderr)
    return where


def _base_url() -> str:
    return wandb.setup().settings.base_url  # from WANDB_BASE_URL or wandb's settings files


def _reachable() -> bool:
    """True if wandb would find a key, and a server that answers. Its own attempt could take minutes."""
    return _has_credentials() and not why_no_answer(_base_url())


def _has_credentials() -> bool:
    """Looks where wandb looks for a key, but without its prompt on a terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        host = _base_url().partition("://")[2].partition("/")[0].partition(":")[0]
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def why_no_answer(url: str, timeout_s: float = PROBE_S) -> str | None:
    """Why a W&B server cannot be used now; None if it answers a request in time.

    An answer other than HTTP 5xx, or a certificate that requests rejects, counts as an answer: wandb reports those.
    """
    try:
        code = requests.post(f"{url}/graphql", json={"query": "{ __typename }"}, timeout=timeout_s).status_code
        return f"answers with HTTP {code}" if code >= 500 else None
    except requests.exceptions.SSLError:
        return None
    except (requests.ConnectionError, requests.Timeout) as error:
        return f"no answer ({type(error).__name__})"
