"""How the base is placed: one row per file of accelerate_configs/, and nothing else knows their names."""

import os
from dataclasses import dataclass
from typing import Literal

from lora_dist.config import UserError


@dataclass(frozen=True)
class Strategy:
    """One way to place the frozen base. The code asks these fields, never the name."""

    name: str
    summary: str
    base_per_rank: Literal["whole", "1/N"]
    traffic_per_step: str


@dataclass(frozen=True)
class Placement:
    """Where the bytes of the frozen base lie. Under every placement the training is the same, bit for bit."""

    shard_ranks: int = 1  # ranks that hold one copy of the base together; 1: each holds all of it
    resident_layers: int = 0  # decoder layers, the last ones, that stay whole on each rank all the same
    offload: bool = False  # the shards lie in host memory
    gather_once: bool = False  # what is gathered stays until the optimizer step


STRATEGIES = {
    row.name: row
    for row in (
        Strategy("single", "one process, one device", "whole", "none"),
        Strategy("ddp", "each rank holds the whole base; fastest when it fits", "whole", "adapter gradients"),
        Strategy("fsdp", "each rank holds its rows of the base and gathers a layer at a time", "1/N",
                 "adapter gradients, and the packed base twice per micro-batch"),
    )
}  # fmt: skip


def world_size() -> int:
    """Ranks of this run, as the launcher says; `session.start_ranks` checks that they are there."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched_strategy() -> Strategy:
    """The row that the launcher asked for, read from what accelerate and torchrun put in the environment.

    Raises UserError where the row asks for several ranks and one was started.
    """
    num_ranks = world_size()
    if num_ranks > 1 and "RANK" not in os.environ:  # accelerate would start one process, which trains alone
        raise UserError(
            f"WORLD_SIZE {num_ranks}: set without RANK, so only this process was started; "
            "launch with accelerate launch or torchrun, or unset it"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            f"accelerate config distributed_type: DEEPSPEED: not supported yet; use one of {', '.join(STRATEGIES)}"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        if os.environ.get("FSDP_VERSION") != "2":
            raise UserError(
                "accelerate config fsdp_version: 1: cannot shard int8 weights; "
                "set fsdp_version: 2, as accelerate_configs/fsdp.yaml does"
            )
        if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
            raise UserError(
                "accelerate config parallelism_config: accelerate takes it on GPUs alone; "
                "leave it out, and give --shard_size N to shard over N ranks and replicate over the others"
            )
        if os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
            raise UserError(
                "accelerate config fsdp_reshard_after_forward: false: has no effect here; set true, "
                "and keep layers whole with --resident_layers N, or until the step with --gather_once true"
            )
        if num_ranks == 1:
            raise UserError(
                "accelerate config num_processes: 1: fsdp shards over 2 ranks or more; "
                "use accelerate_configs/single.yaml, or --num_processes N"
            )
        return STRATEGIES["fsdp"]
    return STRATEGIES["ddp" if num_ranks > 1 else "single"]


def offload_asked() -> bool:
    """`fsdp_offload_params` of the accelerate config."""
    return os.environ.get("FSDP_OFFLOAD_PARAMS", "false").lower() == "true"
