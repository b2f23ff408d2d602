"""One srun task for each rank, or accelerate launch on each machine: a Slurm job of 2 machines x 2 ranks, both ways.

    python benchmarks/launchers.py [--rounds 3]

Needs root and Slurm (apt-get install slurm-wlm munge), not a cluster: it starts one in namespaces (tests/slurm).
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests/slurm"))
from cluster import Cluster, until  # noqa: E402

FLAGS = "--max_steps 400 --warmup_steps 2 --report_to none --eval_fraction 0 --dataset_test_split none"
FLAGS += " --per_device_train_batch_size 1 --gradient_accumulation_steps 1"


def submit(cluster: Cluster, launcher: str, root: Path, *flags: str) -> tuple[str, Path]:
    command = [f"{sys.prefix}/bin/lora-dist", "submit", "--nodes", "2", "--ranks-per-node", "2", "--time", "20"]
    command += ["--preflight", "false", "--prepare", "no", "--launcher", launcher, "--max-requeues", "0", "--json"]
    done = cluster.run(*command, "recipes/opt_quotes.py", "--output_dir", str(root), *FLAGS.split(), *flags)
    assert done.returncode == 0, done.stderr
    submitted = json.loads(done.stdout)
    return submitted["job_id"], Path(submitted["log"])


def steps(root: Path) -> list[dict]:
    file = root / "metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def of_one(cluster: Cluster, launcher: str, folder: Path) -> dict:
    measured, root = {}, folder / "saved"
    job, log = submit(cluster, launcher, root)
    cluster.wait(job, "RUNNING")
    started = time.time()
    until(lambda: steps(root), 120)
    measured["to the first step, s"] = steps(root)[0]["time"] - started
    asked = time.time()
    assert cluster.run("scancel", "--batch", "--signal=USR1", job).returncode == 0
    until(lambda: "the ranks left" in log.read_text(), 60)
    measured["from USR1 to all gone, s"] = time.time() - asked
    assert "left with 0; the run is preempted" in log.read_text(), log.read_text()
    cluster.run("scancel", job)
    cluster.wait(job)

    root = folder / "killed"
    job, log = submit(cluster, launcher, root)
    until(lambda: steps(root), 120)
    size, killed = log.stat().st_size, time.time()
    cluster.run("pkill", "-9", "-n", "-f", "python3* .*opt_quotes.py --config.*killed")
    until(lambda: "the ranks left" in log.read_text(), 120)
    measured["from a rank's SIGKILL to all gone, s"] = time.time() - killed
    measured["lines that it logs"] = len(log.read_bytes()[size:].splitlines())
    cluster.run("scancel", job)
    cluster.wait(job)

    job, log = submit(cluster, launcher, folder / "bad", "--lora_target_modules", "no_such")
    until(lambda: log.exists() and "the ranks left" in log.read_text(), 120)
    measured["exit code of bad input"] = int(log.read_text().split("left with ")[1].split(";")[0])
    cluster.wait(job)
    return measured


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.chdir(ROOT)
    found = {"srun": [], "accelerate": []}
    with tempfile.TemporaryDirectory() as folder, Cluster() as cluster:
        for number in range(rounds):
            for launcher in found:
                found[launcher].append(of_one(cluster, launcher, Path(folder) / f"{launcher}-{number}"))
                print(launcher, found[launcher][-1], flush=True)
    print("\n| median of", rounds, "| " + " | ".join(found) + " |\n|---|---|---|")
    for name in found["srun"][0]:
        medians = (statistics.median(measured[name] for measured in of_launcher) for of_launcher in found.values())
        print(f"| {name} | {' | '.join(f'{median:.4g}' for median in medians)} |")


if __name__ == "__main__":
    main()
