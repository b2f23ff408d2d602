"""The strategies: one row per file of accelerate_configs/, and what the launcher asked for. Imports no torch."""

import os
from dataclasses import dataclass
from typing import Literal

from lora_dist.config import TrainConfig
from lora_dist.environment import env_count
from lora_dist.errors import UserError
from lora_dist.parallel.deepspeed_config import env_is_true, mixed_precision, read_deepspeed_config


@dataclass(frozen=True)
class Strategy:
    """One way to place the frozen base. The code looks at these fields, never at the name."""

    name: str
    summary: str
    engine: Literal["none", "FSDP2", "ZeRO-2", "ZeRO-3", "pipeline"]  # who shards
    base_per_rank: Literal["whole", "1/N", "1/n, n ranks of a node", "1/N of the layers"]
    traffic_per_step: str
    offloads: str = "nothing"
    quantizations: tuple[str, ...] = ("int8", "nf4", "nf4_plain", "none")
    refuses: tuple[str, ...] = ()  # names of the settings that it does not support


GRADIENTS = "adapter gradients"
# These settings need whole layers on every rank at any time: they train part of the base in place, or read its weights
# outside of a layer's forward.
NEED_WHOLE_LAYERS = ("lora_bias", "modules_to_save", "use_dora")
STRATEGIES = {
    row.name: row
    for row in (
        Strategy("single", "one process, one device", "none", "whole", "none"),
        Strategy("ddp", "each rank holds the whole base; fastest when it fits", "none", "whole", GRADIENTS),
        Strategy("fsdp", "each rank holds its rows of the base and gathers a layer at a time", "FSDP2", "1/N",
                 f"{GRADIENTS}, the quantized base twice per micro-batch"),
        Strategy("hsdp", "as fsdp, but inside each node, which holds a copy", "FSDP2", "1/n, n ranks of a node",
                 f"{GRADIENTS}, the quantized base twice per micro-batch inside nodes"),
        Strategy("fsdp_offload", "as fsdp, with the shards in host memory", "FSDP2", "1/N",
                 f"{GRADIENTS}, the quantized base twice per micro-batch, and once more from the host",
                 offloads="the base to host memory"),
        Strategy("zero2", "as ddp, but DeepSpeed shards the optimizer of the adapters", "ZeRO-2", "whole",
                 f"{GRADIENTS} twice"),
        Strategy("zero3", "DeepSpeed partitions the base and gathers a module at a time", "ZeRO-3", "1/N",
                 f"{GRADIENTS}, the quantized base two to three times per micro-batch", refuses=NEED_WHOLE_LAYERS),
        Strategy("zero3_offload", "as zero3, with the partitions in host memory", "ZeRO-3", "1/N",
                 f"{GRADIENTS}, the quantized base two to three times per micro-batch, and from the host",
                 offloads="the base to host memory", refuses=NEED_WHOLE_LAYERS),
        Strategy("pipeline", "each rank holds some layers; activations go from rank to rank", "pipeline",
                 "1/N of the layers", f"{GRADIENTS}, one layer's output and its gradient per micro-batch",
                 refuses=(*NEED_WHOLE_LAYERS, "context_parallel_size", "task_type")),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Where the frozen base is. The training is the same under every placement, bit for bit."""

    shard_ranks: int = 1  # number of ranks that hold one copy of the base together; 1: each holds all of it
    resident_layers: int = 0  # number of decoder layers, the last ones, that are not sharded
    offload: bool = False  # the shards are in host memory
    gather_once: bool = False  # gathered layers stay until the optimizer step
    deepspeed: dict | None = None  # DeepSpeed's config: stage 3 shards the base, stage 2 the adapters' optimizer
    stages: int = 1  # number of pipeline stages; each rank holds the layers of one
    context_ranks: int = 1  # number of ranks that share each row of the data

    @property
    def zero_stage(self) -> int:
        """2 or 3 under DeepSpeed, otherwise 0."""
        return self.deepspeed["zero_optimization"]["stage"] if self.deepspeed else 0


@dataclass(frozen=True)
class Launch:
    """What the launcher asked for."""

    strategy: Strategy
    mixed_precision: str
    offload: bool = False
    deepspeed: dict | None = None


def world_size() -> int:
    """Number of ranks that the launcher announced; `start_ranks` checks that they have started."""
    return env_count("WORLD_SIZE", 1, least=1)


def check_rank_variables() -> None:
    """Raises UserError if a launcher, or Slurm through a job file, gave this rank a place that cannot be."""
    for part, whole in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        number, total = env_count(part, 0), env_count(whole, 1, least=1)
        if number >= total and whole in os.environ:
            raise UserError(f"{part} {number}: must be below {whole} {total}; both are set by what starts the ranks")
    for name, least in (("MASTER_PORT", 0), ("OMP_NUM_THREADS", 1), ("TORCHELASTIC_MAX_RESTARTS", 0)):
        env_count(name, 1, least=least)


def read_launch(config: TrainConfig) -> Launch:
    """The strategy that accelerate, deepspeed or torchrun asked for in the environment.

    Raises UserError if it is not supported, or if it needs several ranks and only one was started.
    """
    check_rank_variables()
    num_ranks, precision = world_size(), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if num_ranks > 1 and "RANK" not in os.environ:  # accelerate would then train on one process alone
        raise UserError(
            f"WORLD_SIZE {num_ranks}: is set, but RANK is not, so only this process was started; "
            "use accelerate launch or torchrun, or unset WORLD_SIZE"
        )
    if env_is_true("ACCELERATE_USE_PARALLELISM_CONFIG"):  # accelerate accepts it on GPUs only
        raise UserError(
            "accelerate config parallelism_config: is not supported; give --context_parallel_size N to share rows, "
            "use accelerate_configs/hsdp.yaml to shard inside nodes, or see docs/strategies.md"
        )
    deepspeed = read_deepspeed_config(config, num_ranks)
    if deepspeed:
        zero = deepspeed["zero_optimization"]
        offload = zero.get("offload_param", {}).get("device", "none") != "none"
        name = "zero2" if zero["stage"] == 2 else "zero3_offload" if offload else "zero3"
        return Launch(STRATEGIES[name], mixed_precision(deepspeed), offload, deepspeed)
    if env_is_true("ACCELERATE_USE_MEGATRON_LM"):
        return Launch(_pipeline(num_ranks), precision)
    if env_is_true("ACCELERATE_USE_FSDP"):
        offload = env_is_true("FSDP_OFFLOAD_PARAMS")
        return Launch(fsdp_strategy(num_ranks, offload), precision, offload)
    return Launch(STRATEGIES["ddp" if num_ranks > 1 else "single"], precision)


def fsdp_strategy(num_ranks: int, offload: bool) -> Strategy:
    fsdp_version = os.environ.get("FSDP_VERSION", "none, which means 1")
    if fsdp_version != "2":
        raise UserError(
            f"accelerate config fsdp_version: {fsdp_version}: is not supported, because it cannot shard int8 weights; "
            "set fsdp_version: 2, as accelerate_configs/fsdp.yaml does"
        )
    if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
        raise UserError(
            "accelerate config fsdp_reshard_after_forward: false: is not supported; set it to true, "
            "and gather less with --resident_layers N or with --gather_once true"
        )
    sharding = os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    if sharding not in ("1", "FULL_SHARD", "4", "HYBRID_SHARD"):
        raise UserError(
            f"accelerate config fsdp_sharding_strategy: {sharding}: is not supported; "
            "give FULL_SHARD, or HYBRID_SHARD to shard inside nodes"
        )
    if num_ranks == 1:
        raise UserError(
            "accelerate config num_processes: 1: fsdp needs 2 ranks or more; "
            "use accelerate_configs/single.yaml, or --num_processes N"
        )
    if sharding in ("4", "HYBRID_SHARD"):
        return STRATEGIES["hsdp"]
    return STRATEGIES["fsdp_offload" if offload else "fsdp"]


def _pipeline(num_ranks: int) -> Strategy:
    """accelerate has no key for a pipeline but Megatron-LM's degree. Nothing else of Megatron-LM is used."""
    tensor_degree = env_count("MEGATRON_LM_TP_DEGREE", 1, least=1, setting="accelerate config megatron_lm_tp_degree:")
    if tensor_degree > 1:
        raise UserError(
            f"accelerate config megatron_lm_tp_degree: {tensor_degree}: tensor parallelism is not supported "
            "(docs/strategies.md says why); use accelerate_configs/pipeline.yaml or fsdp.yaml"
        )
    if num_ranks == 1:
        raise UserError(
            "accelerate config num_processes: 1: a pipeline needs 2 ranks or more; "
            "use accelerate_configs/single.yaml, or --num_processes N"
        )
    degree = env_count("MEGATRON_LM_PP_DEGREE", 1, least=1, setting="accelerate config megatron_lm_pp_degree:")
    if degree != num_ranks:
        raise UserError(
            f"accelerate config megatron_lm_pp_degree: {degree}: must be the number of ranks, {num_ranks}, "
            f"which form one pipeline; give --megatron_lm_pp_degree {num_ranks}"
        )
    return STRATEGIES["pipeline"]
