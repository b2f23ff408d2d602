"""The beginning and the end of a run: join the ranks, say what was decided, save the adapter, say what came out."""

import contextlib
import dataclasses
import datetime
import math
import os
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version

import torch
import torch.distributed as dist
import transformers
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from huggingface_hub import get_token, upload_folder
from torch.distributed import distributed_c10d
from transformers import PreTrainedTokenizerBase

from lora_dist.config import TrainConfig, fill_in
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.packing import check_packing
from lora_dist.data.rows import Data
from lora_dist.data.tasks import TASKS, Task
from lora_dist.environment import PACKAGES, git_commit, versions
from lora_dist.errors import NothingToDo, UserError, require
from lora_dist.model.adapters import add_adapters, check_identical, check_targets, is_trained, parameter_counts
from lora_dist.model.flops import BaseWork, base_work
from lora_dist.model.lazy_weights import open_weights, weight_files
from lora_dist.model.load import base_bytes, load_model_config, meta_model
from lora_dist.model.placement import Expected, agree, choose_placement, describe, expected_memory
from lora_dist.model.quantize_model import quantized_share
from lora_dist.model.quantized_cache import load_cached_base
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.parallel.strategies import Launch, Placement, Strategy, keep_to_one_machine, world_size
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.run.resume import open_run
from lora_dist.run.watchdog import Watchdog
from lora_dist.tracking.metrics import MetricsLog
from lora_dist.tracking.report import write_report
from lora_dist.training.loop import save_adapter_checked
from lora_dist.training.measures import peak_memory_bytes
from lora_dist.training.step import Training

DTYPE_OF = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Another node may have to tokenize what this one has in its cache; once the ranks have met, silence is a fault.
MEETING_TIMEOUT, COLLECTIVE_TIMEOUT = datetime.timedelta(days=1), datetime.timedelta(minutes=30)


def choose_defaults(
    config: TrainConfig, defaults: TrainConfig, *, gpu: dict, embedded: dict
) -> tuple[TrainConfig, str]:
    """The recipe's base and data on a GPU, the embedded ones without; and one line that says which and why.

    `gpu` and `embedded` are settings as `fill_in` takes them. Raises UserError where there is no such base, or nobody
    is logged in to push to the hub.
    """
    on_gpu, why = torch.cuda.is_available(), "as asked"
    if config.push_to_hub and not get_token():
        raise UserError("--push_to_hub True: no hub token here; log in with `hf auth login`, or set HF_TOKEN")
    if config.model_name_or_path is None or config.dataset_name is None:
        why = "a GPU is there" if on_gpu else "no GPU here: what no flag names is the embedded one"
        config = fill_in(config, defaults, gpu if on_gpu else embedded)
    load_model_config(config.model_name_or_path)  # raises where there is none
    return config, f"base: {config.model_name_or_path}, data: {config.dataset_name} ({why})"


def base_dtype(precision: str) -> torch.dtype:
    """Of what is not quantized, by the launcher's mixed precision. Raises UserError where that cannot be had."""
    on_gpu = torch.cuda.is_available()
    if precision not in DTYPE_OF or (precision == "fp16" and not on_gpu):
        works = " or ".join(p for p in DTYPE_OF if on_gpu or p != "fp16")
        raise UserError(
            f"accelerate config mixed_precision: {precision}: "
            f"cannot be had {'here' if on_gpu else 'without a GPU'}; use {works}"
        )
    return DTYPE_OF[precision]


@dataclass(frozen=True)
class BasePlan:
    """How the base will be loaded: decided before anything of it is read."""

    dtype: torch.dtype  # of what is not quantized
    placement: Placement
    task: Task
    classes: list[str] | None
    expected: Expected
    work: BaseWork | None


def plan_base(
    config: TrainConfig, launch: Launch, tokenizer: PreTrainedTokenizerBase, classes: list[str] | None = None
) -> BasePlan:
    """Raises UserError where the base, or what is asked of it, cannot be had. Of the model's config alone."""
    dtype, task = base_dtype(launch.mixed_precision), TASKS[config.task_type]
    why = "cannot be had with this recipe, which makes no classes; see recipes/quotes_tags.py"
    require(classes or not task.has_classes, "task_type", config.task_type, why)
    skeleton = meta_model(config.model_name_or_path, config.quantization, dtype, task, classes)
    check_targets(skeleton, config)
    num_embeddings = skeleton.get_input_embeddings().num_embeddings
    why = f"its tokenizer has {len(tokenizer)} tokens, and the model embeds {num_embeddings}"
    require(len(tokenizer) <= num_embeddings, "model_name_or_path", config.model_name_or_path, why)
    if config.packing:
        check_packing(skeleton, config)
    placement = choose_placement(launch, config, skeleton, num_ranks=world_size(), dtype=dtype)
    expected = expected_memory(skeleton, config, placement, dtype)
    return BasePlan(dtype, placement, task, classes, expected, base_work(skeleton, config))


