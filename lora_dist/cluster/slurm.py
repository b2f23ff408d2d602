"""A Slurm job: its options, its sbatch file as text, and what Slurm says of it. Imports no torch.

The file is plain bash that cluster staff can read and edit; nothing of this package runs between Slurm and the ranks.
Its lower half, job_body.sh, is the same in every job and in launch/slurm/*.sbatch.
"""

import dataclasses
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lora_dist.config import setting
from lora_dist.errors import UserError, require

RANK_LAUNCHERS = ("srun", "accelerate")
# What submit sets by itself, as --sbatch KEY=VALUE must not.
OWN_KEYS = ("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "output", "error", "open-mode", "signal", "requeue")
TIME = re.compile(
    r"(?:(?P<d>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+))?(?::(?P<ds>\d+))?|(?:(?:(?P<h>\d+):)?(?P<m>\d+):)?(?P<s>\d+))"
)


@dataclass(frozen=True)
class SlurmOptions:
    """What is asked of Slurm. Names are sbatch's where it has one; each is a flag of `lora-dist submit`."""

    nodes: int = setting(1, "Machines.")
    gpus_per_node: int = setting(0, "GPUs of each machine; a rank runs on each.")
    ranks_per_node: int | None = setting(None, "Ranks of each machine. Default: one for each GPU.")
    time: str | None = setting(None, "Time limit, e.g. 90, 4:00:00 or 1-12 (a day and 12 hours). Default: the site's.")
    partition: str | None = setting(None, "Partition.")
    account: str | None = setting(None, "Account.")
    qos: str | None = setting(None, "Quality of service.")
    constraint: str | None = setting(None, "Features of the machines, e.g. h100.")
    mem: str | None = setting(None, "Memory of each machine, e.g. 500G; 0 for all of it.")
    container_image: str | None = setting(None, "Image that the ranks run in (needs the site's pyxis).")
    container_mounts: str | None = setting(None, "Further mounts of the container, as SRC:DST,...")
    network_interface: str | None = setting(None, "Network device between machines, for NCCL and gloo, e.g. ib0.")
    sbatch: list[str] = setting([], "Any other option of sbatch, as KEY=VALUE, e.g. reservation=team; may be repeated.")
    setup: list[str] = setting([], "Shell command before the ranks start, e.g. 'module load cuda'; may be repeated.")
    python: str | None = setting(None, "Python of the ranks. Default: this one, or the container's.")
    launcher: str = setting("srun", "Who starts the ranks: srun, one task each, or accelerate launch on each machine.")
    grace: int = setting(120, "Seconds before the time limit at which the run saves and the job is requeued.")
    max_requeues: int = setting(5, "End the job after so many requeues in a row that found no newer checkpoint.")
    preflight: str = setting("true", "Look at ranks, devices and links before training, at each start: true or false.")

    def __post_init__(self):
        for name in ("nodes", "grace"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "must be 1 or more")
        for name in ("gpus_per_node", "max_requeues"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "must be 0 or more")
        why = "must be 1 or more; or give --gpus-per-node, and a rank runs on each GPU"
        _require(self.num_local_ranks >= 1, "ranks_per_node", self.num_local_ranks, why)
        _require(self.launcher in RANK_LAUNCHERS, "launcher", self.launcher, f"must be {' or '.join(RANK_LAUNCHERS)}")
        _require(self.preflight in ("true", "false"), "preflight", self.preflight, "must be true or false")
        if self.mem is not None:
            _require(re.fullmatch(r"\d+[KMGT]?", self.mem), "mem", self.mem, "must be a number and K, M, G or T: 500G")
        if self.time is not None:
            enough = seconds(self.time) >= 2 * self.grace
            why = f"leaves no time beside --grace {self.grace} s; give twice as much, or a shorter --grace"
            _require(enough, "time", self.time, why)
        for pair in self.sbatch:
            key, _, value = pair.partition("=")
            _require(
                re.fullmatch(r"[a-z][a-z-]*", key) and value, "sbatch", pair, "must be KEY=VALUE: reservation=team"
            )
            other = f"is set by submit; it has --{key}" if key in FLAGS.values() else "is set by submit"
            _require(key not in OWN_KEYS and key not in FLAGS.values(), "sbatch", pair, other)
        for name in FLAGS:
            value = getattr(self, name)
            if isinstance(value, str) and name != "container_mounts":
                _require(value and not re.search(r"\s", value), name, repr(value), "must be one word")

    @property
    def num_local_ranks(self) -> int:
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.num_local_ranks


FLAGS = {field.name: field.name.replace("_", "-") for field in dataclasses.fields(SlurmOptions)}


def _require(condition, name: str, value, rule: str) -> None:
    require(condition, name.replace("_", "-"), value, rule)


def seconds(time: str) -> float:
    """A time limit in sbatch's forms. Raises UserError."""
    if time.lower() in ("unlimited", "infinite"):
        return float("inf")
    found = TIME.fullmatch(time)
    forms = "must be MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS or DAYS-HOURS:MINUTES[:SECONDS]"
    require(found, "time", time, forms)
    part = {name: int(digits or 0) for name, digits in found.groupdict().items()}
    if found["d"]:
        return ((part["d"] * 24 + part["dh"]) * 60 + part["dm"]) * 60 + part["ds"]
    return (part["h"] * 60 + part["m"]) * 60 + part["s"] if found["m"] else part["s"] * 60


@dataclass(frozen=True)
class Job:
    """What is put into the file. Paths and words are shell text, quoted where they must be."""

    name: str
    options: SlurmOptions
    run: str  # the run folder
    recipe: str  # with its flags
    logs: str  # %j is the job, %n the machine's number in it
    python: str
    about: str  # first line of the file
    ranks_per_node: str = ""  # where Slurm knows it better than the options
    lines: tuple[str, ...] = ()  # further bash, before the ranks start
    prologue: tuple[str, ...] = ()  # bash that `run` and `recipe` make use of


def render(job: Job) -> str:
    """The sbatch file. A pure function: the same job is the same text."""
    options = job.options
    container = [f"--container-image={options.container_image}"] if options.container_image else []
    if container:
        mounts = ",".join(filter(None, ["$run:$run", "$PWD:$PWD", options.container_mounts]))
        container += [f'"--container-mounts={mounts}"', '"--container-workdir=$PWD"']
    interface = options.network_interface
    hints = [f"export NCCL_SOCKET_IFNAME={interface} GLOO_SOCKET_IFNAME={interface}"] if interface else []
    body = Path(__file__).with_name("job_body.sh").read_text(encoding="utf-8")
    return "\n".join([
        "#!/bin/bash",
        _comment(job.about),
        *(f"#SBATCH --{line}" for line in _directives(job)),
        "",
        _ON_SIGNAL,
        *job.prologue,
        f"run={job.run}  # everything of this run",
        f"logs={job.logs.replace('%j', '$SLURM_JOB_ID')}  # %n: the machine's number; the first one's is the job's own",
        f"python={job.python}",
        f"recipe=({job.recipe})",
        f"ranks_per_node={job.ranks_per_node or options.num_local_ranks}",
        f"max_requeues={options.max_requeues}  # in a row, without a newer checkpoint",
        f"preflight={options.preflight}",
        f"srun=({' '.join(['srun', '--kill-on-bad-exit=1', '--open-mode=append', *container])})",
        *hints,
        *options.setup,
        *job.lines,
        "",
        _START_RANKS[options.launcher],
        body.rstrip(),
        "",
    ])  # fmt: skip


def _comment(text: str) -> str:
    return f"# {' '.join(text.splitlines())}"  # the second line of a prompt would be bash


def render_prepare(job: Job) -> str:
    """The sbatch file of the job that prepares for this one: one task, no GPU."""
    options = job.options
    return "\n".join([
        "#!/bin/bash",
        _comment(job.about),
        f"#SBATCH --job-name={job.name}-prepare",
        "#SBATCH --ntasks=1",
        *(f"#SBATCH --{line}" for line in _asked(options, "partition", "account", "qos")),
        f"#SBATCH --output={job.logs.replace('node%n', 'prepare')}",
        "",
        f"run={job.run}",
        f"python={job.python}",
        f"recipe=({job.recipe})",
        *options.setup,
        *job.lines,
        f"export RANK=0 LOCAL_RANK=0 WORLD_SIZE={options.num_ranks} LOCAL_WORLD_SIZE={options.num_local_ranks}",
        'exec "$python" "${recipe[@]}" --prepare_only true',
        "",
    ])  # fmt: skip


def _asked(options: SlurmOptions, *names: str) -> list[str]:
    return [f"{name}={getattr(options, name)}" for name in names if getattr(options, name)]


def _directives(job: Job) -> list[str]:
    options = job.options
    tasks = options.num_local_ranks if options.launcher == "srun" else 1
    return [
        f"job-name={job.name}",
        f"nodes={options.nodes}",
        f"ntasks-per-node={tasks}",
        *([f"gpus-per-node={options.gpus_per_node}"] if options.gpus_per_node else []),
        *_asked(options, "time", "partition", "account", "qos", "constraint", "mem"),
        *options.sbatch,
        f"output={job.logs.replace('%n', '0')}",
        "open-mode=append",  # a job that was requeued goes on in the same file
        "requeue",
        f"signal=B:USR1@{options.grace}",
    ]


# Slurm sends USR1 to the batch shell alone, before the time limit, and before a preemption where the site has it so; by
# srun it reaches the ranks, which save together and leave. TERM (scancel, requeue, preemption) Slurm sends them itself.
_ON_SIGNAL = """\
stopping=no interrupted=no ranks=
trap 'stopping=yes interrupted=yes; [ -z "$ranks" ] || kill -USR1 "$ranks"' USR1  # asked to stop: tell the ranks"""

# One task of srun. USR1 is ignored until the recipe minds it: a launcher, or Python on its way up, would die of it.
_START_RANKS = {
    "srun": """\
start_ranks() {  # python's words: one task for each rank
  exec "${srun[@]}" --output="$logs" bash -c '
    trap "" USR1
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec "$@"' - "$python" "$@"
}
""",
    "accelerate": """\
start_ranks() {  # python's words: one launcher for each machine, which starts its ranks
  exec "${srun[@]}" --output="$logs" bash -c '
    trap "" USR1
    exec "$1" -m accelerate.commands.launch --config_file "$2" --num_processes $((SLURM_NNODES * $3)) \\
      --num_machines $SLURM_NNODES --machine_rank $SLURM_NODEID --main_process_ip $MASTER_ADDR \\
      --main_process_port $MASTER_PORT "${@:4}"' - "$python" "$accelerate_config" "$ranks_per_node" \\
    "${accelerate_flags[@]}" "$@"
}
""",
}


def submit(script: Path, *more: str) -> str:
    """Give the file to Slurm; the job's id. Raises UserError with what sbatch says."""
    if not shutil.which("sbatch"):
        raise UserError(f"sbatch: not found here; give {script} to sbatch on a machine of the cluster")
    done = subprocess.run(["sbatch", "--parsable", *more, str(script)], capture_output=True, text=True)
    if done.returncode:
        said = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"sbatch: {': '.join(said) or f'exit code {done.returncode}'}")
    return done.stdout.strip().split(";")[0]


def expected_start(text: str) -> str:
    """Whether and when Slurm would start the job, in its words."""
    if not shutil.which("sbatch"):
        return "sbatch: not found here, so not asked"
    done = subprocess.run(["sbatch", "--test-only"], input=text, capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1]


def job_fields(job_id: str) -> dict[str, str]:
    """What `scontrol show job` says: JobState, Reason, NodeList, Restarts, ... Empty where Slurm knows no such job."""
    if not shutil.which("scontrol"):
        return {}
    done = subprocess.run(["scontrol", "--oneliner", "show", "job", job_id], capture_output=True, text=True)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return dict(word.split("=", 1) for word in lines[0].split() if "=" in word) if lines else {}
