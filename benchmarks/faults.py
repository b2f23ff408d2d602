"""Disturbs runs with many random faults, and compares them with a run that was not disturbed.

    python benchmarks/faults.py [--faults 200] [--seed 0]

The runs have 24 steps, train the embedded base, and have their own disk of 6 MB (a tmpfs, so this needs root). Each
start of a run has a random number of ranks and a random placement, and ends by a random fault while it loads, takes a
step, saves or evaluates. Whenever a run is completed, its adapter and all its losses are compared with those of a run
that was not disturbed, and the next run begins.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import header, recipe_ranks, run_recipe, table

from lora_dist.files import is_complete
from lora_dist.run.folder import RunFolder

STEPS, SAVE_STEPS, MICRO_BATCHES = 24, 2, 4
FLAGS = ("--max_steps", str(STEPS), "--save_steps", str(SAVE_STEPS), "--eval_steps", "4", "--warmup_steps", "2")
FLAGS += ("--learning_rate", "3e-3", "--max_length", "64", "--packing", "true", "--per_device_train_batch_size", "1")
FLAGS += ("--eval_fraction", "0.02", "--report_to", "none", "--sample_prompt", "", "--max_failed_saves", "100")
ENV = {"ACCELERATE_MIXED_PRECISION": "bf16"}
PLACEMENTS = (  # ranks, strategy, flags
    (1, "ddp", ()), (2, "ddp", ()), (2, "fsdp", ()), (2, "fsdp", ("--resident_layers", "2")), (2, "pipeline", ()),
    (3, "fsdp", ()), (4, "hsdp", ("--shard_size", "2")),
)  # fmt: skip
PHASES = ("load", "step", "save", "evaluation")
KILLS = ("SIGKILL of one rank", "SIGKILL of all ranks")
FAULTS = {kind: weight for kind, weight in zip(KILLS, (12, 5), strict=True)} | {
    "SIGKILL, then a byte of the newest checkpoint changed": 1,
    "SIGKILL, then a file of it cut short": 1,
    "disk full during saves, then SIGKILL": 1,
    "SIGUSR1, SIGTERM or SIGINT to one rank": 2,
}


def mark_phases(phase):
    """A patch: rank 0 writes the number of its phase (see PHASES) to `phase`."""

    def patch(rank: int) -> None:
        if rank:
            return
        import lora_dist.training.checkpoint as checkpoint
        import lora_dist.training.loop as train
        import lora_dist.training.session as session

        def during(module, name, number):
            original = getattr(module, name)

            def marked(*args, **kwargs):
                before, phase.value = phase.value, number
                try:
                    return original(*args, **kwargs)
                finally:
                    phase.value = before

            setattr(module, name, marked)

        during(session, "load_cached_base", 0)
        during(train, "train_step", 1)
        during(checkpoint, "write_checkpoint", 2)
        during(train, "evaluate", 3)

    return patch


def trajectory(folder: RunFolder) -> list[tuple]:
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return [(m["train/global_step"], m.get("train/loss"), m.get("eval/loss")) for m in lines
            if "train/loss" in m or "eval/loss" in m]  # fmt: skip


def adapter(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


def accumulation(num_ranks: int) -> tuple[str, str]:
    """The flag that starts a run with MICRO_BATCHES per step. On 3 ranks a run can only be continued."""
    return "--gradient_accumulation_steps", str(max(1, MICRO_BATCHES // num_ranks))


class Bench:
    """Starts runs, disturbs them, and counts what happened."""

    def __init__(self, seed: int, disk: Path):
        self.random, self.disk = random.Random(seed), disk
        self.faults, self.hits, self.starts = Counter(), Counter(), 0
        self.completed, self.differing, self.lost_steps, self.leaving_s = 0, 0, [], []
        self.tampered: Path | None = None  # a checkpoint that this benchmark damaged and no start has noticed yet
        self.damaged, self.refused, self.half_written, self.left_behind = 0, 0, 0, 0

    def start(self, folder: RunFolder, whole: RunFolder, *, undisturbed: bool) -> None:
        """One start of the run, on random ranks, until a fault or its end."""
        exists, (expected, _) = folder.state.exists(), folder.newest_whole_checkpoint()
        num_ranks, strategy, flags = self.random.choice([p for p in PLACEMENTS if exists or p[0] != 3])
        kind = self.random.choices(list(FAULTS), FAULTS.values())[0]
        target, phase = self.random.randrange(len(PHASES)), multiprocessing.Value("i", -1)
        flags = (*FLAGS, *accumulation(num_ranks), *flags, "--output_dir", str(folder.root))
        if exists:  # the accumulation of its first start, whatever the ranks are now
            flags += accumulation(folder.read_state()["facts"]["num_ranks"])
        self.starts += 1
        with recipe_ranks(*flags, num_ranks=num_ranks, strategy=strategy, env=ENV, patch=mark_phases(phase)) as ranks:
            hit = not undisturbed and self._wait_for(ranks, phase, target)
            if hit:
                self.faults[kind] += 1
                self.hits[PHASES[target]] += 1
                self._inflict(kind, folder, ranks)
            ended = ranks.wait(120)
        self.left_behind += sum(code is None for code, _, _ in ended)
        said = "".join(out + err for _, out, err in ended)
        assert "Traceback" not in said, said
        if "continuing from" in said:
            assert f"continuing from {expected}\n" in said, said
        if self.tampered and "is renamed to" in said:
            assert f"warning: {self.tampered} is damaged" in said, said
            self.refused, self.tampered = self.refused + 1, None
            shutil.rmtree(next(folder.checkpoints.glob("*.damaged")))  # otherwise the disk would soon be full
        if not hit or kind.startswith("SIGUSR1"):
            assert [code for code, _, _ in ended] == [0] * num_ranks, said
        if folder.state.exists() and folder.read_state()["status"] == "completed":
            self._compare(folder, whole)
        elif hit:
            self._after(kind, folder)

    def _wait_for(self, ranks, phase, target: int) -> bool:
        while all(process.is_alive() for process in ranks.processes):
            if phase.value == target:
                time.sleep(self.random.random() * (0.02 if PHASES[target] == "save" else 0.3))
                return all(process.is_alive() for process in ranks.processes)
            time.sleep(0.0005)
        return False

    def _inflict(self, kind: str, folder: RunFolder, ranks) -> None:
        victims = ranks.processes
        if kind.startswith("SIGUSR1"):
            number = self.random.choice([signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
            os.kill(self.random.choice(victims).pid, number)
            return
        if kind.startswith("disk full"):
            with open(self.disk / "filler", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(b"x" * 4096)
                except OSError:
                    pass
            time.sleep(self.random.random() * 2)
        if kind == "SIGKILL of one rank":
            victims = [self.random.choice(victims)]
        started = time.monotonic()
        for process in victims:
            os.kill(process.pid, signal.SIGKILL)
        ranks.wait(120)
        if len(victims) < len(ranks.processes):
            self.leaving_s.append(time.monotonic() - started)

    def _after(self, kind: str, folder: RunFolder) -> None:
        """Count what a fault left behind, and damage the newest checkpoint if `kind` says so."""
        (self.disk / "filler").unlink(missing_ok=True)
        if not folder.state.exists():
            return
        newest, damaged = folder.newest_whole_checkpoint()
        self.half_written += len(set(damaged) - {self.tampered})
        saved = int(newest.name.removeprefix("step-")) if newest else 0
        steps = [line[0] for line in trajectory_until_cut(folder)]
        if not kind.startswith("disk full"):
            self.lost_steps.append(max(steps, default=0) - saved)
        if kind.startswith("SIGUSR1"):
            assert self.lost_steps[-1] == 0
        if not newest or damaged:
            return
        if "changed" in kind:
            file = newest / self.random.choice(["optimizer.safetensors", "adapter/adapter_model.safetensors"])
            data = bytearray(file.read_bytes())
            data[self.random.randrange(len(data))] ^= 1 << self.random.randrange(8)
            file.write_bytes(data)
        if "cut short" in kind:
            file = newest / self.random.choice(["training_state.json", "optimizer.safetensors", "manifest.json"])
            os.truncate(file, self.random.randrange(file.stat().st_size))
        if not is_complete(newest):
            self.tampered, self.damaged = newest, self.damaged + 1

    def _compare(self, folder: RunFolder, whole: RunFolder) -> None:
        same = adapter(folder) == adapter(whole) and trajectory(folder) == trajectory(whole)
        self.completed, self.differing, self.tampered = self.completed + 1, self.differing + (not same), None
        shutil.rmtree(folder.root)


def trajectory_until_cut(folder: RunFolder) -> list[tuple]:
    """Like `trajectory`, for a file whose last line may be cut off; only the steps."""
    lines = folder.metrics.read_text().splitlines(keepends=True) if folder.metrics.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [(m["train/global_step"],) for m in found if "train/loss" in m]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        disk = Path(root, "disk")
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", disk], check=True)
        try:
            whole = RunFolder(Path(root, "whole"))
            flags = (*FLAGS, *accumulation(2), "--output_dir", str(whole.root))
            run_recipe(*flags, strategy="fsdp", env=ENV)
            bench = Bench(args.seed, disk)
            while bench.faults.total() < args.faults or RunFolder(disk / "run").state.exists():
                bench.start(RunFolder(disk / "run"), whole, undisturbed=bench.faults.total() >= args.faults)
        finally:
            subprocess.run(["umount", "-l", disk], check=True)
    report(bench, args, time.monotonic() - started)


def report(bench: Bench, args, seconds: float) -> None:
    kills = sum(count for kind, count in bench.faults.items() if "SIGKILL" in kind)
    print(
        header(
            "Faults", f"python benchmarks/faults.py --faults {args.faults} --seed {args.seed}", __doc__.split("\n\n")[2]
        )
    )
    print(table(["fault", "number"], sorted(bench.faults.items(), key=lambda item: -item[1])))
    print(table(["phase that it hit", "number"], bench.hits.most_common()))
    rows = [
        ["SIGKILLs of a run", kills],
        ["starts, on varying ranks", bench.starts],
        ["completed runs", bench.completed],
        ["completed runs whose adapter, or loss at any step, differs from the undisturbed run",
         bench.differing],
        ["checkpoints that were damaged; of these, named by a later start and not used",
         f"{bench.damaged}; {bench.refused}"],
        ["half-written checkpoints under the name of a complete one", bench.half_written],
        [f"steps repeated after a fault (saved every {SAVE_STEPS}): median, maximum",
         f"{statistics.median(bench.lost_steps):.0f}, {max(bench.lost_steps)}"],
        ["seconds until the other ranks had ended, after one was killed: median, maximum",
         f"{statistics.median(bench.leaving_s):.1f}, {max(bench.leaving_s):.1f}"],
        ["ranks that had not ended 2 minutes later", bench.left_behind],
        ["minutes in total", f"{seconds / 60:.1f}"],
    ]  # fmt: skip
    print(table(["", ""], rows))


if __name__ == "__main__":
    main()
