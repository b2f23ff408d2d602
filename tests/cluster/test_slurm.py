"""Jobs of `lora-dist submit` and of plain sbatch on a real Slurm, whose machines are namespaces."""

import functools
import json
import os
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

from lora_dist.cluster.slurm import Job, SlurmOptions, render
from tests.helpers.ranks import BIN, PATIENCE_S, ROOT, fork_ranks
from tests.helpers.slurm_cluster import Cluster, missing, until

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm here: {missing()}"),
]
SMALL = "--model_name_or_path embedded --dataset_name embedded --warmup_steps 2 --eval_fraction 0"
SMALL += " --dataset_test_split none --per_device_train_batch_size 1 --gradient_accumulation_steps 1"
STEPS = 24  # enough to interrupt a run in the middle


@pytest.fixture(scope="module")
def cluster():
    with Cluster(nodes=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """run(steps): the adapter of a run of that length without interruption, on 2 ranks with 2 micro-batches each."""

    @functools.cache
    def run(steps: int) -> bytes:
        folder = tmp_path_factory.mktemp("undisturbed") / "run"
        flags = SMALL.replace("gradient_accumulation_steps 1", "gradient_accumulation_steps 2").split()
        flags += ["--max_steps", str(steps), "--report_to", "none", "--output_dir", str(folder)]
        ranks = fork_ranks(*flags, env={"ACCELERATE_MIXED_PRECISION": "bf16"}, timeout_s=PATIENCE_S)
        assert [code for code, _, _ in ranks] == [0, 0], ranks
        return adapter(folder)

    return run


def adapter(folder: Path) -> bytes:
    return (folder / "adapter/adapter_model.safetensors").read_bytes()


@dataclass
class Submitted:
    cluster: Cluster
    job_id: str
    folder: Path
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text() if self.log_file.exists() else ""

    @property
    def state(self) -> dict:
        return json.loads((self.folder / "state.json").read_text())

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl that have a loss."""
        file = self.folder / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        metrics = [json.loads(line) for line in lines if line.endswith("\n")]
        return [line["train/global_step"] for line in metrics if "train/loss" in line]

    def until_step(self, step: int) -> None:
        until(lambda: step in self.steps(), 120, lambda: self.log[-3000:])

    def end(self, state: str, timeout_s: float = PATIENCE_S) -> dict[str, str]:
        job = self.cluster.wait(self.job_id, timeout_s=timeout_s)
        assert job["JobState"] == state, (job, self.log[-3000:])
        return job


def submit(cluster: Cluster, folder: Path, flags: str = "", *, options: str = "", recipe="recipes/opt_quotes.py"):
    """2 machines with 2 ranks each, unless the options say so."""
    words = "submit --nodes 2 --gpus-per-node 2 --time 20 --preflight false --prepare no".split() + options.split()
    words += ["--json", str(recipe), *SMALL.split(), "--output_dir", str(folder), *flags.split()]
    done = cluster.run(f"{BIN}/lora-dist", *words)
    assert done.returncode == 0, done.stderr
    submitted = json.loads(done.stdout.splitlines()[-1])
    return Submitted(cluster, submitted["job_id"], folder, Path(submitted["log"]))


TELLS = """\
import os
import lora_dist
keys = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE CUDA_VISIBLE_DEVICES".split()
print("rank:", os.uname().nodename, *(os.environ.get(key) for key in keys), lora_dist.__file__, flush=True)
"""


def held_and_total_mib(log: str) -> tuple[float, float]:
    """MiB of the base on each rank and in total; the total depends on the precision."""
    held, total = re.search(r"weights; ([\d.]+) MiB of ([\d.]+) MiB held per rank", log).groups()
    return float(held), float(total)


@pytest.mark.parametrize("per_node, preflight", [(1, "false"), pytest.param(2, "true", marks=pytest.mark.slow)])
def test_a_job_that_must_stop_is_requeued_and_ends_with_the_same_bytes(
    cluster, tmp_path, undisturbed, per_node, preflight
):
    """Two machines, fsdp. The checkout changes meanwhile. Each rank sees all devices of its machine."""
    recipe = tmp_path / "my_recipe.py"
    text = (ROOT / "recipes/opt_quotes.py").read_text()
    start = 'if __name__ == "__main__":\n'
    recipe.write_text(text.replace(start, start + textwrap.indent(TELLS, "    ")))
    options = f"--preflight {preflight} --gpus-per-node {per_node} --config_file accelerate_configs/fsdp.yaml"
    flags = f"--max_steps {STEPS} --save_steps 100 --gradient_accumulation_steps {2 // per_node}"
    job = submit(cluster, tmp_path / "run", flags, options=options, recipe=recipe)
    recipe.write_text('raise SystemExit("this is not what was submitted")')

    job.until_step(3)
    cluster.run("scancel", "--batch", "--signal=USR1", job.job_id)  # as Slurm does before the time limit
    until(lambda: "requeued, to continue from step" in job.log, 30)
    saved, wandb_run = job.state["step"], job.state["wandb_run_id"]
    assert 3 <= saved < STEPS and job.state["status"] == "preempted"
    waiting = cluster.run(f"{BIN}/lora-dist", "status", str(job.folder)).stdout
    assert f"preempted, step {saved} of {STEPS}, 0 restarts" in waiting
    assert f"job: {job.job_id} PENDING" in waiting or f"job: {job.job_id} RUNNING" in waiting

    assert job.end("COMPLETED")["Restarts"] == "1"
    assert "cannot be requeued" not in job.log
    assert adapter(job.folder) == undisturbed(STEPS)
    assert job.steps() == list(range(1, STEPS + 1))
    assert f"continuing from {job.folder}/checkpoints/step-{saved:08d}" in job.log
    assert job.state | {"status": "completed", "restarts": 1, "wandb_run_id": wandb_run} == job.state
    held, total = held_and_total_mib(job.log)
    assert held == pytest.approx(total / 2 / per_node, abs=0.01)
    status = json.loads(cluster.run(f"{BIN}/lora-dist", "status", "--json", str(job.folder)).stdout)
    assert (status["status"], status["step"], status["job"]["JobState"]) == ("completed", STEPS, "COMPLETED")

    code = f"{job.folder}/job/code/lora_dist/__init__.py"
    logs = job.log + job.log_file.with_name(f"{job.job_id}-node1.log").read_text()
    assert logs.count("continuing from /") == 1  # printed by one rank, not by one rank per machine
    said = [line.split()[1:] for line in logs.splitlines() if line.startswith("rank: ")]
    devices = ",".join(map(str, range(per_node)))
    ranks = [
        [f"node{node + 1}", str(per_node * node + i), str(i), str(2 * per_node), str(per_node), devices, code]
        for node in range(2)
        for i in range(per_node)
    ]
    assert sorted(said) == sorted(ranks * 2)  # at both starts

    if preflight == "true":  # its table
        assert job.log.count("node2  2      cpu") == 2 and "no problems found" in job.log


ODD = "a b $(touch MARK)'; touch MARK; \"#&é*~{x}"


def test_safety_slurm_reads_the_values_that_were_written(cluster, tmp_path):
    """Slurm has its own rules for quotes in the head of a file; here Slurm itself reads them."""
    options = SlurmOptions(ranks_per_node=2, sbatch=[f"comment={ODD}\\"])
    logs = f"{tmp_path}/{ODD}/%j-node%n.log"
    job = Job("a", options, run=str(tmp_path), recipe=("x",), logs=logs, python="python", about=ODD)
    file = tmp_path / "job.sbatch"
    file.write_text(render(job), encoding="utf-8")
    job_id = cluster.sbatch("--hold", str(file))
    shown = cluster.run("scontrol", "show", "job", job_id).stdout
    cluster.run("scancel", job_id)
    assert f"   StdOut={tmp_path}/{ODD}/{job_id}-node0.log\n" in shown
    assert f"   Comment={ODD}\\" in shown


@pytest.mark.slow
def test_safety_a_run_whose_names_hold_every_character_trains(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the job runs where it was submitted
    folder, recipe = tmp_path / ODD, tmp_path / f"{ODD}.py"
    recipe.write_text((ROOT / "recipes/opt_quotes.py").read_text())
    job = submit(cluster, folder, "--max_steps 4", options="--ranks-per-node 1", recipe=recipe)
    job.end("COMPLETED")
    assert job.state["status"] == "completed" and job.log_file.parent == folder / "logs"
    assert not list(tmp_path.rglob("MARK"))


@pytest.mark.slow
def test_what_fails_stays_failed_and_what_is_cancelled_saves(cluster, tmp_path):
    bad = submit(cluster, tmp_path / "bad", "--max_steps 4 --lora_target_modules no_such")
    job = submit(cluster, tmp_path / "run", "--max_steps 4000")  # waits for the machines of the first
    bad.end("FAILED")
    assert cluster.job(bad.job_id)["Restarts"] == "0" and cluster.job(bad.job_id)["ExitCode"] == "2:0"
    assert bad.log.count("error: --lora_target_modules no_such: ") == 1 and "Traceback" not in bad.log
    assert not (bad.folder / "state.json").exists()

    words = ["submit", "--ranks-per-node", "2", "--prepare", "no", "recipes/opt_quotes.py"]
    again = cluster.run(f"{BIN}/lora-dist", *words, "--output_dir", str(job.folder))
    assert again.returncode == 2
    assert re.fullmatch(
        rf"error: --output_dir {job.folder}: job {job.job_id} of this run is \w+; scancel \d+ first\n", again.stderr
    )

    job.until_step(2)
    cluster.run("scancel", job.job_id)
    assert job.end("CANCELLED")["Restarts"] == "0"
    assert job.state["status"] == "preempted" and job.state["step"] >= 2, job.log[-3000:]
    assert "wandb failed" in job.log  # scancel's signal ends wandb's process too, and no step is lost for it
    assert (job.folder / f"checkpoints/step-{job.state['step']:08d}/manifest.json").exists()


def test_what_prepare_finds_is_not_submitted(cluster, tmp_path):
    words = f"submit --ranks-per-node 2 recipes/opt_quotes.py {SMALL} --output_dir {tmp_path}/run".split()
    done = cluster.run(f"{BIN}/lora-dist", *words, "--max_steps", "4", "--lora_target_modules", "no_such")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --lora_target_modules no_such: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert cluster.run("squeue", "--noheader").stdout == ""


def test_what_slurm_refuses_is_one_line_and_leaves_nothing(cluster, tmp_path):
    words = ["submit", "--ranks-per-node", "2", "--partition", "no_such", "--prepare", "no", "recipes/opt_quotes.py"]
    done = cluster.run(
        f"{BIN}/lora-dist", *words, *SMALL.split(), "--max_steps", "4", "--output_dir", str(tmp_path / "run")
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr.startswith("error: sbatch: invalid partition specified: no_such: ") and done.stderr.count("\n") == 1
    )
    assert not (tmp_path / "run").exists()


def test_slurm_would_start_64_machines_with_8_gpus_each(tmp_path):
    asked = "submit --gpus-per-node 8 --time 4:00:00 --partition large --dry-run --nodes".split()
    with Cluster(nodes=1, large=64) as cluster:
        done = cluster.run(f"{BIN}/lora-dist", *asked, "64", "recipes/opt_quotes.py")
        assert "to start at" in done.stderr and "using 512 processors on nodes large[1-64]" in done.stderr
        refused = cluster.run(f"{BIN}/lora-dist", *asked, "65", "recipes/opt_quotes.py")
        assert "Requested node configuration is not available" in refused.stderr


@pytest.mark.slow
def test_hybrid_sharding_under_accelerate_launch_goes_on_too(cluster, tmp_path, undisturbed):
    job = submit(cluster, tmp_path / "run", f"--max_steps {STEPS} --save_steps 100", options="--launcher accelerate")
    job.until_step(3)
    cluster.run("scancel", "--batch", "--signal=USR1", job.job_id)
    assert job.end("COMPLETED")["Restarts"] == "1"
    assert "strategy: hsdp" in job.log
    held, total = held_and_total_mib(job.log)
    assert held == pytest.approx(total / 2, abs=0.01)
    assert adapter(job.folder) == undisturbed(STEPS)


@pytest.mark.slow
def test_at_the_time_limit_it_goes_on_until_it_is_done(cluster, tmp_path):
    """Slurm itself sends the signal some seconds after the start, because it counts in minutes; once or more often."""
    flags = "--max_steps 400 --save_steps 1000"
    options = "--time 1 --grace 30 --ranks-per-node 1 --nodes 1 --gpus-per-node 0"
    job = submit(cluster, tmp_path / "run", flags, options=options)
    done = job.end("COMPLETED", timeout_s=PATIENCE_S)
    assert int(done["Restarts"]) >= 1 and job.state["restarts"] == int(done["Restarts"])
    assert job.steps() == list(range(1, 401))


@pytest.mark.slow
def test_a_higher_partition_preempts_and_the_job_goes_on(cluster, tmp_path, undisturbed):
    job = submit(cluster, tmp_path / "run", "--max_steps 200 --save_steps 1000")
    job.until_step(3)
    urgent = cluster.sbatch("--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap", "sleep 3")
    assert cluster.wait(urgent, timeout_s=60)["JobState"] == "COMPLETED"
    assert job.end("COMPLETED")["Restarts"] == "1"
    (step,) = re.findall("continuing from .*step-0*([0-9]+)", job.log)
    assert 3 <= int(step) < 200 and adapter(job.folder) == undisturbed(200)


@pytest.mark.slow
def test_a_lost_rank_is_requeued(cluster, tmp_path, undisturbed):
    job = submit(cluster, tmp_path / "run", f"--max_steps {STEPS} --save_steps 2", options="--max-requeues 1")
    job.until_step(4)
    cluster.run("pkill", "-9", "--newest", "--full", f"python.* --config {job.folder}")
    until(lambda: "a rank was lost: requeued" in job.log, 60)
    assert job.end("COMPLETED")["Restarts"] == "1"
    assert adapter(job.folder) == undisturbed(STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("off", "left"), [("node2", "node[1,3]"), ("node1", "node[2-3]")])
def test_a_machine_without_power_is_replaced(tmp_path, undisturbed, off, left):
    """Also the first machine, which has the batch shell, rank 0 and the rendezvous store."""
    with Cluster(nodes=3) as cluster:
        job = submit(cluster, tmp_path / "run", f"--max_steps {STEPS} --save_steps 2")
        job.until_step(4)
        cluster.switch_off(off)
        done = job.end("COMPLETED", timeout_s=PATIENCE_S)
        assert done["Restarts"] == "1" and done["NodeList"] == left
        assert adapter(job.folder) == undisturbed(STEPS)


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the folders that the ready scripts read, because the scripts write beside them."""
    for name in ("launch", "recipes", "accelerate_configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
def test_a_sweep_of_the_ready_script_and_its_summary(cluster, checkout):
    flags = f"{SMALL} --max_steps 4 --report_to none".split()
    env = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    command = ["sbatch", "--parsable", f"--chdir={checkout}", "--gpus-per-node=2", "--array=0-1"]
    done = cluster.run(*command, str(checkout / "launch/slurm/sweep.sbatch"), "recipes/opt_quotes.py", *flags, env=env)
    job_id = done.stdout.strip()
    until(lambda: cluster.run("squeue", "--noheader").stdout == "", 120)
    runs = sorted((checkout / f"runs/sweep-{job_id}").iterdir())
    assert [run.name for run in runs] == ["lr-1e-4", "lr-5e-5"]
    assert len({adapter(run) for run in runs}) == 2
    table = cluster.run(f"{BIN}/lora-dist", "status", *map(str, runs)).stdout.splitlines()
    assert table[0].split() == ["run", "status", "step", "learning_rate", "loss", "held-out"]
    assert sorted(row.split()[3] for row in table[1:]) == ["0.0001", "5e-05"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smoke", "one_node", "several_nodes"])
def test_a_ready_script(cluster, checkout, name):
    command = ["sbatch", "--parsable", f"--chdir={checkout}", *(["--gpus-per-node=2"] if name != "smoke" else [])]
    env = {"PATH": f"{BIN}:{os.environ['PATH']}"}
    flags = [] if name == "smoke" else ["recipes/opt_quotes.py", *SMALL.split(), "--max_steps", "4"]
    job_id = cluster.run(*command, str(checkout / f"launch/slurm/{name}.sbatch"), *flags, env=env).stdout.strip()
    job = Submitted(cluster, job_id, checkout / f"runs/{name}-{job_id}", checkout / f"slurm-{name}-{job_id}-node0.log")
    job.end("COMPLETED")
    assert f"ranks: {4 if name == 'several_nodes' else 2} on cpu" in job.log
    assert job.steps() == [1, 2, 3, 4] and job.state["status"] == "completed"


@pytest.mark.slow
def test_prepared_by_a_job_of_its_own(cluster, tmp_path):
    good = submit(cluster, tmp_path / "good", "--max_steps 4", options="--prepare job")
    bad = submit(cluster, tmp_path / "bad", "--max_steps 4 --dataset_name no_such.jsonl", options="--prepare job")
    good.end("COMPLETED")
    bad.end("CANCELLED")  # never started, so no GPU was held
    first = json.loads((good.folder / "job/submitted.json").read_text())["prepare_job_id"]
    assert "prepared: embedded (4.24 MiB), embedded" in (good.folder / f"logs/{first}-prepare.log").read_text()
    assert good.state["status"] == "completed" and not (bad.folder / "state.json").exists()