def prepare_training(
    config: TrainConfig,
    plan: BasePlan,
    data: Data,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    folder: RunFolder,
) -> Training:
    """Load the base, each rank its rows, add the adapters, whole on every rank, and lay out the data. Collective."""
    placement, started = agree(plan.placement), time.perf_counter()
    memory_before = peak_memory_bytes(accelerator.device)
    model = load_cached_base(
        config.model_name_or_path, cache=config.quantized_cache, quantization=config.quantization, dtype=plan.dtype,
        device=accelerator.device, placement=placement, is_trained=partial(is_trained, config), task=plan.task,
        classes=plan.classes,
    )  # fmt: skip
    base, load_s = base_bytes(model), time.perf_counter() - started
    if plan.task.has_classes:
        model.config.pad_token_id = tokenizer.pad_token_id  # tells a row's last token
    model = add_adapters(model, config)
    check_identical(model, accelerator.device)
    micro_batches = MicroBatches(
        data.train, pad_token_id=tokenizer.pad_token_id, seed=config.seed, num_epochs=config.num_train_epochs,
        sequences=config.per_device_train_batch_size,
        per_step=folder.begun["micro_batches_per_step"],
        pack_to=config.max_length if config.packing else None,
        group_by_length=config.train_sampling_strategy == "group_by_length", task=plan.task,
    )  # fmt: skip
    return Training(
        model, tokenizer, config, accelerator, micro_batches, data.held_out, folder, base, placement, load_s,
        plan.work, plan.expected, memory_before,
    )  # fmt: skip


def check_same_rows(data: Data) -> None:
    """Raises UserError where a rank has other rows: machines without a shared disk each read their own. Collective."""
    ranks = gather_object([(socket.gethostname(), data.fingerprint())])
    host, first = ranks[0]
    for rank, (other_host, other) in enumerate(ranks):
        same = f"is other data on rank {rank} ({other_host}) than on rank 0 ({host}); all ranks need the same"
        require(other == first, "dataset_name", data.config.dataset_name, same)


def start_ranks(mixed_precision: str | None = None) -> Accelerator:
    """Join the process group the launcher described, gloo where there is no GPU. Raises UserError where it is odd."""
    on_gpu = torch.cuda.is_available()
    if not on_gpu:  # bits depend on the thread count, so it must not depend on the launcher
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))
    if os.environ.get("RANK", "0") != "0" or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    for engine in (
        "DEEPSPEED",
        "MEGATRON_LM",
    ):  # ours to start, where the launcher's config names one; not accelerate's
        os.environ.pop(f"ACCELERATE_USE_{engine}", None)
    keep_to_one_machine()
    _meet_again(on_gpu)
    # cpu=True: without it accelerate trains N separate copies where there is no GPU.
    patience = InitProcessGroupKwargs(timeout=MEETING_TIMEOUT)
    accelerator = Accelerator(cpu=not on_gpu, mixed_precision=mixed_precision, kwargs_handlers=[patience])
    if dist.is_initialized():
        distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT)
    asked = world_size()
    if accelerator.num_processes != asked:
        raise UserError(
            f"WORLD_SIZE {asked}: accelerate started {accelerator.num_processes} rank(s); "
            "launch with accelerate launch, torchrun or python"
        )
    return accelerator


