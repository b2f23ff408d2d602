"""`lora-dist submit` and `prepare`: a recipe with its flags, as a job that the checkout can no longer change.

The job's folder, `job/` of the run folder: job.sbatch, config.yaml (all settings, resolved), accelerate.yaml and
accelerate.env (what `accelerate launch` makes of it), code/ (this package and the recipe), submitted.json.
"""

import dataclasses
import datetime
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import lora_dist
from lora_dist.cluster import slurm
from lora_dist.cluster.recipe import (
    find_config_file,
    find_recipe,
    launcher_env,
    launcher_flags,
    load_recipe,
    read_config_file,
)
from lora_dist.cluster.slurm import Job, SlurmOptions
from lora_dist.config import TrainConfig
from lora_dist.environment import COMMIT_FILE, git_commit
from lora_dist.errors import UserError, require
from lora_dist.files import write_whole
from lora_dist.flags import as_flags, parse_recipe_config
from lora_dist.run.folder import RunFolder, write_config

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")


@dataclass(frozen=True)
class Submission:
    """A recipe, its settings with the defaults of where it will run, and how its ranks are started."""

    recipe: Path
    config: TrainConfig
    config_file: Path  # accelerate's
    options: SlurmOptions

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.output_dir))

    def env(self) -> dict[str, str]:
        """What `accelerate launch` would put into the environment of the ranks, but for their places."""
        return launcher_env(self.config_file, self.options.num_ranks)


def read_submission(recipe: str, flags: list[str], config_file: str | None, options: SlurmOptions) -> Submission:
    """Raises UserError for whatever can be said without torch, data or model."""
    path = find_recipe(recipe)
    module = load_recipe(path)
    on_gpu = bool(options.gpus_per_node)
    config = parse_recipe_config(module.CONFIG, flags, gpu=module.GPU, embedded=module.EMBEDDED, on_gpu=on_gpu)
    name = f"{path.stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    root = Path(config.output_dir or f"runs/{name}").absolute()
    require(not set(str(root)) & set(" \t\n%"), "output_dir", root, "must have no spaces or % for Slurm")
    config = dataclasses.replace(config, output_dir=str(root))
    if config_file is None:
        several = options.nodes > 1 and options.num_local_ranks > 1  # ranks that share a copy inside a machine
        row = "single" if options.num_ranks == 1 else "hsdp" if several else "fsdp"
        config_file = row
    return Submission(path, config, find_config_file(config_file), options)


def prepare(submission: Submission, *, quiet: bool = False) -> None:
    """Run the recipe, as rank 0 of the job's ranks, up to where they would meet. Where it fails, it has said why."""
    options = submission.options
    place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": options.num_ranks, "LOCAL_WORLD_SIZE": options.num_local_ranks}
    env = os.environ | submission.env() | {name: str(value) for name, value in place.items()}
    config = dataclasses.replace(submission.config, prepare_only=True)
    command = [sys.executable, str(submission.recipe), *as_flags(dataclasses.asdict(config))]
    done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL if quiet else None)
    if done.returncode:
        sys.exit(done.returncode)


def write_job(submission: Submission, command: str, *, offline: bool) -> Path:
    """Copy code and settings into the run folder and write job.sbatch beside them. Returns it. Raises UserError.

    `offline`: what it needs from the hub is there already.
    """
    folder, partial = submission.folder, submission.folder.partial_name(submission.folder.job)
    try:
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.logs.mkdir(exist_ok=True)
        folder.make_partial(folder.job)
        _copy_code(submission.recipe, partial / "code")
        config = _copy_named_files(submission, partial)
        write_config(partial / "config.yaml", config)
        write_whole(partial / "job.sbatch", slurm.render(job_of(submission, command, offline=offline)))
        folder.put_in_place(partial, folder.job)
    except OSError as error:
        raise UserError(f"--output_dir {folder.root}: cannot be written: {error.strerror}") from None
    return folder.job / "job.sbatch"


def _copy_code(recipe: Path, code: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(lora_dist.__file__).parent, code / "lora_dist", ignore=ignore)
    (code / COMMIT_FILE).write_text(git_commit() or "")
    (code / "recipes").mkdir()
    for file in recipe.parent.glob("*.py"):  # those beside it, as it may import them
        shutil.copy(file, code / "recipes")


