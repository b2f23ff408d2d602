"""`lora-dist submit` and `prepare`: make a recipe with its flags into a job that later edits of the code cannot change.

The folder `job/` in the run folder holds job.sbatch, config.yaml (all settings, resolved), accelerate.yaml,
accelerate.env (the variables that `accelerate launch` would set), code/ (this package and the recipe), manifest.json
(the names of the files before), submitted.json.
"""

import dataclasses
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

import lora_dist
from lora_dist.boundary import boundary, read_json, read_text
from lora_dist.cluster import slurm
from lora_dist.cluster.recipe import (
    find_config_file,
    find_recipe,
    launcher_env,
    launcher_flags,
    load_recipe,
    read_config_file,
)
from lora_dist.cluster.shell import Bash, assign, quote, text_of
from lora_dist.cluster.slurm import Job, SlurmOptions
from lora_dist.config import TrainConfig
from lora_dist.environment import COMMIT_FILE, git_commit
from lora_dist.errors import UserError, require
from lora_dist.files import write_manifest, write_whole
from lora_dist.flags import parse_recipe_config
from lora_dist.run.folder import RunFolder, config_text

# States of a Slurm job that has ended.
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "OUT_OF_MEMORY", "DEADLINE")


@dataclass(frozen=True)
class Submission:
    """A recipe, its settings, which include the defaults for a GPU or for none, and how its ranks are started."""

    recipe: Path
    config: TrainConfig
    config_file: Path  # accelerate's
    options: SlurmOptions

    @property
    def folder(self) -> RunFolder:
        return RunFolder(Path(self.config.output_dir))

    def env(self) -> dict[str, str]:
        """The variables that `accelerate launch` would set for every rank, without the rank numbers."""
        return launcher_env(self.config_file, self.options.num_ranks)


def read_submission(recipe: str, flags: list[str], config_file: str | None, options: SlurmOptions) -> Submission:
    """Check what can be checked without torch, data or model. Raises UserError."""
    path = find_recipe(recipe)
    module = load_recipe(path)
    config = parse_recipe_config(
        module.CONFIG, flags, gpu=module.GPU, embedded=module.EMBEDDED, on_gpu=lambda: options.gpus_per_node > 0
    )
    name = f"{path.stem}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    root = Path(config.output_dir or f"runs/{name}").absolute()
    _check_paths(root, options)
    config = dataclasses.replace(config, output_dir=str(root))
    if config_file is None:
        # hsdp keeps a copy of the base on each node, which makes sense if a node has several ranks.
        several = options.nodes > 1 and options.num_local_ranks > 1
        config_file = "single" if options.num_ranks == 1 else "hsdp" if several else "fsdp"
    return Submission(path, config, find_config_file(config_file), options)


def _check_paths(root: Path, options: SlurmOptions) -> None:
    """Raises UserError for characters that quotes cannot protect, because those who read the path replace them."""
    why = "must be printable characters, without % and \\ (names of Slurm's logs) and : (PYTHONPATH)"
    require(str(root).isprintable() and not set(str(root)) & set("%\\:"), "output_dir", ascii(str(root)), why)
    if options.container_image:
        why = "it or the current folder has a comma or a colon, which separate the mounts of a container"
        require(not set(f"{root}{Path.cwd()}") & set(",:"), "output_dir", root, why)


def prepare(submission: Submission, *, quiet: bool = False) -> None:
    """Run the recipe as rank 0 of the job's ranks, up to where the ranks would meet.

    If it fails, it has printed why, and this process exits with its exit code.
    """
    options = submission.options
    rank = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": options.num_ranks, "LOCAL_WORLD_SIZE": options.num_local_ranks}
    env = os.environ | submission.env() | {name: str(value) for name, value in rank.items()}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(config_text(submission.config))  # as the job reads it: a flag could not hold every value
        file.flush()
        command = [sys.executable, str(submission.recipe), "--config", file.name, "--prepare_only", "true"]
        done = subprocess.run(command, env=env, stdout=subprocess.DEVNULL if quiet else None)
    if done.returncode:
        sys.exit(done.returncode)


