"""The mirror in Weights & Biases: one run per training, however often it was killed, every step in it once.

W&B only appends. So it goes on from the step it holds already, which the server says, or the files of the run on this
disk; metrics.jsonl has what is missing until the step that training goes on from, and what W&B has is not sent again.
"""

import json
import netrc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import requests
import wandb
import yaml

from lora_dist import signals
from lora_dist.errors import UserError
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.tracking.metric_names import METRICS, PROJECT

COLUMNS = ("step", "prompt", "reference", "completion")
PROBE_S, INIT_S, SEND_EVERY_S, FINISH_S, FAIL_S = 3, 6, 5, 60, 10


class WandbRun:
    """Online where there is an account and a server that answers, else kept on disk: training never waits."""

    def __init__(self, folder: RunFolder, say: Callable[[str], None]):
        self.folder, self.say, self._silent = folder, say, threading.Lock()
        offline = "WANDB_MODE" not in os.environ and not _reachable()
        try:
            self.run = _init(folder, offline)
        except wandb.errors.Error as error:  # CommError, AuthenticationError, UsageError
            say(f"wandb: no answer from the server ({str(error).splitlines()[0]}): keeping the run on disk")
            wandb.teardown()
            self.run = _init(folder, offline=True)
        if self.run.offline:
            self.held = held_step(folder, [p for p in folder.wandb_starts() if p != Path(self.run.dir).parent])
        else:
            self.held = self.run.starting_step - 1
            for path in folder.wandb_offline():  # the server gets their steps now, from metrics.jsonl
                _mark_uploaded(path)
        folder.wandb_run_id = self.run.id
        folder.write_state("running", folder.read_state()["step"])
        self.resumed_at = replay(self.run, folder, after=self.held)
        say(f"wandb: {self.where()}")

    def where(self) -> str:
        """The run's address; or how to upload it."""
        return f"offline; upload with: {self.folder.wandb_sync()}" if self.run.offline else self.run.url

    def log(self, values: dict, step: int) -> None:
        if step > self.held:
            self.run.log(values, step=step)
        elif step == self.held == self.resumed_at:  # its row is closed, but this is new: it goes into the next one
            self.run.log(values, step=step + 1)

    def log_samples(self, samples: list[dict], step: int) -> None:
        self.log({STEP: step, "eval/samples": _table(samples, step)}, step)

    def alert(self, title: str, text: str) -> None:
        self.run.alert(title=title[:63], text=text, level="WARN")  # W&B takes no longer ones

    def log_adapter(self) -> None:
        artifact = wandb.Artifact(f"adapter-{self.run.id}", type="model", metadata={"run": self.folder.root.name})
        artifact.add_dir(str(self.folder.adapter))
        self.run.log_artifact(artifact)

    def finish(self, *, why: str | None) -> None:
        """Returns within FINISH_S, whatever the server does, and says where the run is. `why` it failed, if it did."""
        if why:
            self._say_why(why)
        started = time.monotonic()
        self.run.finish(exit_code=int(bool(why)))
        late = time.monotonic() - started >= FINISH_S
        rest = f"; not all was taken in {FINISH_S} s: upload it with: lora-dist push {self.folder.root}" if late else ""
        self.say(f"wandb: {self.where()}{rest}")

    def fail(self, why: str) -> None:
        """All ranks leave: say so, and wait for it no longer than FAIL_S. For the watchdog's thread."""

        def say_so():
            self._say_why(why)
            self.run.finish(exit_code=1)

        thread = threading.Thread(target=say_so, daemon=True)
        thread.start()
        thread.join(FAIL_S)

    def _say_why(self, why: str) -> None:
        """Once: of a rank that is lost, the main thread may hear by an error of its own while the watchdog says it."""
        if self._silent.acquire(blocking=False):
            self.alert(f"{self.folder.root.name}: failed", why)


def _init(folder: RunFolder, offline: bool, **more) -> wandb.Run:
    settings = wandb.Settings(
        init_timeout=INIT_S, finish_timeout=FINISH_S, x_transaction_log_flush_interval=1,
        x_file_stream_transmit_interval=SEND_EVERY_S, silent=True,
        stop_fn=signals.ask_to_stop,  # its own would interrupt this rank alone
    )  # fmt: skip
    if offline:  # else WANDB_MODE decides
        settings.mode = "offline"
    name = os.environ.get("WANDB_NAME", folder.root.name)
    as_usual = {"id": folder.wandb_run_id, "resume": "allow", "project": os.environ.get("WANDB_PROJECT", PROJECT)}
    run = wandb.init(
        dir=str(folder.root), name=name, job_type="train", config=run_config(folder), settings=settings,
        **(as_usual | more),
    )  # fmt: skip
    run.define_metric(STEP)
    for group in sorted({metric.name.partition("/")[0] for metric in METRICS}):
        run.define_metric(f"{group}/*", step_metric=STEP)
    return run


