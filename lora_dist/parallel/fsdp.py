"""torch's FSDP2 for a base that never changes: which parameters are sharded, when they are gathered and freed."""

import time
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_dist.errors import UserError
from lora_dist.parallel.strategies import Placement


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks that are sharded, gathered and recomputed one at a time: transformers' checkpointing layers."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"model type {model.config.model_type}: transformers marks no checkpointing layers in it, "
            "so it cannot be sharded layer by layer"
        )
    return layers


class CountingAllGather:
    """FSDP's default all-gather, counting the bytes it produces. One instance serves all layers of a model.

    `wait_s`: seconds in it, which without a GPU is what the gathers take.
    """

    def __init__(self):
        self.num_bytes = self.num_calls = 0
        self.wait_s = 0.0

    def allocate(self, size, *, dtype, device):
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.num_bytes += output_tensor.nbytes
        self.num_calls += 1
        started = time.perf_counter()
        work = dist.all_gather_single(output_tensor, input_tensor, group=group, async_op=async_op)
        self.wait_s += time.perf_counter() - started
        return work


def shard(model: PreTrainedModel, placement: Placement, device: torch.device, whole: set[nn.Parameter]) -> None:
    """Spread a model, still on meta, over the ranks: a group for each decoder layer and one for what is outside them.

    `whole`: parameters that stay on every rank, because they will be trained. The resident layers are the last ones,
    because memory peaks at the head, where a gathered layer would come on top.
    """
    mesh, layers, model_class = shard_mesh(placement.shard_ranks, device), decoder_layers(model), type(model)
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if placement.offload else OffloadPolicy()
    sharded = layers[: len(layers) - placement.resident_layers]
    resident = {param for layer in layers[len(sharded) :] for param in layer.parameters()}
    for layer in sharded:
        fully_shard(layer, mesh=mesh, offload_policy=offload, ignored_params=whole)
    fully_shard(model, mesh=mesh, offload_policy=offload, ignored_params=resident | whole)
    # fully_shard made a class of its own of it, which transformers takes for custom code, whose checkpoints it renames
    # no weights of: GPT-NeoX's head would silently stay random.
    type(model).__name__, type(model).__module__ = model_class.__name__, model_class.__module__
    counter = CountingAllGather()
    for module in sharded_modules(model):
        module.set_custom_all_gather(counter)
        module.all_gather = counter
        if placement.gather_once:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
    _prefetch([model, *sharded])


def shard_mesh(shard_ranks: int, device: torch.device) -> DeviceMesh:
    """The ranks that hold one copy together: consecutive ones, so those of a node.

    Where there are several copies, each is a mesh of its own: a frozen base has no gradients to add across copies.
    """
    num_ranks = dist.get_world_size()
    # One dimension named "fsdp": PEFT takes any other name for tensor parallelism and builds LoRA for the local rows.
    if shard_ranks == num_ranks:
        return init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("fsdp",))
    shape = (num_ranks // shard_ranks, shard_ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "fsdp"))["fsdp"]


def _prefetch(modules: list[FSDPModule]) -> None:
    """Gather each group while the one before it computes; in backward the other way round. [root, layer 0, ...]"""
    for earlier, later in pairwise(modules):
        earlier.set_modules_to_forward_prefetch([later])
    for earlier, later in pairwise(modules[1:]):
        later.set_modules_to_backward_prefetch([earlier])


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gathered_bytes(model: nn.Module) -> int:
    """All-gather output bytes on this rank since loading; 0 where nothing is sharded."""
    return next((module.all_gather.num_bytes for module in sharded_modules(model)), 0)


def gather_wait_s(model: nn.Module) -> float | None:
    """Seconds this rank has waited for gathers since loading; None where that is not known, or nothing is sharded."""
    counters = [module.all_gather for module in sharded_modules(model)]
    return counters[0].wait_s if counters and next(model.parameters()).device.type == "cpu" else None


def release(model: nn.Module) -> None:
    """Free what is gathered: after a forward without backward the root group, under `gather_once` everything."""
    for module in sharded_modules(model):
        module.reshard()