def job_files(submission: Submission, command: str, *, offline: bool) -> dict[str, str]:
    """Name to text of the files that a job reads, apart from code. Writes nothing.

    `offline`: everything that the job needs from the hub is downloaded already.

    Raises UserError if a file that a setting names cannot be read, if the run folder holds files of others, or if a
    job of the run has not ended.
    """
    submission.folder.refuse_files_of_others()
    if earlier := open_job(submission.folder):
        job_id, state = earlier
        root = submission.folder.root
        raise UserError(f"--output_dir {root}: job {job_id} of this run is {state}; scancel {job_id} first")
    config, final = submission.config, submission.folder.job
    settings, env, files = read_config_file(submission.config_file), submission.env(), {}
    deepspeed_file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if deepspeed_file != "none":
        files["deepspeed.json"] = read_text(deepspeed_file, f"--config_file {submission.config_file}: {deepspeed_file}")
        copy = env["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(final / "deepspeed.json")
        settings["deepspeed_config"]["deepspeed_config_file"] = copy
    # Copies have names of ours, because theirs may be job.sbatch.
    for setting, name in (("deepspeed", "deepspeed.json"), ("chat_template", "chat_template.jinja")):
        if file := getattr(config, setting):
            files[name] = read_text(file, f"--{setting} {file}")
            config = dataclasses.replace(config, **{setting: str(final / name)})
    return files | {
        "accelerate.yaml": yaml.safe_dump(settings, sort_keys=False, width=1000),
        "accelerate.env": text_of(assign(**{name: value}) for name, value in env.items()),
        "config.yaml": config_text(config),
        "job.sbatch": slurm.render(job_of(submission, command, offline=offline)),
    }


def write_job(submission: Submission, command: str, *, offline: bool) -> Path:
    """Write the job folder: `job_files`, and a copy of the code. Returns the path of job.sbatch. Raises UserError."""
    folder, partial = submission.folder, submission.folder.partial_name(submission.folder.job)
    files = job_files(submission, command, offline=offline)
    with boundary(f"--output_dir {folder.root}", "give a folder that can be written"):
        folder.root.mkdir(parents=True, exist_ok=True)
        folder.logs.mkdir(exist_ok=True)
        folder.make_partial(folder.job)
        _copy_code(submission.recipe, partial / "code")
        for name, text in files.items():
            write_whole(partial / name, text)
        write_manifest(partial)
        folder.put_in_place(partial, folder.job)
    return folder.job / "job.sbatch"


def _copy_code(recipe: Path, code: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(lora_dist.__file__).parent, code / "lora_dist", ignore=ignore)
    (code / COMMIT_FILE).write_text(git_commit() or "")
    (code / "recipes").mkdir()
    for file in recipe.parent.glob("*.py"):  # the recipe may import the files beside it
        if file.is_file():
            shutil.copy(file, code / "recipes")


def job_of(submission: Submission, command: str, *, offline: bool) -> Job:
    """The job that `slurm.render` makes into an sbatch file."""
    options, folder = submission.options, submission.folder
    lines = [Bash('export PYTHONPATH="$run/job/code${PYTHONPATH:+:$PYTHONPATH}"')]
    if options.launcher == "srun":
        lines.append(Bash('set -a; . "$run/job/accelerate.env"; set +a  # what accelerate launch would set'))
    else:
        flags = tuple(launcher_flags(submission.config_file, options.num_ranks))
        lines.append(assign(accelerate_config=Bash('"$run/job/accelerate.yaml"'), accelerate_flags=flags))
    if offline and not submission.config.push_to_hub:
        lines.append(Bash("export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}  # base and data were downloaded before"))
    recipe = Bash('"$run/job/code/recipes/"') + quote(submission.recipe.name)
    return Job(
        name=re.sub(r"[^\w.+-]+", "_", folder.root.name, flags=re.ASCII), options=options, run=str(folder.root),
        recipe=(recipe, "--config", Bash('"$run/job/config.yaml"')), logs=f"{folder.logs}/%j-node%n.log",
        python=options.python or ("python" if options.container_image else sys.executable),
        about=command, lines=tuple(lines),
    )  # fmt: skip


def submit(submission: Submission, command: str, *, prepare: str) -> dict:
    """Write the job and submit it to Slurm. Returns the content of submitted.json.

    `prepare`: "here" (it was done), "job" (in another job that this job waits for) or "no". Raises UserError; then no
    job is left, and the folder has the files of the job before.
    """
    folder = submission.folder
    with tempfile.TemporaryDirectory() as kept:
        earlier = Path(kept) / "job"
        if folder.job.is_dir():
            shutil.copytree(folder.job, earlier, symlinks=True)
        script = write_job(submission, command, offline=prepare != "no")
        try:
            submitted = _submit(script, submission, command, prepare)
        except UserError:
            folder.drop_job()
            if earlier.is_dir():
                shutil.copytree(earlier, folder.job, symlinks=True, dirs_exist_ok=True)
            raise
    submitted["log"] = str(folder.logs / f"{submitted['job_id']}-node0.log")
    write_whole(folder.job / "submitted.json", json.dumps(submitted, indent=2) + "\n")
    return submitted


def _submit(script: Path, submission: Submission, command: str, prepare: str) -> dict:
    """The content of submitted.json, without the log. Raises UserError if Slurm refuses a job; then it has none."""
    submitted = {"submitted": round(time.time()), "command": command}
    dependency = []
    if prepare == "job":
        first = script.with_name("prepare.sbatch")
        one_task = dataclasses.replace(submission, options=dataclasses.replace(submission.options, launcher="srun"))
        write_whole(first, slurm.render_prepare(job_of(one_task, command, offline=False)))
        submitted["prepare_job_id"] = slurm.submit(first)
        dependency = [f"--dependency=afterok:{submitted['prepare_job_id']}", "--kill-on-invalid-dep=yes"]
    try:
        submitted["job_id"] = slurm.submit(script, *dependency)
    except UserError:
        if "prepare_job_id" in submitted:
            slurm.cancel(submitted["prepare_job_id"])
        raise
    return submitted


def open_job(folder: RunFolder) -> tuple[str, str] | None:
    """(id, state) of the run's job; None if it has none, or its job has ended."""
    file = folder.job / "submitted.json"
    if not file.exists():
        return None
    job_id = read_json(file, f"--output_dir {folder.root}: job/submitted.json").get("job_id")
    state = slurm.job_fields(job_id).get("JobState")
    return (job_id, state) if state and state not in ENDED else None
