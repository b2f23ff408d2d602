"""A Slurm job: its options, its sbatch file as text, and what Slurm reports about it. Imports no torch.

The sbatch file is plain bash that cluster staff can read and edit; nothing of this package runs between Slurm and the
ranks. Its lower half, job_body.sh, is the same in every job and in launch/slurm/*.sbatch.
"""

import dataclasses
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from lora_dist.boundary import boundary
from lora_dist.cluster.shell import Bash, assign, code_of_user, comment, directive, quote, text_of
from lora_dist.config import Bounds, setting
from lora_dist.errors import UserError, in_one_line, require

PATIENCE_S = 120.0  # for an answer of Slurm
RANK_LAUNCHERS = ("srun", "accelerate")
# Options of sbatch that `lora-dist submit` sets itself; --sbatch KEY=VALUE may not set them.
RESERVED_KEYS = ("nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "output", "error", "open-mode", "signal",
                 "requeue")  # fmt: skip
# The lower half of every job file. It is ours, so it is Bash.
BODY = Bash(Path(__file__).with_name("job_body.sh").read_text(encoding="utf-8").rstrip())
TIME_LIMIT = re.compile(
    r"(?:(?P<d>\d+)-(?P<dh>\d+)(?::(?P<dm>\d+))?(?::(?P<ds>\d+))?|(?:(?:(?P<h>\d+):)?(?P<m>\d+):)?(?P<s>\d+))".replace(
        r"\d+", "[0-9]{1,9}"
    )
)


@dataclass(frozen=True)
class SlurmOptions:
    """What a job asks of Slurm. Each option is a flag of `lora-dist submit`, with sbatch's name if it has one.

    Raises UserError if a value is not valid.
    """

    nodes: int = setting(1, "Number of nodes.", Bounds(1, 100_000))
    gpus_per_node: int = setting(0, "GPUs per node; one rank runs on each.", Bounds(0, 1_000))
    ranks_per_node: int | None = setting(None, "Ranks per node. Default: one per GPU.", Bounds(0, 10_000))
    time: str | None = setting(None, "Time limit, e.g. 90, 4:00:00 or 1-12 (a day and 12 hours). Default: the site's.")
    partition: str | None = setting(None, "Partition.")
    account: str | None = setting(None, "Account.")
    qos: str | None = setting(None, "Quality of service.")
    constraint: str | None = setting(None, "Features that the nodes must have, e.g. h100.")
    mem: str | None = setting(None, "Memory per node, e.g. 500G; 0 for all of it.")
    container_image: str | None = setting(None, "Container image that the ranks run in; the cluster needs pyxis.")
    container_mounts: str | None = setting(None, "Additional mounts of the container, as SRC:DST,...")
    network_interface: str | None = setting(None, "Network device between nodes, for NCCL and gloo, e.g. ib0.")
    sbatch: list[str] = setting([], "Another option of sbatch, as KEY=VALUE, e.g. reservation=team; may be repeated.")
    setup: list[str] = setting(
        [], "Shell command to run before the ranks start, e.g. 'module load cuda'; may be repeated."
    )
    python: str | None = setting(None, "Python that the ranks use. Default: this one, or the container's.")
    launcher: str = setting(
        "srun", "What starts the ranks: srun (one task per rank), or accelerate (accelerate launch on each node)."
    )
    grace: int = setting(
        120, "Seconds before the time limit when the run saves and the job is requeued.", Bounds(1, 65_535, "seconds")
    )  # Slurm keeps them in 16 bits
    max_requeues: int = setting(
        5, "End the job after this many requeues in a row that found no newer checkpoint.", Bounds(0, 1_000_000)
    )
    preflight: str = setting("true", "Check ranks, devices and links before each start of the training: true or false.")

    def __post_init__(self):
        self._check_printable()
        self._check_counts()
        self._check_choices()
        self._check_time_and_memory()
        for pair in self.sbatch:
            _check_sbatch_option(pair)
        self._check_words()

    def _check_counts(self) -> None:
        for field in dataclasses.fields(self):
            value, bounds = getattr(self, field.name), field.metadata["bounds"]
            _require(bounds is None or value is None or bounds.hold(value), field.name, value, f"must be {bounds}")
        why = "must be 1 or more; or give --gpus-per-node, then one rank runs on each GPU"
        _require(self.num_local_ranks >= 1, "ranks_per_node", self.num_local_ranks, why)

    def _check_choices(self) -> None:
        _require(self.launcher in RANK_LAUNCHERS, "launcher", self.launcher, f"must be {' or '.join(RANK_LAUNCHERS)}")
        _require(self.preflight in ("true", "false"), "preflight", self.preflight, "must be true or false")

    def _check_time_and_memory(self) -> None:
        if self.mem is not None:
            why = "must be a number and K, M, G or T, e.g. 500G"
            _require(re.fullmatch(r"[0-9]{1,15}[KMGT]?", self.mem), "mem", self.mem, why)
        if self.time is not None:
            why = f"must be at least twice --grace {self.grace} s; give more time, or a shorter --grace"
            _require(seconds(self.time) >= 2 * self.grace, "time", self.time, why)

    def _check_printable(self) -> None:
        """A line break would begin another line of the job file."""
        for name in FLAGS:
            value = getattr(self, name)
            valid = not isinstance(value, str) or value.isprintable()
            _require(valid, name, ascii(value), "must be printable characters in one line")

    def _check_words(self) -> None:
        for name in FLAGS:
            value = getattr(self, name)
            if isinstance(value, str):
                _require(value and " " not in value, name, repr(value), "must be one word")
        _require(not (self.python or "").startswith("-"), "python", self.python, "must be a program, not an option")
        for command in self.setup:
            checked = subprocess.run(["bash", "-n"], input=command.encode(errors="replace"), capture_output=True)
            text = re.sub(r"[\n\t]", " ", command)
            open_end = (len(text) - len(text.rstrip("\\"))) % 2  # a backslash that would take the next line along
            valid = text.strip() and text.isprintable() and not checked.returncode and not checked.stderr
            valid = valid and not open_end
            _require(valid, "setup", ascii(command), "must be a complete command of bash")

    @property
    def num_local_ranks(self) -> int:
        return self.gpus_per_node if self.ranks_per_node is None else self.ranks_per_node

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.num_local_ranks


