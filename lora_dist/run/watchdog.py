"""Notices a rank that died, failed or hangs, and ends the others with one line that names it.

A rank that waits in a collective cannot look around itself: NCCL would hold it until the time-out, and gloo's error
names no rank. So each rank has a thread that gives a sign of life to the rendezvous store once a second and reads the
next rank's: a few requests a second and rank, at any number of ranks. Ranks of the same machine are looked up in /proc
as well, which is quicker, and works where the store died with its rank.
"""

import contextlib
import datetime
import faulthandler
import json
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

from lora_dist.errors import RunFailed, UserError
from lora_dist.parallel.ranks import gather
from lora_dist.run.folder import RunFolder

INTERVAL_S = 1.0
PACKAGE = Path(__file__).parents[1]
# Those with one line are raised on all ranks at once, as a rule: they leave by themselves.
PATIENCE_S = 5.0
_COLLECTIVE = re.compile("gloo|nccl|connection|broken pipe", re.IGNORECASE)


@dataclass
class _Moves:
    """What the main thread does; written by it alone."""

    step: int = 0  # completed
    doing: str = "loading"
    since_s: float | None = None  # None: may take as long as it likes


_moves = _Moves()
at_failure: Callable[[str], None] | None = None  # on one rank: told the line, before that rank leaves


def moved(step: int, doing: str) -> None:
    """The main thread came so far: `step` optimizer steps are completed, and `doing` begins."""
    global _moves
    _moves = _Moves(step, doing, time.monotonic())


def still_moving() -> None:
    """Another part of what the main thread does is done."""
    if _moves.since_s:
        _moves.since_s = time.monotonic()


def at_rest() -> None:
    """What comes now is not watched."""
    global _moves
    _moves = _Moves(_moves.step, "finishing")


@dataclass(frozen=True)
class Verdict:
    """Why all ranks leave. The first one holds."""

    line: str
    speaker: int = 0  # the rank that prints it
    exit_code: int = 1
    stalled: bool = False
    rank_lost: bool = False
    patience_s: float = 0.0


