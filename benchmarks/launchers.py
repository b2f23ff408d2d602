"""Two ways to start the ranks of a Slurm job: one srun task per rank, or accelerate launch on each node (2 x 2 ranks).

    python benchmarks/launchers.py [--rounds 3]

Needs a Slurm whose nodes run on this machine, because the ranks are killed from here. The tests have such a Slurm, made
of namespaces. With root, slurm-wlm and munge, the benchmark runs in it:

    python -m tests.helpers.slurm_cluster python benchmarks/launchers.py
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, wait_until

from lora_dist.cluster.slurm import job_fields
from lora_dist.cluster.submission import ENDED

FLAGS = "--max_steps 400 --warmup_steps 2 --report_to none --eval_fraction 0 --dataset_test_split none"
FLAGS += " --per_device_train_batch_size 1 --gradient_accumulation_steps 1"


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def submit(launcher: str, root: Path, *flags: str) -> tuple[str, Path]:
    command = [f"{sys.prefix}/bin/lora-dist", "submit", "--nodes", "2", "--ranks-per-node", "2", "--time", "20"]
    command += ["--preflight", "false", "--prepare", "no", "--launcher", launcher, "--max-requeues", "0", "--json"]
    done = run(*command, "recipes/opt_quotes.py", "--output_dir", str(root), *FLAGS.split(), *flags)
    assert done.returncode == 0, done.stderr
    submitted = json.loads(done.stdout)
    return submitted["job_id"], Path(submitted["log"])


def steps(root: Path) -> list[dict]:
    file = root / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def measure(launcher: str, folder: Path) -> dict:
    measured, root = {}, folder / "saved"
    job, log = submit(launcher, root)
    wait_until(lambda: job_fields(job).get("JobState") == "RUNNING", 120)
    started = time.time()
    wait_until(lambda: steps(root), 120)
    measured["from start to the first step, s"] = steps(root)[0]["time"] - started
    asked = time.time()
    assert run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    wait_until(lambda: "the ranks exited" in log.read_text(), 60)
    measured["from USR1 to the end of all ranks, s"] = time.time() - asked
    assert "exited with 0; the run is preempted" in log.read_text(), log.read_text()
    run("scancel", job)
    wait_until(lambda: job_fields(job).get("JobState") in ENDED, 120)

    root = folder / "killed"
    job, log = submit(launcher, root)
    wait_until(lambda: steps(root), 120)
    size, killed = log.stat().st_size, time.time()
    run("pkill", "-9", "-n", "-f", "python3* .*opt_quotes.py --config.*killed")
    wait_until(lambda: "the ranks exited" in log.read_text(), 120)
    measured["from SIGKILL of a rank to the end of all ranks, s"] = time.time() - killed
    measured["lines logged after the SIGKILL"] = len(log.read_bytes()[size:].splitlines())
    run("scancel", job)
    wait_until(lambda: job_fields(job).get("JobState") in ENDED, 120)

    job, log = submit(launcher, folder / "bad", "--lora_target_modules", "no_such")
    wait_until(lambda: log.exists() and "the ranks exited" in log.read_text(), 120)
    measured["exit code of bad input"] = int(log.read_text().split("exited with ")[1].split(";")[0])
    wait_until(lambda: job_fields(job).get("JobState") in ENDED, 120)
    return measured


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.chdir(ROOT)
    found = {"srun": [], "accelerate": []}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            for launcher in found:
                found[launcher].append(measure(launcher, Path(folder) / f"{launcher}-{number}"))
                print(launcher, found[launcher][-1], flush=True)
    print("\n| median of", rounds, "| " + " | ".join(found) + " |\n|---|---|---|")
    for name in found["srun"][0]:
        medians = (statistics.median(measured[name] for measured in of_launcher) for of_launcher in found.values())
        print(f"| {name} | {' | '.join(f'{median:.4g}' for median in medians)} |")


if __name__ == "__main__":
    main()
