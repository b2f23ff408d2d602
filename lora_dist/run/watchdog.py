"""Notices a rank that died, failed or hangs, and ends the other ranks with one line that names it.

A rank that waits in a collective cannot look around: NCCL holds it until its time-out, and gloo's error names no rank.
So each rank has a thread that writes a sign of life to the rendezvous store once a second and reads the sign of the
next rank. This is a few requests per second and rank, at any number of ranks. Ranks of the same machine are also looked
up in /proc, which is quicker and still works if the store died with its rank.

The main thread reports to this module what it is doing (`report_progress`, `report_activity`, `stop_watching`). A
process has one main thread, so these reports are kept per process and the code that trains needs no `Watchdog` object.
"""

import contextlib
import datetime
import faulthandler
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch.distributed as dist

from lora_dist.boundary import one_line
from lora_dist.entry import tell_launcher
from lora_dist.errors import RunFailed, UserError
from lora_dist.parallel.ranks import from_rank_0, gather, this_rank
from lora_dist.run.folder import RunFolder
from lora_dist.run.signed_store import SignedStore

INTERVAL_S = 1.0  # between two signs of life
PACKAGE = Path(__file__).parents[1]
# All ranks usually raise a one-line error at the same time and end by themselves; the watchdog waits this long for it.
PATIENCE_S = 1.0
_COLLECTIVE = re.compile("gloo|nccl|connection|broken pipe", re.IGNORECASE)


@dataclass(frozen=True)
class _Report:
    """What the main thread last reported. Each report replaces the one before."""

    step: int = 0  # optimizer steps completed
    doing: str = "loading"
    time_s: float | None = None  # time.monotonic() of the report; None: the main thread may take as long as it likes


_report = _Report()
_on_failure: Callable[[str], None] | None = None


def report_progress(step: int, doing: str) -> None:
    """The main thread has completed `step` optimizer steps and begins `doing`. From now on it must not stall."""
    global _report
    _report = _Report(step, doing, time.monotonic())


def report_activity() -> None:
    """The main thread has made progress within what it reported last."""
    if _report.time_s:
        report_progress(_report.step, _report.doing)


def stop_watching() -> None:
    """The main thread may now take as long as it likes."""
    global _report
    _report = _Report(_report.step, "finishing")


def call_on_failure(callback: Callable[[str], None] | None) -> None:
    """Register a function that is called with the reason before the watchdog ends this process; None removes it."""
    global _on_failure
    _on_failure = callback


@dataclass(frozen=True)
class Verdict:
    """Why all ranks must end. The first verdict that is published counts."""

    line: str
    speaker: int = 0  # the rank that prints the line
    exit_code: int = 1
    stalled: bool = False
    rank_lost: bool = False
    patience_s: float = 0.0  # seconds in which the ranks may end by themselves


def start_watchdog(folder: RunFolder, *, rank_timeout_s: float, step_timeout_s: float) -> "Watchdog":
    """Start to watch the other ranks and this one's progress, in a thread. Collective."""
    ranks = gather((socket.gethostname(), os.getpid()))
    secret = from_rank_0(os.urandom(32))  # over the ranks' own connections, not through the store
    return Watchdog(folder, ranks, secret, rank_timeout_s=rank_timeout_s, step_timeout_s=step_timeout_s)