def _copy_named_files(submission: Submission, job: Path) -> TrainConfig:
    """Copy the files that settings name; the settings, naming the copies."""
    config, final = submission.config, submission.folder.job
    text = submission.config_file.read_text(encoding="utf-8")
    env = submission.env()
    of_accelerate = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if of_accelerate != "none":
        shutil.copy(of_accelerate, job / "deepspeed.json")
        copy = str(final / "deepspeed.json")
        named = read_config_file(submission.config_file)["deepspeed_config"]["deepspeed_config_file"]
        text, env["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = text.replace(named, copy), copy
    write_whole(job / "accelerate.yaml", text)
    write_whole(job / "accelerate.env", "".join(f"{name}={shlex.quote(value)}\n" for name, value in env.items()))
    for setting in ("deepspeed", "chat_template"):
        file = getattr(config, setting)
        if file:
            shutil.copy(file, job / Path(file).name)
            config = dataclasses.replace(config, **{setting: str(final / Path(file).name)})
    return config


def job_of(submission: Submission, command: str, *, offline: bool) -> Job:
    """The job as `slurm.render` takes it."""
    options, folder = submission.options, submission.folder
    lines = ['export PYTHONPATH="$run/job/code${PYTHONPATH:+:$PYTHONPATH}"']
    if options.launcher == "srun":
        lines.append('set -a; . "$run/job/accelerate.env"; set +a  # what accelerate launch makes of accelerate.yaml')
    else:
        flags = shlex.join(launcher_flags(submission.config_file, options.num_ranks))
        lines.append(f'accelerate_config="$run/job/accelerate.yaml" accelerate_flags=({flags})')
    if offline and not submission.config.push_to_hub:
        lines.append("export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}  # base and data are there: prepared before")
    python = options.python or ("python" if options.container_image else sys.executable)
    return Job(
        name=folder.root.name, options=options, run=shlex.quote(str(folder.root)),
        recipe=f'"$run/job/code/recipes/{submission.recipe.name}" --config "$run/job/config.yaml"',
        logs=f"{folder.logs}/%j-node%n.log", python=shlex.quote(python), about=command, lines=tuple(lines),
    )  # fmt: skip


def submit(submission: Submission, command: str, *, prepare: str) -> dict:
    """Write the job and give it to Slurm; what is then in submitted.json. Raises UserError, and leaves no job.

    `prepare`: here (it was done), job (in one that this one waits for) or no.
    """
    folder = submission.folder
    if earlier := open_job(folder):
        job_id, state = earlier
        raise UserError(f"--output_dir {folder.root}: job {job_id} of this run is {state}; scancel {job_id} first")
    was_there = folder.root.exists()
    script = write_job(submission, command, offline=prepare != "no")
    submitted = {"submitted": round(time.time()), "command": command}
    try:
        after = []
        if prepare == "job":
            first = script.with_name("prepare.sbatch")
            one_task = dataclasses.replace(submission, options=dataclasses.replace(submission.options, launcher="srun"))
            write_whole(first, slurm.render_prepare(job_of(one_task, command, offline=False)))
            submitted["prepare_job_id"] = slurm.submit(first)
            after = [f"--dependency=afterok:{submitted['prepare_job_id']}", "--kill-on-invalid-dep=yes"]
        submitted["job_id"] = slurm.submit(script, *after)
    except UserError:
        shutil.rmtree(folder.job)
        if not was_there:
            shutil.rmtree(folder.root)
        raise
    submitted["log"] = str(folder.logs / f"{submitted['job_id']}-node0.log")
    write_whole(folder.job / "submitted.json", json.dumps(submitted, indent=2) + "\n")
    return submitted


def open_job(folder: RunFolder) -> tuple[str, str] | None:
    """(id, state) of the run's job, where it has one that did not end."""
    file = folder.job / "submitted.json"
    if not file.exists():
        return None
    job_id = json.loads(file.read_text(encoding="utf-8"))["job_id"]
    state = slurm.job_fields(job_id).get("JobState")
    return (job_id, state) if state and state not in ENDED else None
