"""Writes the scripts beside it from the text that `lora-dist submit` renders: python launch/slurm/write.py

They work by plain sbatch, from the project's root with its environment active; what follows the file is a recipe with
its flags. Edit their upper halves, or give sbatch other options in front.
"""

from pathlib import Path

from lora_dist.cluster.slurm import Job, SlurmOptions, render

RECIPE = '"${@:-recipes/opt_quotes.py}"'
GPUS = {"ranks_per_node": "$SLURM_GPUS_ON_NODE"}  # so that `sbatch --gpus-per-node=4 ...` is enough
OFFLINE = "# export HF_HUB_OFFLINE=1  # where machines have no internet: run the recipe with --prepare_only true before"


def script(name: str, about: str, config: str, options: SlurmOptions, **other) -> Job:
    """A job that takes its recipe from sbatch's command line, and what is installed as it is."""
    launch = f"accelerate_config=accelerate_configs/{config}.yaml accelerate_flags=()"
    return Job(**{
        "name": name, "options": options, "run": "runs/$SLURM_JOB_NAME-$SLURM_JOB_ID",
        "recipe": f'{RECIPE} --output_dir "$run"', "logs": "slurm-%x-%j-node%n.log", "python": "python", "about": about,
        "lines": (launch, OFFLINE), **other,
    })  # fmt: skip


def options(**asked) -> SlurmOptions:
    return SlurmOptions(launcher="accelerate", **{"time": "4:00:00", **asked})


SCRIPTS = {
    "one_node": script(
        "one_node", "One machine: sbatch launch/slurm/one_node.sbatch recipes/opt_quotes.py --max_steps 100",
        "fsdp", options(gpus_per_node=8), **GPUS,
    ),
    "several_nodes": script(
        "several_nodes", "Several machines: sbatch --nodes=4 launch/slurm/several_nodes.sbatch recipes/opt_quotes.py",
        "hsdp", options(nodes=2, gpus_per_node=8), **GPUS,
    ),
    "sweep": script(
        "sweep", "An array over learning rates; then: lora-dist status runs/sweep-JOB/*",
        "fsdp", options(gpus_per_node=8, sbatch=["array=0-3"]), **GPUS,
        prologue=(
            "rates=(5e-5 1e-4 2e-4 4e-4)  # as many as the array has tasks",
            "rate=${rates[$SLURM_ARRAY_TASK_ID]}",
        ),
        run="runs/$SLURM_JOB_NAME-$SLURM_ARRAY_JOB_ID/lr-$rate",
        recipe=f'{RECIPE} --learning_rate "$rate" --output_dir "$run"',
    ),
    "smoke": script(
        "smoke", "Two CPU ranks, the embedded base, four steps: does this cluster run it at all?",
        "fsdp", options(ranks_per_node=2, time="10"),
        recipe=f'{RECIPE} --model_name_or_path embedded --dataset_name embedded --max_steps 4 --warmup_steps 2 '
        '--output_dir "$run"',
    ),
}  # fmt: skip


if __name__ == "__main__":
    for name, job in SCRIPTS.items():
        Path(__file__).with_name(f"{name}.sbatch").write_text(render(job), encoding="utf-8")
