"""Writes the sbatch files in this folder, with the text that `lora-dist submit` renders: python launch/slurm/write.py

Submit them with plain sbatch from the project's root, with its environment active. The arguments after the file are a
recipe and its flags. Edit the upper half of a file, or give sbatch other options before the file.
"""

from pathlib import Path

from lora_dist.cluster.shell import Bash, assign
from lora_dist.cluster.slurm import Job, SlurmOptions, render

RECIPE = Bash('"${@:-recipes/opt_quotes.py}"')
OUTPUT = ("--output_dir", Bash('"$run"'))
GPUS = {
    "ranks_per_node": Bash("$SLURM_GPUS_ON_NODE")
}  # so `sbatch --gpus-per-node=4 ...` changes the number of ranks too
OFFLINE = Bash("# export HF_HUB_OFFLINE=1  # if nodes have no internet: first run the recipe with --prepare_only true")


def script(name: str, about: str, config: str, options: SlurmOptions, **overrides) -> Job:
    """A job that takes its recipe from sbatch's command line, and uses the installed package.

    `overrides` replace fields of the job.
    """
    launch = assign(accelerate_config=f"accelerate_configs/{config}.yaml", accelerate_flags=())
    return Job(**{
        "name": name, "options": options, "run": Bash("runs/$SLURM_JOB_NAME-$SLURM_JOB_ID"),
        "recipe": (RECIPE, *OUTPUT), "logs": "slurm-%x-%j-node%n.log", "python": "python", "about": about,
        "lines": (launch, OFFLINE), **overrides,
    })  # fmt: skip


def options(**values) -> SlurmOptions:
    return SlurmOptions(launcher="accelerate", **{"time": "4:00:00", **values})


SCRIPTS = {
    "one_node": script(
        "one_node", "One node: sbatch launch/slurm/one_node.sbatch recipes/opt_quotes.py --max_steps 100",
        "fsdp", options(gpus_per_node=8), **GPUS,
    ),
    "several_nodes": script(
        "several_nodes", "Several nodes: sbatch --nodes=4 launch/slurm/several_nodes.sbatch recipes/opt_quotes.py",
        "hsdp", options(nodes=2, gpus_per_node=8), **GPUS,
    ),
    "sweep": script(
        "sweep", "A job array over learning rates. To compare its runs: lora-dist status runs/sweep-JOB/*",
        "fsdp", options(gpus_per_node=8, sbatch=["array=0-3"]), **GPUS,
        prologue=(
            Bash("rates=(5e-5 1e-4 2e-4 4e-4)  # one per task of the array"),
            Bash("rate=${rates[$SLURM_ARRAY_TASK_ID]}"),
        ),
        run=Bash("runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID/lr-$rate"),
        recipe=(RECIPE, "--learning_rate", Bash('"$rate"'), *OUTPUT),
    ),
    "smoke": script(
        "smoke", "Two CPU ranks, the embedded base, four steps: tests whether this cluster can run lora-dist.",
        "fsdp", options(ranks_per_node=2, time="10"),
        recipe=(RECIPE, *"--model_name_or_path embedded --dataset_name embedded --max_steps 4 --warmup_steps 2".split(),
                *OUTPUT),
    ),
}  # fmt: skip


if __name__ == "__main__":
    for name, job in SCRIPTS.items():
        Path(__file__).with_name(f"{name}.sbatch").write_text(render(job), encoding="utf-8")