FLAGS = {field.name: field.name.replace("_", "-") for field in dataclasses.fields(SlurmOptions)}


def _require(condition, name: str, value, rule: str) -> None:
    require(condition, name.replace("_", "-"), value, rule)


def _check_sbatch_option(pair: str) -> None:
    key, _, value = pair.partition("=")
    valid = re.fullmatch(r"[a-z][a-z-]*", key) and value and value.isprintable()
    _require(valid, "sbatch", pair if pair.isprintable() else ascii(pair), "must be KEY=VALUE, e.g. reservation=team")
    why = f"is set by submit; use --{key}" if key in FLAGS.values() else "is set by submit"
    _require(key not in RESERVED_KEYS and key not in FLAGS.values(), "sbatch", pair, why)


def seconds(time: str) -> float:
    """Seconds of a time limit in one of sbatch's forms. Raises UserError."""
    if time.lower() in ("unlimited", "infinite"):
        return float("inf")
    found = TIME_LIMIT.fullmatch(time)
    why = "must be MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS or DAYS-HOURS:MINUTES[:SECONDS]"
    require(found, "time", time, why)
    part = {name: int(digits or 0) for name, digits in found.groupdict().items()}
    if found["d"]:
        return ((part["d"] * 24 + part["dh"]) * 60 + part["dm"]) * 60 + part["ds"]
    return (part["h"] * 60 + part["m"]) * 60 + part["s"] if found["m"] else part["s"] * 60


@dataclass(frozen=True)
class Job:
    """What an sbatch file is rendered from. A str is a value, which is quoted; Bash is put in as it is."""

    name: str
    options: SlurmOptions
    run: str | Bash  # the run folder
    recipe: tuple[str | Bash, ...]  # the recipe with its flags
    logs: str  # as Slurm reads it: %j is the job id, %n the number of the node in the job
    python: str
    about: str  # comment in the first line of the file
    ranks_per_node: Bash | None = None  # if Slurm knows it and not the options
    lines: tuple[Bash, ...] = ()  # run before the ranks start
    prologue: tuple[Bash, ...] = ()  # sets variables which `run` and `recipe` use


