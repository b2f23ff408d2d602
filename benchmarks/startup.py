"""The cost of a start by the number of ranks: CPU seconds per rank, and bytes sent between ranks.

    unshare --net bash -c 'ip link set lo up; python benchmarks/startup.py'

All ranks share the cores of one machine, so wall time means nothing. Counted are the CPU seconds of each rank, without
imports. In its own network namespace, all bytes of the loopback device belong to the ranks.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

from common import run_recipe

from lora_dist.training import loop

FLAGS = "--max_steps 6 --warmup_steps 2 --report_to none --eval_fraction 0 --dataset_test_split none --save_steps 0"
FLAGS += " --gradient_accumulation_steps 1 --per_device_train_batch_size 1 --sample_prompt"
PHASES = ("meet", "load", "first step", "a step later")


def loopback_bytes() -> int:
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split()[1])


def count_into(folder: Path):
    """A patch: each rank writes CPU seconds and loopback bytes at the end of each phase to `folder`/RANK.json."""

    def patch(rank: int) -> None:
        from lora_dist.training import session

        marks = [(time.process_time(), loopback_bytes())]

        def mark() -> None:
            marks.append((time.process_time(), loopback_bytes()))
            (folder / f"{rank}.json").write_text(json.dumps(marks))

        joined_run, load, step = session.joined_run, session.load_training, loop.train_step

        @contextlib.contextmanager
        def joined(*args):
            marks[:] = [(time.process_time(), loopback_bytes())]
            with joined_run(*args) as what:
                mark()
                yield what

        def loaded(*args):
            what = load(*args)
            mark()
            return what

        def stepped(*args):
            result = step(*args)
            if len(marks) <= len(PHASES):
                mark()
            return result

        session.joined_run, session.load_training, loop.train_step = joined, loaded, stepped

    return patch


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    print("| ranks | " + " | ".join(f"{phase}: CPU s per rank | KB per rank" for phase in PHASES) + " |")
    print("|---" * (1 + 2 * len(PHASES)) + "|")
    for num_ranks in parser.parse_args().ranks:
        with tempfile.TemporaryDirectory() as name:
            flags = [*FLAGS.split(), "", "--output_dir", f"{name}/run"]
            strategy = "fsdp" if num_ranks > 1 else "ddp"
            env = {"ACCELERATE_MIXED_PRECISION": "bf16"}
            patch = count_into(Path(name))
            run_recipe(*flags, num_ranks=num_ranks, strategy=strategy, env=env, patch=patch)
            marks = [json.loads(Path(f"{name}/{rank}.json").read_text()) for rank in range(num_ranks)]
        cells = [str(num_ranks)]
        for phase in range(len(PHASES)):
            cpu_s = statistics.median(of_rank[phase + 1][0] - of_rank[phase][0] for of_rank in marks)
            sent = statistics.median(of_rank[phase + 1][1] - of_rank[phase][1] for of_rank in marks)
            cells += [f"{cpu_s:.3f}", f"{sent / num_ranks / 1e3:.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
