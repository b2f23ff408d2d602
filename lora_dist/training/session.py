"""Opens a run: data, plan, ranks, run folder, base and adapters; and closes it, however it ends."""

import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_dist import signals
from lora_dist.config import TrainConfig
from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.rows import PreparedData, prepare_rows
from lora_dist.environment import PACKAGES, device_name, git_commit, has_gpu, versions
from lora_dist.errors import NothingToDo, UserError
from lora_dist.model.adapters import (
    add_adapters,
    check_identical,
    is_trained_parameter,
    load_first_adapter,
    parameter_counts,
)
from lora_dist.model.files.lazy_weights import open_checkpoint, weight_files
from lora_dist.model.load import BaseOptions
from lora_dist.model.memory import base_bytes
from lora_dist.model.placement import agree_on_placement
from lora_dist.model.quantized_cache import load_cached_base
from lora_dist.parallel.ranks import check_same_on_all_ranks, from_rank_0, gather, leave_ranks, start_ranks
from lora_dist.parallel.strategies import Launch, Strategy, read_launch, world_size
from lora_dist.run.folder import RunFolder
from lora_dist.run.resume import begin_or_resume
from lora_dist.run.watchdog import start_watchdog
from lora_dist.tracking.metrics import MetricsLog
from lora_dist.training.measures import peak_memory_bytes
from lora_dist.training.plan import BasePlan, check_length, check_names, choose_precision, plan_base
from lora_dist.training.run import LoadedBase, Run
from lora_dist.training.step import Training, build_training
from lora_dist.training.terminal import banner, mib


@contextlib.contextmanager
def open_run(
    config: TrainConfig,
    recipe: str,
    *,
    transform: Callable[[dict], dict] | None = None,
    score: Callable[[Run], dict[str, float]] | None = None,
) -> Iterator[Run]:
    """A run, ready for `train` and `finish`; when the block ends, the ranks leave. Collective.

    `recipe` names the run folder if `--output_dir` does not. `transform` maps an example of the data set to the columns
    that `--dataset_format` expects. `score(run)` is called on all ranks at the start and at the end, and returns scores
    of the held-out rows by name.

    Raises UserError for bad input before anything is loaded, and NothingToDo if the run is complete or
    `--prepare_only` asked for no more.
    """
    launch = read_launch(config)
    config, why = choose_precision(config, launch)
    check_names(config)
    # Data and plan come before the ranks meet, so that no collective waits for a tokenizer.
    tokenizer = load_tokenizer(config.model_name_or_path, config.chat_template)
    data = prepare_rows(config, tokenizer, transform)
    check_length(config, data)
    plan = plan_base(config, launch, tokenizer, data)
    if config.prepare_only:
        raise NothingToDo(f"{data.table()}\n{prepare_weights(config)}")
    with joined_run(config, recipe, launch, data) as (accelerator, folder):
        say = partial(accelerator.on_main_process(print), flush=True)
        say(f"base: {config.model_name_or_path}, data: {config.dataset_name}{'' if has_gpu() else ' (no GPU here)'}")
        say(data.table() + (f"\nclasses: {', '.join(data.classes)}" if data.classes else ""))
        say(f"ranks: {accelerator.num_processes} on {accelerator.device.type}, ", end="")
        say(f"mixed precision {config.mixed_precision} ({why})")
        base, training = load_training(config, plan, data, tokenizer, accelerator, folder)
        metrics = start_metrics(config, launch.strategy, folder, base, training)
        held_out = data.held_out
        with metrics:
            run = Run(config, launch.strategy, accelerator, folder, tokenizer, held_out, base, training, metrics, score)
            say(banner(run))
            yield run


def prepare_weights(config: TrainConfig) -> str:
    """Download the base, or raise UserError if a file of it is damaged. Returns the line that says so."""
    open_checkpoint(config.model_name_or_path)
    size = sum(path.stat().st_size for path in weight_files(config.model_name_or_path))
    return f"prepared: {config.model_name_or_path} ({mib(size)}), {config.dataset_name}"


@contextlib.contextmanager
def joined_run(
    config: TrainConfig, recipe: str, launch: Launch, data: PreparedData
) -> Iterator[tuple[Accelerator, RunFolder]]:
    """The ranks, watched by a watchdog, and their run folder. At the end the ranks leave, and a failure is recorded."""
    accelerator, folder, watchdog, done = start_ranks(config.mixed_precision), None, None, False
    try:
        check_same_on_all_ranks(what_must_be_the_same(config, launch, data))
        folder = _open_run_folder(accelerator, config, recipe, launch, data)
        if accelerator.is_main_process:
            signals.call_before_leaving(partial(folder.write_state, "preempted", folder.step))
        timeouts = {"rank_timeout_s": config.rank_timeout_s, "step_timeout_s": config.step_timeout_s}
        watchdog = start_watchdog(folder, **timeouts)
        yield accelerator, folder
        done = True
    except BaseException as error:
        if watchdog:
            watchdog.explain(error)
        if folder and accelerator.is_main_process:
            folder.record_failure(f"{type(error).__name__}: {error}", refused=isinstance(error, UserError))
        raise
    finally:
        if watchdog:
            watchdog.stop(done=done)
        leave_ranks()