def render(job: Job) -> str:
    """The sbatch file of a job. A pure function: the same job gives the same text."""
    options = job.options
    interface = options.network_interface
    exports = assign(NCCL_SOCKET_IFNAME=interface, GLOO_SOCKET_IFNAME=interface) if interface else None
    return text_of([
        Bash("#!/bin/bash"),
        comment(job.about),
        *_directives(job),
        Bash(""),
        _ON_SIGNAL,
        *job.prologue,
        assign(run=job.run) + Bash("  # the run folder"),
        assign(logs=_bash_logs(job)) + Bash("  # %n: number of the node; node 0's log is also the job's"),
        assign(python=job.python),
        assign(recipe=job.recipe),
        assign(ranks_per_node=job.ranks_per_node or options.num_local_ranks),
        assign(max_requeues=options.max_requeues) + Bash("  # in a row, if none finds a newer checkpoint"),
        assign(preflight=options.preflight),
        assign(srun=("srun", "--kill-on-bad-exit=1", "--open-mode=append", *_container(options))),
        *([Bash("export ") + exports] if exports else []),
        *map(code_of_user, options.setup),
        *job.lines,
        Bash(""),
        _START_RANKS[options.launcher],
        BODY,
    ])  # fmt: skip


def render_prepare(job: Job) -> str:
    """The sbatch file of the job that downloads and checks what this job needs: one task, no GPU."""
    options = job.options
    ranks = assign(RANK=0, LOCAL_RANK=0, WORLD_SIZE=options.num_ranks, LOCAL_WORLD_SIZE=options.num_local_ranks)
    return text_of([
        Bash("#!/bin/bash"),
        comment(job.about),
        directive("job-name", f"{job.name}-prepare"),
        directive("ntasks", 1),
        *_given(options, "partition", "account", "qos"),
        directive("output", job.logs.replace("node%n", "prepare")),
        Bash(""),
        assign(run=job.run),
        assign(python=job.python),
        assign(recipe=job.recipe),
        *map(code_of_user, options.setup),
        *job.lines,
        Bash("export ") + ranks,
        Bash('exec "$python" "${recipe[@]}" --prepare_only true'),
    ])  # fmt: skip


def _bash_logs(job: Job) -> Bash:
    """The pattern of the logs for srun, in which bash has put the job id."""
    before, after = job.logs.split("%j")
    return quote(before) + Bash("$SLURM_JOB_ID") + quote(after)


def _container(options: SlurmOptions) -> list[Bash]:
    if not options.container_image:
        return []
    mounts = Bash('"--container-mounts=$run:$run,$PWD:$PWD"')
    if options.container_mounts:
        mounts += quote(f",{options.container_mounts}")
    return [Bash("--container-image=") + quote(options.container_image), mounts, Bash('"--container-workdir=$PWD"')]


def _given(options: SlurmOptions, *names: str) -> list[Bash]:
    """The lines for these options, without those that have no value."""
    return [directive(name, getattr(options, name)) for name in names if getattr(options, name)]


def _directives(job: Job) -> list[Bash]:
    """The options of sbatch in the head of the file."""
    options = job.options
    tasks = options.num_local_ranks if options.launcher == "srun" else 1
    return [
        directive("job-name", job.name),
        directive("nodes", options.nodes),
        directive("ntasks-per-node", tasks),
        *([directive("gpus-per-node", options.gpus_per_node)] if options.gpus_per_node else []),
        *_given(options, "time", "partition", "account", "qos", "constraint", "mem"),
        *(directive(*pair.split("=", 1)) for pair in options.sbatch),
        directive("output", job.logs.replace("%n", "0")),
        directive("open-mode", "append"),  # a requeued job appends to the same file
        directive("requeue"),
        directive("signal", f"B:USR1@{options.grace}"),
    ]