class Watchdog:
    """Of one rank, from when the ranks have met until `stop`. Making one is collective."""

    def __init__(self, folder: RunFolder, *, rank_timeout_s: float, step_timeout_s: float):
        self.folder, self.rank_timeout_s, self.step_timeout_s = folder, rank_timeout_s, step_timeout_s
        self.rank, self.hosts = 0, [socket.gethostname()]
        self._neighbours, self._store, self._last_sign = {}, None, ("", time.monotonic())
        if dist.is_initialized():
            self.rank = dist.get_rank()
            ranks = gather((socket.gethostname(), os.getpid()))
            self.hosts = [host for host, _ in ranks]
            local = {r: pid for r, (host, pid) in enumerate(ranks) if host == self.hosts[self.rank] and r != self.rank}
            self._neighbours = {r: pid for r, pid in local.items() if _is_alive(pid)}  # not another namespace's
            # A clone: the store's own connection is taken while a collective waits in it.
            self._store = dist.distributed_c10d._get_default_store().clone()
        # Asked after its death, the store writes a C++ backtrace to stderr for each request.
        self._store_is_of_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self, *, done: bool) -> None:
        """This rank leaves; where its work is `done`, as it should."""
        self._stopped.set()
        self._thread.join()
        if not self._store or self._store_is_gone():
            return
        with contextlib.suppress(RuntimeError):
            self._store.set(f"left/{self.rank}", "1")
            if done and self.rank == 0 and self._store_is_of_rank_0:  # else the others would miss it
                self._store.wait([f"left/{rank}" for rank in range(len(self.hosts))], datetime.timedelta(seconds=10))

    def explain(self, error: BaseException) -> None:
        """Called with what ended this rank's work: tells the others, or does not return where another is the cause."""
        if not self._store:
            return
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _COLLECTIVE.search(str(error))):
            time.sleep(self.rank_timeout_s + 3 * INTERVAL_S)  # meanwhile the thread finds out who, and leaves
            return
        if isinstance(error, (UserError, RunFailed)):
            code = 2 if isinstance(error, UserError) else 1
            with contextlib.suppress(RuntimeError):  # whoever holds the store has left already
                self._judge(Verdict(f"error: {error}", exit_code=code, patience_s=PATIENCE_S))
            return
        what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        self._stopped.set()  # it leaves by its own error
        verdict = self._judge(Verdict(self._line(self.rank, f"failed: {what}")))
        if self.rank == verdict.speaker:
            print(verdict.line, file=sys.stderr, flush=True)
        time.sleep(2 * INTERVAL_S)  # let the others read it: the store may die with this rank

    def _line(self, rank: int, what: str) -> str:
        line = f"rank {rank} ({self.hosts[rank]}) {what}; last completed step: {_moves.step}"
        return line + f"; start again with --output_dir {self.folder.root} to go on from its newest checkpoint"

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            try:
                verdict = self._look_around()
            except RuntimeError as error:  # the store's
                if self._stopped.wait(2 * INTERVAL_S):
                    return
                where = os.environ.get("MASTER_ADDR", "rank 0's machine")
                why = str(error).splitlines()[0]
                line = f"the rendezvous store on {where} does not answer ({why}); last completed step: {_moves.step}"
                verdict = self._gone_neighbour() or Verdict(line, speaker=self.rank, rank_lost=True)
            if verdict and not self._stopped.wait(verdict.patience_s):
                self._leave(verdict)

    def _look_around(self) -> Verdict | None:
        """Gives a sign of life; the reason to leave, if there is one. Raises RuntimeError where the store is gone."""
        if verdict := self._gone_neighbour():
            return self._judge(verdict)
        if self._store:
            sign = {"time": time.monotonic(), "waits": _waits_for_others(), "where": _where()}
            self._store.set(f"sign/{self.rank}", json.dumps(sign))
            if verdict := self._silent_rank():
                return self._judge(verdict)
            if self._store.check(["verdict"]):
                return Verdict(**json.loads(self._store.get("verdict")))
        since_s = _moves.since_s
        if self.step_timeout_s and since_s and time.monotonic() - since_s > self.step_timeout_s:
            return self._judge(self._stall())
        return None

    def _gone_neighbour(self) -> Verdict | None:
        """A rank of this machine whose process is not there any more."""
        for rank, pid in list(self._neighbours.items()):
            if _is_alive(pid):
                continue
            if self._has_left(rank):
                del self._neighbours[rank]
            elif not self._stopped.wait(INTERVAL_S):  # those beside this one come to the same verdict
                first = min(other for other in {self.rank, *self._neighbours} - {rank})
                return Verdict(self._line(rank, "is gone"), speaker=first if rank == 0 else 0, rank_lost=True)
        return None

    def _silent_rank(self) -> Verdict | None:
        """The next rank, where it gave no sign for too long."""
        rank, now = (self.rank + 1) % dist.get_world_size(), time.monotonic()
        sign = self._store.get(f"sign/{rank}").decode() if self._store.check([f"sign/{rank}"]) else ""
        last, at_s = self._last_sign
        if sign != last:
            self._last_sign = sign, now
        elif now - at_s > self.rank_timeout_s and not self._has_left(rank):
            what = f"gave no sign of life for {now - at_s:.0f} s"
            return Verdict(self._line(rank, what), speaker=self.rank if rank == 0 else 0, rank_lost=True)
        return None

    def _has_left(self, rank: int) -> bool:
        if self._store_is_gone():
            return False
        try:
            return self._store.check([f"left/{rank}"])
        except RuntimeError:
            return False

    def _store_is_gone(self) -> bool:
        return self._store_is_of_rank_0 and 0 in self._neighbours and not _is_alive(self._neighbours[0])

    def _stall(self) -> Verdict:
        signs = [{"waits": _waits_for_others(), "where": _where()}]
        if self._store:
            signs = [json.loads(self._store.get(f"sign/{rank}")) for rank in range(len(self.hosts))]
        odd = [rank for rank, sign in enumerate(signs) if not sign["waits"]]
        blamed = ", ".join(f"rank {rank} ({self.hosts[rank]}) in {signs[rank]['where']}" for rank in odd[:4])
        line = f"step {_moves.step + 1} stalled: nothing moved for {self.step_timeout_s:.0f} s ({_moves.doing}); "
        line += f"not waiting for others: {blamed or 'none'}; last completed step: {_moves.step}; "
        return Verdict(line + f"all ranks' stacks: {self.folder.root}/stacks-rank-*.txt", stalled=True)

    def _judge(self, verdict: Verdict) -> Verdict:
        """Makes a verdict known; returns the one that was first."""
        if not self._store or self._store_is_gone():
            return verdict
        return Verdict(**json.loads(self._store.compare_set("verdict", "", json.dumps(asdict(verdict)))))

    def _leave(self, verdict: Verdict) -> None:
        if verdict.stalled:
            self.folder.root.mkdir(parents=True, exist_ok=True)  # another machine's disk
            with open(self.folder.root / f"stacks-rank-{self.rank:05d}.txt", "w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        if at_failure:  # at once: when another rank has left, this one's main thread leaves by an error
            with contextlib.suppress(Exception):
                at_failure(verdict.line)
        if verdict.stalled:
            # The others are to read of it and write theirs: the store may die with this rank.
            self._stopped.wait(2 * INTERVAL_S)
        if self.rank == verdict.speaker:
            print(verdict.line, file=sys.stderr, flush=True)
            self.folder.record_failure(verdict.line, rank_lost=verdict.rank_lost)
        sys.stdout.flush()
        os._exit(verdict.exit_code)


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
        return state not in "ZX"  # a zombie: its launcher has not looked yet
    except OSError:
        return False


def _waits_for_others() -> bool:
    """Whether some thread of this process is in a collective."""
    own = threading.get_ident()
    return any(
        f"{os.sep}torch{os.sep}distributed{os.sep}" in frame.f_code.co_filename
        for thread, innermost in sys._current_frames().items()
        if thread != own
        for frame in _stack(innermost)
    )


def _where() -> str:
    """Where the main thread is: file, line and function, of this package where one is on its stack."""
    stack = list(_stack(sys._current_frames()[threading.main_thread().ident]))
    ours = [frame for frame in stack if PACKAGE in Path(frame.f_code.co_filename).parents]
    frame = (ours or stack)[0]
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} ({frame.f_code.co_name})"


def _stack(frame):
    while frame:
        yield frame
        frame = frame.f_back