def _meet_again(on_gpu: bool) -> None:
    """Ranks that torchrun started again: under names of their own.

    Its store outlives the ranks, and torch 2.13 uses the same names in it for every attempt, so that a rank may find
    the address of one that is dead ("Gloo connectFullMesh failed").
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=dist.PrefixStore(f"attempt {attempt}", store), timeout=MEETING_TIMEOUT,
        rank=int(os.environ["RANK"]), world_size=world_size(),
    )  # fmt: skip


def check_same_on_all_ranks(config: TrainConfig, launch: Launch) -> None:
    """Raises UserError where a rank has other packages, another device, launcher config or settings. Collective."""
    packages = PACKAGES + (("deepspeed",) if launch.deepspeed else ())
    mine = {f"the package {name}": version(name) for name in packages}
    mine |= {f"--{name}": value for name, value in dataclasses.asdict(config).items()}
    mine |= {"strategy": launch.strategy.name, "mixed precision": launch.mixed_precision, "device": device_name()}
    mine["DeepSpeed config"] = launch.deepspeed
    ranks = gather_object([(socket.gethostname(), mine)])
    host, first = ranks[0]
    for rank, (other_host, other) in enumerate(ranks):
        differing = [name for name in first if other[name] != first[name]]
        if differing:
            name, *more = differing
            also = f" (also {', '.join(more)})" if more else ""
            raise UserError(
                f"{name}: {first[name]} on rank 0 ({host}), {other[name]} on rank {rank} ({other_host}){also}; "
                "all ranks need the same"
            )


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def open_session(
    config: TrainConfig, recipe: str, launch: Launch, data: Data
) -> Iterator[tuple[Accelerator, RunFolder]]:
    """The ranks and their run folder; at the end, however it comes, they leave, and a failure is recorded.

    With --prepare_only, what comes before them was all: the base is downloaded too, and NothingToDo raised.
    """
    if config.prepare_only:
        files = weight_files(config.model_name_or_path)  # downloads them
        open_weights(files)  # raises where one is damaged
        size = sum(path.stat().st_size for path in files)
        raise NothingToDo(f"{data.table()}\nprepared: {config.model_name_or_path} ({mib(size)}), {config.dataset_name}")
    accelerator, folder, watchdog, done = start_ranks(launch.mixed_precision), None, None, False
    try:
        check_same_on_all_ranks(config, launch)
        check_same_rows(data)
        begun = {
            "num_ranks": world_size(),
            "micro_batches_per_step": config.gradient_accumulation_steps * world_size(),
            "mixed_precision": launch.mixed_precision,
            "rows": data.fingerprint(),
        }
        # Ranks that take different micro-batches; in a pipeline every rank takes part in all of them.
        num_shares = 1 if launch.strategy.engine == "pipeline" else world_size() // config.context_parallel_size
        folder = _open_run_folder(accelerator, config, recipe, begun, num_shares)
        watchdog = Watchdog(folder, rank_timeout_s=config.rank_timeout_s, step_timeout_s=config.step_timeout_s)
        yield accelerator, folder
        done = True
    except BaseException as error:
        if watchdog:
            watchdog.explain(error)
        if folder and accelerator.is_main_process:
            folder.record_failure(f"{type(error).__name__}: {error}")
        raise
    finally:
        if watchdog:
            watchdog.stop(done=done)
        if dist.is_initialized():
            dist.destroy_process_group()


def _open_run_folder(accelerator: Accelerator, *how) -> RunFolder:
    """Rank 0 begins a run, or goes on with one; all ranks learn which, or why that cannot be. Collective."""
    answer = [None]
    if accelerator.is_main_process:
        try:
            answer[0] = open_run(*how)
        except (UserError, NothingToDo) as error:
            answer[0] = error
    broadcast_object_list(answer)
    if isinstance(answer[0], Exception):
        raise answer[0]
    folder, notes = answer[0]
    for note in notes:
        accelerator.on_main_process(print)(note)  # its own print speaks on every machine
    return folder


def banner(run: Training, strategy: Strategy) -> str:
    """What was decided, once, before the first step."""
    config, device, ranks = run.config, run.accelerator.device.type, run.accelerator.num_processes
    trainable, total = parameter_counts(run.model)
    sequences = config.per_device_train_batch_size * run.micro_batches.per_step
    expected = _expected_peak(run)
    return "\n".join([
        f"trainable params: {trainable} || all params: {total} || trainable%: {100 * trainable / total:.4f}",
        f"strategy: {strategy.name} ({strategy.summary})",
        f"placement: {describe(run.placement, len(decoder_layers(run.model)), ranks)}",
        f"ranks: {ranks} on {device}, mixed precision {run.accelerator.mixed_precision}",
        f"base: {config.quantization}, {quantized_share(run.model)[0]:.0%} of the layers' weights; {held(run)}",
        f"batch: {config.per_device_train_batch_size} sequences x {run.micro_batches.per_step} micro-batches, shared by"
        f" {ranks} rank(s) = {sequences} sequences a step, {run.num_steps} steps",
        *([f"memory: at most {expected} expected per rank, for base and training"] if expected else []),
        f"run folder: {run.folder.root}",
    ])  # fmt: skip


def held(run: Training) -> str:
    base = run.base
    return (
        f"{mib(base.per_rank)} of {mib(base.total)} held per rank; "
        f"of its quantized weights {mib(base.quantized_per_rank)} of {mib(base.quantized_total)}"
    )


def mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.2f} MiB"


def metrics_log(run: Training, strategy: Strategy) -> MetricsLog:
    """metrics.jsonl of the run folder, and its mirrors, which are told how the run was made. Collective."""
    hosts, rank = gather_object([socket.gethostname()]), run.accelerator.process_index
    start = {} if rank else _describe_start(run, strategy, hosts)
    return MetricsLog(run.folder, run.config.report_to, rank=rank, start=start, hosts=hosts)


def _describe_start(run: Training, strategy: Strategy, hosts: list[str]) -> dict:
    """A line of starts.jsonl. Runs git, so for rank 0 alone."""
    trainable, total = parameter_counts(run.model)
    return {
        "time": round(time.time(), 3),
        "step": run.folder.step,
        "strategy": strategy.name,
        "num_ranks": run.accelerator.num_processes,
        "hosts": list(dict.fromkeys(hosts)),
        "device": device_name(),
        "mixed_precision": run.accelerator.mixed_precision,
        "trainable_params": trainable,
        "all_params": total,
        "base_bytes_total": run.base.total,
        "base_bytes_per_rank": run.base.per_rank,
        "rows": run.folder.begun.get("rows"),
        "versions": versions(),
        "git_commit": git_commit(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }


def finish(run: Training, strategy: Strategy, measured: dict, metrics: MetricsLog) -> None:
    """Save and check the adapter, write state and report, print what came out, push if asked. Collective.

    A run that was preempted has saved a checkpoint already, and gets no `adapter/`.
    """
    completed = measured["steps"] == run.num_steps
    if completed:
        save_adapter_checked(run)
    trainable, total = parameter_counts(run.model)
    peaks = gather_object([(peak_memory_bytes(run.accelerator.device), run.memory_before_bytes)])
    summary = {
        "world_size": run.accelerator.num_processes,
        "strategy": strategy.name,
        "quantization": run.config.quantization,
        "base_bytes_total": run.base.total,
        "base_bytes_per_rank": run.base.per_rank,
        "expected": dataclasses.asdict(run.expected) if run.expected else {},
        "trainable_params": trainable,
        "all_params": total,
        "effective_batch_sequences": run.config.per_device_train_batch_size * run.micro_batches.per_step,
        "peak_memory_bytes_per_rank": [peak for peak, _ in peaks],
        "memory_before_bytes_per_rank": [before for _, before in peaks],
        "load_s": run.load_s,
        "restarts": run.folder.restarts,
        **measured,
    }
    if run.accelerator.is_main_process:
        run.folder.write_state("completed" if completed else "preempted", measured["steps"], summary)
        write_report(run.folder)
        print(closing_lines(run, summary), flush=True)
        if completed and run.config.wandb_log_adapter:
            metrics.log_adapter()
        if completed and run.config.push_to_hub:
            url = upload_folder(repo_id=run.config.hub_model_id, folder_path=run.folder.adapter)
            print(f"pushed to {url}", flush=True)


def closing_lines(run: Training, summary: dict) -> str:
    lines = []
    if summary["steps"] < run.num_steps:
        saved, _ = run.folder.newest_whole_checkpoint()
        kept = f"saved {saved}" if saved else "nothing to save yet"
        lines.append(f"preempted: {kept}, {summary['steps']} of {run.num_steps} steps")
    if summary["loss_first"] is not None:
        lines.append(
            f"loss: {summary['loss_first']:.4f} at the start, {summary['loss_last']:.4f} at the end"
            f" ({summary['steps']} steps)"
        )
    if summary["eval_loss"] is not None:
        before, after, what = summary["eval_loss_base"], summary["eval_loss"], "loss"
        if not TASKS[run.config.task_type].has_classes:
            before, after, what = math.exp(before), math.exp(after), "perplexity"
        lines.append(f"held-out {what}: {before:.2f} base, {after:.2f} base + adapter")
    lines.append(f"base: {held(run)}")
    lines.append(_memory_line(run, summary))
    if summary["tokens_per_second"]:
        lines.append(f"tokens per second: {summary['tokens_per_second']:.0f} (all ranks, padding not counted)")
    lines += _sample_lines(run, summary["steps"])
    lines.append(f"run folder: {run.folder.root}")
    return "\n".join(lines)


def _expected_peak(run: Training) -> str | None:
    peak = run.expected.peak_bytes_per_rank if run.expected else None
    return mib(peak) if peak else None


def _memory_line(run: Training, summary: dict) -> str:
    fullest = max(summary["peak_memory_bytes_per_rank"])
    expected = f"at most {_expected_peak(run)} expected per rank, " if _expected_peak(run) else ""
    if run.accelerator.device.type == "cuda":
        return f"memory: {expected}at most {mib(fullest)} allocated"
    before = max(summary["memory_before_bytes_per_rank"])
    return (
        f"memory: {expected}not counting the process, which held at most {mib(fullest)}, {mib(before)} before the base"
    )


def _sample_lines(run: Training, last_step: int) -> list[str]:
    """What the base made of `--sample_prompt`, and what the adapter makes of it."""
    prompt, samples = run.config.sample_prompt.rstrip(), run.folder.read_lines(run.folder.samples)
    names = {0: "before", last_step: "after"}
    return [
        f"{names[line[STEP]]}: {line['prompt']}{line['completion']}"
        for line in samples
        if line["prompt"] == prompt and line[STEP] in names
    ]