class Watchdog:
    """The watchdog of one rank, from when the ranks have met until `stop`. Made by `start_watchdog`.

    `ranks` holds the host and the process id of each rank.
    """

    def __init__(
        self,
        folder: RunFolder,
        ranks: list[tuple[str, int]],
        secret: bytes,
        *,
        rank_timeout_s: float,
        step_timeout_s: float,
    ):
        self.folder, self.rank_timeout_s, self.step_timeout_s = folder, rank_timeout_s, step_timeout_s
        self.rank, self.hosts = this_rank(), [host for host, _ in ranks]
        local = {r: pid for r, (host, pid) in enumerate(ranks) if host == self.hosts[self.rank] and r != self.rank}
        # The other ranks of this machine. A rank in another process namespace cannot be looked up here.
        self._neighbours = {r: pid for r, pid in local.items() if _is_alive(pid)}
        # A clone, because the store's own connection is busy while a collective waits in it.
        store = dist.distributed_c10d._get_default_store().clone() if dist.is_initialized() else None
        self._store = SignedStore(store, secret) if store else None
        self._last_sign = -1.0, time.monotonic()  # time of the next rank's last sign, and when it was first seen
        self._launcher, self._said_gone, self._checked_s = os.getppid(), False, time.monotonic()
        # If the store dies with rank 0, each later request writes a C++ backtrace to stderr, so none must be made.
        self._store_is_of_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self, *, done: bool) -> None:
        """Tell the others that this rank leaves on purpose. `done`: it has finished its work."""
        self._stopped.set()
        self._thread.join()
        if not self._store or self._store_is_gone():
            return
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", True)
            if done and self.rank == 0 and self._store_is_of_rank_0:  # the others still need the store
                self._store.store.wait(
                    [f"left/{rank}" for rank in range(len(self.hosts))], datetime.timedelta(seconds=10)
                )

    def explain(self, error: BaseException) -> None:
        """Tell the other ranks why this one fails. Does not return if another rank is the cause.

        Call it with the exception that ended this rank's work.
        """
        if not self._store:
            return
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error))):
            time.sleep(self.rank_timeout_s + 3 * INTERVAL_S)  # until then the thread finds the cause and ends us
            return
        if isinstance(error, (UserError, RunFailed)):
            code = 2 if isinstance(error, UserError) else 1
            with contextlib.suppress(RuntimeError):  # the rank that holds the store has already left
                self._publish(Verdict(f"error: {error}", exit_code=code, patience_s=PATIENCE_S))
            return
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._stopped.set()  # this rank ends by its own error
        verdict = self._publish(Verdict(self._line(self.rank, f"failed: {what}")))
        if self.rank == verdict.speaker:
            print(verdict.line, file=sys.stderr, flush=True)
        time.sleep(2 * INTERVAL_S)  # let the others read it: the store may die with this rank

    def _line(self, rank: int, what: str) -> str:
        line = f"rank {rank} ({self.hosts[rank]}) {what}; last completed step: {_report.step}"
        return line + f"; start again with --output_dir {self.folder.root} to continue from its newest checkpoint"

    def _watch(self) -> None:
        """The thread. If it fails itself, the run ends: without it, a fault of another rank would be waited for."""
        try:
            self._check_each_second()
        except BaseException as error:
            why = f"the watchdog of rank {self.rank} failed ({one_line(error)}); last completed step: {_report.step}"
            self._leave(Verdict(f"error: {why}", speaker=self.rank))

    def _check_each_second(self) -> None:
        """Find out whether this rank must end."""
        while not self._stopped.wait(INTERVAL_S):
            self._forgive_a_pause()
            try:
                verdict = self._check()
            except RuntimeError as error:  # the store does not answer
                if self._stopped.wait(2 * INTERVAL_S):
                    return
                host = os.environ.get("MASTER_ADDR", "rank 0's machine")
                why = str(error).splitlines()[0]
                line = f"the rendezvous store on {host} does not answer ({why}); last completed step: {_report.step}"
                verdict = self._gone_neighbour() or Verdict(line, speaker=self.rank, rank_lost=True)
            if verdict and not self._stopped.wait(verdict.patience_s):
                self._leave(verdict)

    def _check(self) -> Verdict | None:
        """Give a sign of life; return the reason to end, if there is one. Raises RuntimeError if the store is gone."""
        if verdict := self._gone_neighbour():
            return self._publish(verdict)
        if self._store and not self._store_is_gone():
            sign = {"time": time.monotonic(), "waits": _waits_for_others(), "where": _where()}
            self._store.set(f"sign/{self.rank}", sign)
            if verdict := self._silent_rank():
                return self._publish(verdict)
            if verdict := self._store.get("verdict"):
                return Verdict(**verdict)
        time_s = _report.time_s
        if self.step_timeout_s and time_s and time.monotonic() - time_s > self.step_timeout_s:
            return self._publish(self._stall())
        return None

    def _gone_neighbour(self) -> Verdict | None:
        """A verdict if the process of another rank of this machine no longer exists."""
        for rank, pid in list(self._neighbours.items()):
            if _is_alive(pid):
                continue
            if self._has_left(rank):
                del self._neighbours[rank]
            elif not self._stopped.wait(INTERVAL_S):  # the other neighbours come to the same verdict
                first = min(other for other in {self.rank, *self._neighbours} - {rank})
                return Verdict(self._line(rank, "is gone"), speaker=first if rank == 0 else 0, rank_lost=True)
        return None

    def _silent_rank(self) -> Verdict | None:
        """A verdict if the next rank gave no sign of life for too long."""
        rank, now = (self.rank + 1) % dist.get_world_size(), time.monotonic()
        sign = (self._store.get(f"sign/{rank}") or {"time": -1.0})["time"]
        last, seen_s = self._last_sign
        if sign > last:  # an old sign that somebody repeats is none
            self._last_sign = sign, now
        elif now - seen_s > self.rank_timeout_s and not self._has_left(rank):
            what = f"gave no sign of life for {now - seen_s:.0f} s"
            return Verdict(self._line(rank, what), speaker=self.rank if rank == 0 else 0, rank_lost=True)
        return None

    def _launcher_is_gone(self) -> bool:
        """True if torchrun, accelerate or lora-dist train, which started this rank, is dead. Rank 0 says it once."""
        if os.getppid() == self._launcher:
            return False
        if self.rank == 0 and not self._said_gone:
            self._said_gone = True
            what = f"the launcher (process {self._launcher}) is gone"
            print(f"warning: {what}; the ranks save and leave after this step", file=sys.stderr, flush=True)
        return True

    def _has_left(self, rank: int) -> bool:
        """True if the rank said that it leaves on purpose."""
        if self._store_is_gone():
            return False
        try:
            return bool(self._store.get(f"left/{rank}"))
        except RuntimeError:
            return False

    def _forgive_a_pause(self) -> None:
        """After Ctrl-Z and `fg` all ranks were silent: that is no fault of theirs."""
        now = time.monotonic()
        paused_s, self._checked_s = now - self._checked_s - INTERVAL_S, now
        if paused_s > 5 * INTERVAL_S:
            self._last_sign = self._last_sign[0], self._last_sign[1] + paused_s
            report_activity()

    def _store_is_gone(self) -> bool:
        """True if the process that holds the store is dead: a request would write C++ frames to stderr."""
        if not self._store_is_of_rank_0:
            return self._launcher_is_gone()
        return 0 in self._neighbours and not _is_alive(self._neighbours[0])

    def _stall(self) -> Verdict:
        """The verdict that names the ranks that do not wait for others: they are the cause of the stall."""
        signs = [{"waits": _waits_for_others(), "where": _where()}]
        if self._store:
            signs = [self._store.get(f"sign/{rank}") or signs[0] for rank in range(len(self.hosts))]
        busy = [rank for rank, sign in enumerate(signs) if not sign["waits"]]
        blamed = ", ".join(f"rank {rank} ({self.hosts[rank]}) in {signs[rank]['where']}" for rank in busy[:4])
        line = f"step {_report.step + 1} stalled: no progress for {self.step_timeout_s:.0f} s ({_report.doing}); "
        line += f"ranks that do not wait for others: {blamed or 'none'}; last completed step: {_report.step}; "
        return Verdict(line + f"stacks of all ranks: {self.folder.root}/stacks-rank-*.txt", stalled=True)

    def _publish(self, verdict: Verdict) -> Verdict:
        """Make a verdict known to all ranks; returns the one that was published first."""
        if not self._store or self._store_is_gone():
            return verdict
        return Verdict(**self._store.set_first("verdict", asdict(verdict)))

    def _leave(self, verdict: Verdict) -> None:
        """End this process, and record why."""
        if verdict.stalled:
            self.folder.root.mkdir(parents=True, exist_ok=True)  # another machine may have its own disk
            with open(self.folder.root / f"stacks-rank-{self.rank:05d}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        if _on_failure:  # before the wait below: once another rank has left, this one's main thread ends by an error
            with contextlib.suppress(Exception):
                _on_failure(verdict.line)
        if verdict.stalled:
            # The others must read the verdict and write their stacks first: the store may die with this rank.
            self._stopped.wait(2 * INTERVAL_S)
        if self.rank == verdict.speaker:
            print(verdict.line, file=sys.stderr, flush=True)
            refused = verdict.exit_code == 2
            tell_launcher(verdict.line)
            self.folder.record_failure(verdict.line, rank_lost=verdict.rank_lost, refused=refused)
        sys.stdout.flush()
        os._exit(verdict.exit_code)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        return state not in "ZX"  # Z: it is dead, but its launcher has not collected it yet
    except OSError:
        return False


def _waits_for_others() -> bool:
    """True if a thread of this process, other than the watchdog's, is in a collective."""
    own = threading.get_ident()
    return any(
        f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename
        for thread, innermost in sys._current_frames().items()
        if thread != own
        for frame in _stack(innermost)
    )


def _where() -> str:
    """File, line and function that the main thread is in: the innermost frame of this package if there is one."""
    stack = list(_stack(sys._current_frames()[threading.main_thread().ident]))
    ours = [frame for frame in stack if PACKAGE in Path(frame.f_code.co_filename).parents]
    frame = (ours or stack)[0]
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"


def _stack(frame):
    """The frame and its callers, innermost first."""
    while frame:
        yield frame
        frame = frame.f_back