# Slurm sends USR1 only to the batch shell: before the time limit, and before a preemption if the cluster is configured
# so. The shell passes it on to the ranks through srun; they save together and end. Slurm itself sends TERM (scancel,
# requeue, preemption) to the ranks.
_ON_SIGNAL = Bash("""\
stopping=no interrupted=no ranks=
trap 'stopping=yes interrupted=yes; [ -z "$ranks" ] || kill -USR1 "$ranks"' USR1  # pass it on to the ranks""")

# Each task ignores USR1 until the recipe installs its handler: it would end a launcher, or Python while it starts.
_START_RANKS = {
    "srun": Bash("""\
start_ranks() {  # arguments of python; srun starts one task per rank
  exec "${srun[@]}" --output="$logs" bash -c '
    trap "" USR1
    export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
    exec "$@"' - "$python" "$@"
}
"""),
    "accelerate": Bash("""\
start_ranks() {  # arguments of python; srun starts one launcher per node, which starts its ranks
  exec "${srun[@]}" --output="$logs" bash -c '
    trap "" USR1
    exec "$1" -m accelerate.commands.launch --config_file "$2" --num_processes $((SLURM_NNODES * $3)) \\
      --num_machines "$SLURM_NNODES" --machine_rank "$SLURM_NODEID" --main_process_ip "$MASTER_ADDR" \\
      --main_process_port "$MASTER_PORT" "${@:4}"' - "$python" "$accelerate_config" "$ranks_per_node" \\
    "${accelerate_flags[@]}" "$@"
}
"""),
}


def check_sbatch() -> None:
    """Raises UserError if jobs cannot be submitted from here."""
    if not shutil.which("sbatch"):
        why = "not found on this machine; use a machine of the cluster, or see the job's file with --dry-run"
        raise UserError(f"sbatch: {why}")


def submit(script: Path, *options: str) -> str:
    """Submit an sbatch file. `options` are more options of sbatch.

    Returns the job id. Raises UserError with sbatch's own message.
    """
    done = _ask("sbatch", "--parsable", *options, str(script))
    if done.returncode:
        errors = [line.removeprefix("sbatch: error: ") for line in done.stderr.splitlines() if line.strip()]
        raise UserError(f"sbatch: {': '.join(errors) or f'exit code {done.returncode}'}")
    found = re.search(r"^([0-9]+)(;.*)?$", done.stdout, re.MULTILINE)
    if not found:
        raise UserError(f"sbatch: printed {ascii(done.stdout[:100])}, which is no job id; see squeue --me")
    return found[1]


def cancel(job_id: str) -> None:
    _ask("scancel", job_id)


def expected_start(text: str) -> str:
    """Slurm's own line on whether and when it would start a job with this sbatch file."""
    if not shutil.which("sbatch"):
        return "sbatch: not found on this machine, so the expected start is not known"
    done = _ask("sbatch", "--test-only", text=text)
    lines = done.stderr.strip().splitlines() or [f"sbatch: exit code {done.returncode}, without a message"]
    return in_one_line(lines[-1])


def job_fields(job_id: object) -> dict[str, str]:
    """The fields of `scontrol show job`, such as JobState, Reason and NodeList; {} if Slurm does not know the job.

    `job_id` comes from a file, so it may be anything.
    """
    if not re.fullmatch(r"[0-9]+([_+][0-9]+)?", str(job_id)) or not shutil.which("scontrol"):
        return {}
    done = _ask("scontrol", "--oneliner", "show", "job", str(job_id))
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    fields = {}
    for word in lines[0].split() if lines else ():
        name, equals, value = word.partition("=")
        if equals and word.isprintable():
            fields.setdefault(name, value)  # the first one: later ones may stand in a path with spaces
    return fields if "JobState" in fields else {}


def _ask(*command: str, text: str = "") -> subprocess.CompletedProcess:
    """Run a command of Slurm. Raises UserError if it cannot be run, or does not end."""
    with boundary(command[0], "scontrol ping tells whether Slurm's controller answers"):
        return subprocess.run(
            command, input=text, capture_output=True, encoding="utf-8", errors="replace", timeout=PATIENCE_S
        )  # fmt: skip
