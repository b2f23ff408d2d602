"""torch's FSDP2 for a frozen base: which parameters are sharded, and when they are gathered and freed."""

import time
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_dist.boundary import boundary
from lora_dist.errors import UserError
from lora_dist.parallel.strategies import Placement


def check_fsdp_variables() -> None:
    """Raises UserError if accelerate cannot read what its config says about FSDP."""
    from accelerate import FullyShardedDataParallelPlugin

    with boundary("accelerate config fsdp_config", "compare it with accelerate_configs/fsdp.yaml"):
        FullyShardedDataParallelPlugin()  # reads the variables that accelerate launch sets


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that are sharded, gathered and recomputed one at a time: transformers' checkpointing layers.

    Raises UserError if the model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            f"--model_name_or_path: models of type {model.config.model_type} are not supported, because transformers "
            "marks no checkpointing layers in them, by which a base is sharded"
        )
    return layers


class CountingAllGather:
    """FSDP's default all-gather, with counts of its calls and output bytes. One instance serves all layers of a model.

    `wait_s`: seconds spent in the calls. Without a GPU that is the time of the gathers themselves.
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


def shard(model: PreTrainedModel, placement: Placement, device: torch.device, trained: set[nn.Parameter]) -> None:
    """Shard a model on meta over the ranks: an FSDP group per decoder layer, and a root group for the rest. Collective.

    `trained`: parameters that will be trained; they are not sharded. The resident layers are the last ones, because
    memory peaks at the head, and there a gathered layer would add to the peak.
    """
    mesh, layers, model_class = shard_mesh(placement.shard_ranks, device), decoder_layers(model), type(model)
    num_resident = placement.resident_layers
    if num_resident >= len(layers):
        raise UserError(f"resident_layers {num_resident}: the model has {len(layers)} layers; give fewer")
    offload = CPUOffloadPolicy(pin_memory=device.type == "cuda") if placement.offload else OffloadPolicy()
    sharded_layers = layers[: len(layers) - num_resident]
    resident = {param for layer in layers[len(sharded_layers) :] for param in layer.parameters()}
    for layer in sharded_layers:
        fully_shard(layer, mesh=mesh, offload_policy=offload, ignored_params=trained)
    fully_shard(model, mesh=mesh, offload_policy=offload, ignored_params=resident | trained)
    # fully_shard has replaced the model's class by one of its own. transformers would take that for custom code and not
    # rename the weights of the checkpoint, so that GPT-NeoX's head would silently stay random.
    type(model).__name__, type(model).__module__ = model_class.__name__, model_class.__module__
    counter = CountingAllGather()
    for module in sharded_modules(model):
        module.set_custom_all_gather(counter)
        module.all_gather = counter
        if placement.gather_once:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
    _set_prefetch([model, *sharded_layers])


def shard_mesh(shard_ranks: int, device: torch.device) -> DeviceMesh:
    """The mesh of the ranks that hold one copy together. They are consecutive, so that a copy is inside a node.

    Each copy is a mesh of its own, because a frozen base has no gradients to add across copies. Collective.
    """
    num_ranks = dist.get_world_size()
    # The dimension must be named "fsdp": PEFT takes any other name for tensor parallelism, and would build LoRA for the
    # local rows only.
    if shard_ranks == num_ranks:
        return init_device_mesh(device.type, (num_ranks,), mesh_dim_names=("fsdp",))
    shape = (num_ranks // shard_ranks, shard_ranks)
    return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "fsdp"))["fsdp"]


def _set_prefetch(modules: list[FSDPModule]) -> None:
    """Gather each group while the previous one computes, in forward and in backward. `modules`: root, layer 0, ..."""
    for earlier, later in pairwise(modules):
        earlier.set_modules_to_forward_prefetch([later])
    for earlier, later in pairwise(modules[1:]):
        later.set_modules_to_backward_prefetch([earlier])


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gathered_bytes(model: nn.Module) -> int:
    """Bytes that this rank has gathered since loading; 0 if nothing is sharded."""
    return next((module.all_gather.num_bytes for module in sharded_modules(model)), 0)


def gather_wait_s(model: nn.Module) -> float | None:
    """Seconds that this rank has waited for gathers since loading; None on a GPU, or if nothing is sharded."""
    counters = [module.all_gather for module in sharded_modules(model)]
    return counters[0].wait_s if counters and next(model.parameters()).device.type == "cpu" else None


def release(model: nn.Module) -> None:
    """Free what is gathered: the root group after a forward without backward, and all layers with `gather_once`."""
    for module in sharded_modules(model):
        module.reshard()