def run_config(folder: RunFolder) -> dict:
    """All settings, and how the newest start of the run was made."""
    start = (folder.read_lines(folder.starts) or [{}])[-1]
    settings = yaml.safe_load(folder.config.read_text(encoding="utf-8"))
    return {"config": settings, **{key: value for key, value in start.items() if key not in ("time", "previous")}}


def replay(run: wandb.Run, folder: RunFolder, after: int) -> int:
    """Log what metrics.jsonl and samples.jsonl hold of the steps after `after`. Their last step; -1 where none is."""
    rows: dict[int, dict] = {}
    for line in folder.read_metrics():
        rows.setdefault(line[STEP], {}).update({name: value for name, value in line.items() if name != "time"})
    samples: dict[int, list[dict]] = {}
    for line in folder.read_lines(folder.samples):
        samples.setdefault(line[STEP], []).append(line)
    for step in sorted(step for step in rows if step > after):
        table = {"eval/samples": _table(samples[step], step)} if step in samples else {}
        run.log(rows[step] | table, step=step)
    return max(rows, default=-1)


def _table(samples: list[dict], step: int) -> wandb.Table:
    return wandb.Table(columns=list(COLUMNS), data=[[step, *(s[name] for name in COLUMNS[1:])] for s in samples])


def _mark_uploaded(directory: Path) -> None:
    """As `wandb sync` does, which then leaves it out: it appends, and would append the same steps again."""
    for file in directory.glob("*.wandb"):
        file.with_name(f"{file.name}.synced").touch()


def held_step(folder: RunFolder, earlier: list[Path]) -> int:
    """The last step that W&B has, or gets, of starts that have these directories; -1 where there is none.

    Of one without a server it is what its file holds, which lacks what a killed process had not written yet. What one
    with a server had sent is not known here: at most all that was logged, so that no step comes twice.
    """
    for directory in reversed(earlier):
        if not directory.name.startswith("offline-"):
            return folder.logged_until
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(directory)]
        shown = subprocess.run(command, capture_output=True, text=True).stdout
        records = [json.loads(line) for line in shown.splitlines() if line.startswith("{")]
        steps = [record["history"]["item"]["_step"] for record in records if "history" in record]
        if steps:
            return max(steps)
    return -1


def push(folder: RunFolder, project: str | None, entity: str | None) -> str:
    """Replay a run folder into one new run of W&B. Returns its address. Raises UserError."""
    if not folder.starts.exists():
        raise UserError(f"{folder.root}: holds no starts.jsonl; give the folder of a run that has begun")
    if "WANDB_MODE" not in os.environ and not _reachable():
        raise UserError(f"WANDB_BASE_URL {_base_url()}: no key, or no answer; log in with `wandb login`, or set "
                        "WANDB_MODE=offline")  # fmt: skip
    more = {"id": None, "resume": None, "entity": entity} | ({"project": project} if project else {})
    try:
        run = _init(folder, offline=False, **more)
    except wandb.errors.Error as error:
        raise UserError(f"WANDB_BASE_URL {_base_url()}: {str(error).splitlines()[0]}") from None
    replay(run, folder, after=-1)
    where = run.url or f"offline; upload with: wandb sync {Path(run.dir).parent}"
    run.finish(exit_code=int(folder.read_state()["status"] == "failed"))
    return where


def _base_url() -> str:
    return wandb.setup().settings.base_url  # WANDB_BASE_URL and settings files included


def _reachable() -> bool:
    """Whether wandb would find a key, and a server that answers: its own attempt could take minutes."""
    return _has_credentials() and not why_no_answer(_base_url())


def _has_credentials() -> bool:
    """Without wandb's prompt on a terminal."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    try:
        host = _base_url().partition("://")[2].partition("/")[0].partition(":")[0]
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def why_no_answer(url: str, timeout_s: float = PROBE_S) -> str | None:
    """None where a request is answered soon: what the answer means, or an odd certificate, is wandb's to say."""
    try:
        code = requests.post(f"{url}/graphql", json={"query": "{ __typename }"}, timeout=timeout_s).status_code
        return f"answers with HTTP {code}" if code >= 500 else None
    except requests.exceptions.SSLError:
        return None
    except (requests.ConnectionError, requests.Timeout) as error:
        return f"no answer ({type(error).__name__})"
