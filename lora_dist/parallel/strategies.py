"""How the base is placed: one row per file of accelerate_configs/, and nothing else knows their names."""

import os
from dataclasses import dataclass
from typing import Literal

from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.parallel.deepspeed_config import is_set, mixed_precision, read_deepspeed_config


@dataclass(frozen=True)
class Strategy:
    """One way to place the frozen base. The code asks these fields, never the name."""

    name: str
    summary: str
    engine: Literal["none", "FSDP2", "ZeRO-2", "ZeRO-3", "pipeline"]  # who shards what is sharded
    base_per_rank: Literal["whole", "1/N", "1/n, n ranks of a node", "1/N of the layers"]
    traffic_per_step: str
    offloads: str = "nothing"
    quantizations: tuple[str, ...] = ("int8", "nf4", "nf4_plain", "none")
    refuses: tuple[str, ...] = ()  # settings that cannot be had under it


GRADIENTS = "adapter gradients"
# Of a base whose layers are not whole on every rank all the time: train some of it in place, or read it from outside.
ON_WHOLE_LAYERS = ("lora_bias", "modules_to_save", "use_dora")
STRATEGIES = {
    row.name: row
    for row in (
        Strategy("single", "one process, one device", "none", "whole", "none"),
        Strategy("ddp", "each rank holds the whole base; fastest when it fits", "none", "whole", GRADIENTS),
        Strategy("fsdp", "each rank holds its rows of the base and gathers a layer at a time", "FSDP2", "1/N",
                 f"{GRADIENTS}, the packed base twice per micro-batch"),
        Strategy("hsdp", "as fsdp among the ranks of a node; each node holds a copy", "FSDP2", "1/n, n ranks of a node",
                 f"{GRADIENTS}, the packed base twice per micro-batch inside nodes"),
        Strategy("fsdp_offload", "as fsdp, the shards in host memory", "FSDP2", "1/N",
                 f"{GRADIENTS}, the packed base twice per micro-batch, and once more from the host",
                 offloads="the base to host memory"),
        Strategy("zero2", "as ddp, DeepSpeed shards the optimizer of the adapters", "ZeRO-2", "whole",
                 f"{GRADIENTS} twice"),
        Strategy("zero3", "DeepSpeed partitions the base and gathers a module at a time", "ZeRO-3", "1/N",
                 f"{GRADIENTS}, the packed base two to three times per micro-batch", refuses=ON_WHOLE_LAYERS),
        Strategy("zero3_offload", "as zero3, the partitions in host memory", "ZeRO-3", "1/N",
                 f"{GRADIENTS}, the packed base two to three times per micro-batch, and from the host",
                 offloads="the base to host memory", refuses=ON_WHOLE_LAYERS),
        Strategy("pipeline", "each rank holds some layers, activations go from rank to rank", "pipeline",
                 "1/N of the layers", f"{GRADIENTS}, one layer's output forth and back per micro-batch",
                 refuses=(*ON_WHOLE_LAYERS, "context_parallel_size", "task_type")),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Where the bytes of the frozen base lie. Under every placement the training is the same, bit for bit."""

    shard_ranks: int = 1  # ranks that hold one copy of the base together; 1: each holds all of it
    resident_layers: int = 0  # decoder layers, the last ones, that stay whole on each rank all the same
    offload: bool = False  # the shards lie in host memory
    gather_once: bool = False  # what is gathered stays until the optimizer step
    deepspeed: dict | None = None  # DeepSpeed's config: stage 3 shards the base, stage 2 the adapters' optimizer
    stages: int = 1  # ranks that hold different layers, one after the other
    context_ranks: int = 1  # ranks that share each row

    @property
    def zero_stage(self) -> int:
        """2 or 3 under DeepSpeed, else 0."""
        return self.deepspeed["zero_optimization"]["stage"] if self.deepspeed else 0


@dataclass(frozen=True)
class Launch:
    """What the launcher asked for: the row of the table, and what else its config says."""

    strategy: Strategy
    mixed_precision: str
    offload: bool = False
    deepspeed: dict | None = None


def world_size() -> int:
    """Ranks of this run, as the launcher says; `session.start_ranks` checks that they are there."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def read_launch(config: TrainConfig) -> Launch:
    """What accelerate, deepspeed or torchrun put in the environment, as a row of the table.

    Raises UserError where it cannot be had, or where the row asks for several ranks and one was started.
    """
    num_ranks, precision = world_size(), os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if num_ranks > 1 and "RANK" not in os.environ:  # accelerate would start one process, which trains alone
        raise UserError(
            f"WORLD_SIZE {num_ranks}: set without RANK, so only this process was started; "
            "launch with accelerate launch or torchrun, or unset it"
        )
    if is_set("ACCELERATE_USE_PARALLELISM_CONFIG"):  # which accelerate takes on GPUs alone
        raise UserError(
            "accelerate config parallelism_config: has no effect here; give --context_parallel_size N, "
            "take accelerate_configs/hsdp.yaml to shard inside nodes, or see docs/strategies.md"
        )
    deepspeed = read_deepspeed_config(config, num_ranks)
    if deepspeed:
        zero = deepspeed["zero_optimization"]
        offload = zero.get("offload_param", {}).get("device", "none") != "none"
        name = "zero2" if zero["stage"] == 2 else "zero3_offload" if offload else "zero3"
        return Launch(STRATEGIES[name], mixed_precision(deepspeed), offload, deepspeed)
    if is_set("ACCELERATE_USE_MEGATRON_LM"):
        return Launch(_pipeline(num_ranks), precision)
    if is_set("ACCELERATE_USE_FSDP"):
        offload = is_set("FSDP_OFFLOAD_PARAMS")
        return Launch(_fsdp(num_ranks, offload), precision, offload)
    return Launch(STRATEGIES["ddp" if num_ranks > 1 else "single"], precision)


def _fsdp(num_ranks: int, offload: bool) -> Strategy:
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError(
            "accelerate config fsdp_version: 1: cannot shard int8 weights; "
            "set fsdp_version: 2, as accelerate_configs/fsdp.yaml does"
        )
    if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
        raise UserError(
            "accelerate config fsdp_reshard_after_forward: false: has no effect here; set true, "
            "and keep layers whole with --resident_layers N, or until the step with --gather_once true"
        )
    sharding = os.environ.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
    if sharding not in ("1", "FULL_SHARD", "4", "HYBRID_SHARD"):
        raise UserError(
            f"accelerate config fsdp_sharding_strategy: {sharding}: cannot be had; "
            "give FULL_SHARD, or HYBRID_SHARD to shard inside nodes"
        )
    if num_ranks == 1:
        raise UserError(
            "accelerate config num_processes: 1: fsdp shards over 2 ranks or more; "
            "use accelerate_configs/single.yaml, or --num_processes N"
        )
    if sharding in ("4", "HYBRID_SHARD"):
        return STRATEGIES["hsdp"]
    return STRATEGIES["fsdp_offload" if offload else "fsdp"]


def _pipeline(num_ranks: int) -> Strategy:
    """accelerate's only word for a pipeline is Megatron-LM's degree; nothing of Megatron-LM is used."""
    tensor_degree = int(os.environ.get("MEGATRON_LM_TP_DEGREE", 1))
    if tensor_degree > 1:
        raise UserError(
            f"accelerate config megatron_lm_tp_degree: {tensor_degree}: tensor parallelism is not had, "
            "see docs/strategies.md; use accelerate_configs/pipeline.yaml or fsdp.yaml"
        )
    if num_ranks == 1:
        raise UserError(
            "accelerate config num_processes: 1: a pipeline needs 2 ranks or more; "
            "use accelerate_configs/single.yaml, or --num_processes N"
        )
    degree = os.environ.get("MEGATRON_LM_PP_DEGREE", "1")
    if degree != str(num_ranks):
        raise UserError(
            f"accelerate config megatron_lm_pp_degree: {degree}: all {num_ranks} ranks form one pipeline; "
            f"give --megatron_lm_pp_degree {num_ranks}"
        )
    return STRATEGIES["pipeline"]