def what_must_be_the_same(config: TrainConfig, launch: Launch, data: PreparedData) -> dict:
    """Names and values for `check_same_on_all_ranks`: packages, settings, launcher, device and data."""
    packages = PACKAGES + (("deepspeed",) if launch.deepspeed else ())
    return {
        **{f"the package {name}": version(name) for name in packages},
        **{f"--{name}": value for name, value in dataclasses.asdict(config).items()},
        "strategy": launch.strategy.name,
        "device": device_name(),
        "DeepSpeed config": launch.deepspeed,
        # Machines without a shared disk each read their own data.
        f"the rows of --dataset_name {config.dataset_name}": data.fingerprint(),
    }


def _open_run_folder(
    accelerator: Accelerator, config: TrainConfig, recipe: str, launch: Launch, data: PreparedData
) -> RunFolder:
    """Rank 0 begins a run, or continues one; all ranks learn which, or why that is refused. Collective."""
    facts = {
        "num_ranks": world_size(),
        "micro_batches_per_step": config.gradient_accumulation_steps * world_size(),
        "mixed_precision": config.mixed_precision,
        "rows": data.fingerprint(),
        "format": data.format,
        "strategy": launch.strategy.name,
    }
    # Groups of ranks that compute different micro-batches. In a pipeline every rank takes part in all of them.
    num_groups = 1 if launch.strategy.engine == "pipeline" else world_size() // config.context_parallel_size
    answer = None
    if accelerator.is_main_process:
        try:
            answer = begin_or_resume(config, recipe, facts, num_groups)
        except (UserError, NothingToDo) as error:
            answer = error
    answer = from_rank_0(answer)
    if isinstance(answer, Exception):
        raise answer
    folder, notes = answer
    for note in notes:
        accelerator.on_main_process(print)(note)  # accelerator.print speaks on every machine
    return folder


def load_training(
    config: TrainConfig,
    plan: BasePlan,
    data: PreparedData,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    folder: RunFolder,
) -> tuple[LoadedBase, Training]:
    """Load the base, of which each rank reads its rows; add the adapters, whole on every rank. Collective."""
    placement, started = agree_on_placement(plan.placement), time.perf_counter()
    memory_before = peak_memory_bytes(accelerator.device)
    options = BaseOptions(
        config.quantization, plan.dtype, accelerator.device, placement,
        will_be_trained=partial(is_trained_parameter, config), task=plan.task, classes=plan.classes,
    )  # fmt: skip
    model = load_cached_base(config.model_name_or_path, options, cache=config.quantized_cache)
    load_s = time.perf_counter() - started
    base = LoadedBase(placement, base_bytes(model), load_s, plan.expected, plan.work, memory_before)
    if plan.task.has_classes:
        model.config.pad_token_id = tokenizer.pad_token_id  # a classifier looks for the last token before it
    if config.has_pairs:  # rewards compare with log-probabilities that were computed without it
        turn_off_dropout(model)
    model = add_adapters(model, config)
    if config.adapter_name_or_path and not folder.resume_from:
        load_first_adapter(model, config)
    check_identical(model)
    micro_batches = MicroBatches(
        data.train, pad_token_id=tokenizer.pad_token_id, seed=config.seed, num_epochs=config.num_train_epochs,
        sequences=config.per_device_train_batch_size,
        per_step=folder.facts["micro_batches_per_step"],
        pack_to=config.max_length if config.packing else None,
        group_by_length=config.train_sampling_strategy == "group_by_length", task=plan.task,
    )  # fmt: skip
    return base, build_training(model, config, accelerator, micro_batches, placement)


def turn_off_dropout(base: PreTrainedModel) -> None:
    """Set every dropout of the base to 0. Of adapters that are added later, `--lora_dropout` stays."""
    for holder in (*base.modules(), base.config):
        for name, value in list(vars(holder).items()):
            if isinstance(value, float) and ("drop" in name or (isinstance(holder, nn.Dropout) and name == "p")):
                setattr(holder, name, 0.0)


def start_metrics(
    config: TrainConfig, strategy: Strategy, folder: RunFolder, base: LoadedBase, training: Training
) -> MetricsLog:
    """metrics.jsonl of the run folder, and its mirrors, which learn how this start of the run was made. Collective."""
    hosts, rank = gather(socket.gethostname()), training.accelerator.process_index
    start = {} if rank else _describe_start(strategy, folder, base, training, hosts)
    return MetricsLog(folder, config.report_to, rank=rank, start=start, hosts=hosts)


def _describe_start(
    strategy: Strategy, folder: RunFolder, base: LoadedBase, training: Training, hosts: list[str]
) -> dict:
    """A line of starts.jsonl. It runs git, so only rank 0 calls it."""
    trainable, total = parameter_counts(training.model)
    return {
        "time": round(time.time(), 3),
        "step": folder.step,
        "strategy": strategy.name,
        "num_ranks": training.accelerator.num_processes,
        "hosts": list(dict.fromkeys(hosts)),
        "device": device_name(),
        "mixed_precision": training.accelerator.mixed_precision,
        "trainable_params": trainable,
        "all_params": total,
        "base_bytes_total": base.num_bytes.total,
        "base_bytes_per_rank": base.num_bytes.held,
        "rows": folder.facts.get("rows"),
        "versions": versions(),
        "git_commit": git_commit(),
        "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
    }
