"""A model that does for its adapters what DistributedDataParallel would do, under any training loop.

accelerate 1.15 does not put DDP around a model with sharded parameters: on GPUs `Accelerator.prepare_model` refuses it.
And transformers' Trainer, told that the model was sharded while loading, refuses to save checkpoints that can be
resumed. So the model itself sends rank 0's adapters to the other ranks before the first step, averages their gradients
at the end of each backward, and computes in accelerate's mixed precision, and tells accelerate that it is prepared.
"""

import functools
from types import MethodType

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DynamoBackend
from accelerate.utils.operations import convert_to_fp32
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from lora_dist.errors import UserError
from lora_dist.parallel.deepspeed_config import env_is_true

WRAPPED_BY_PEFT = (".base_layer", ".original_module")  # what PEFT puts into the names of a base's parameters
AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def keep_replicas_equal(model: PreTrainedModel) -> None:
    """Let a frozen model that `load_base` returns train its adapters on all ranks. Call it before they are added."""
    hooks = _Replicas(dict(model.named_parameters()).keys())
    model.register_forward_pre_hook(hooks.before_forward, with_kwargs=True, prepend=True)  # before FSDP2 gathers
    model.register_forward_hook(hooks.after_forward)
    # accelerate's FSDP2 begins with the model's state_dict, and DeepSpeed with its `to`.
    model.register_state_dict_pre_hook(lambda *args: refuse_other_engines())
    model.forward = _in_mixed_precision(model.forward)
    model._is_accelerate_prepared = True  # accelerate then wraps it neither in DDP nor in an autocast of its own
    model._apply = MethodType(_apply_to_unsharded, model)


def refuse_other_engines() -> None:
    """Raises UserError for what accelerate would do to a model and must not, or cannot, do to this one."""
    state = AcceleratorState._shared_state
    # An Accelerator that gets an FSDP plugin sets the variable, which `load_base` has cleared; also on a CPU.
    engines = {
        "fsdp": state.get("fsdp_plugin") or env_is_true("ACCELERATE_USE_FSDP"),
        "deepspeed": state.get("deepspeed_plugins"),
    }
    for setting, is_asked_for in engines.items():
        if is_asked_for:
            raise UserError(
                f"TrainingArguments {setting}: cannot shard once more what load_base has sharded; leave it out, or "
                "name it in accelerate's config (accelerate_configs/fsdp.yaml), which load_base follows"
            )
    # accelerate would compile, or change to fp8, while it prepares the model, which does not happen here.
    if (dynamo := state.get("dynamo_plugin")) and dynamo.backend != DynamoBackend.NO:
        raise UserError("TrainingArguments torch_compile: is not supported for a base of load_base; leave it out")
    if state.get("_mixed_precision") == "fp8":
        raise UserError("mixed_precision fp8: is not supported for a base of load_base; give bf16, fp16 or no")


class _Replicas:
    """The hooks of one model. `base`: the names of its frozen parameters."""

    def __init__(self, base):
        self.base, self.model, self.is_queued = frozenset(base), None, False

    def before_forward(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before the first forward with gradients, send each added parameter from rank 0 to the others. Collective."""
        if torch.compiler.is_compiling():
            raise UserError("torch_compile: is not supported for a base of load_base; leave it out")
        if not torch.is_grad_enabled():
            return
        refuse_other_engines()
        self.model, self.is_queued = model, False
        for name, param in model.named_parameters():
            if param.requires_grad and isinstance(param, DTensor):
                raise UserError(
                    f"{name} is trained whole, but it is sharded; give load_base the peft_config that asks for it"
                )
            if not hasattr(param, "_is_same_on_all_ranks") and self._is_added(name, param):
                dist.broadcast(param.data, 0)
                param._is_same_on_all_ranks = True
        if _needs_gradient(kwargs.get("inputs_embeds")) and not _trained(model):
            raise UserError("load_base: prompt tuning is not supported, because its parameters are not in the base")

    def _is_added(self, name: str, param: nn.Parameter) -> bool:
        """True for a parameter that is not the base's own: also for the frozen adapter of a reference model."""
        for part in WRAPPED_BY_PEFT:
            name = name.replace(part, "")
        return param.requires_grad or name not in self.base

    def after_forward(self, model: nn.Module, args: tuple, output) -> None:
        outputs = list(filter(_needs_gradient, tree_leaves(output)))
        for tensor in outputs:
            tensor.register_hook(self._in_backward)
        if not outputs and isinstance(model, FSDPModule):
            # FSDP2 leaves the root's weights gathered until a backward. Rank 0 alone frees them when it saves, and the
            # next forward would find a rank that gathers them and others that do not.
            model.reshard()

    def _in_backward(self, gradient: torch.Tensor) -> None:
        if not self.is_queued:
            self.is_queued = True
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)

    def _end_of_backward(self) -> None:
        self.is_queued = False
        # False in all micro-batches of a step but the last. Averaging the sum once is averaging each part.
        if GradientState._shared_state.get("sync_gradients", True):
            average_gradients(_trained(self.model))


def average_gradients(params: list[nn.Parameter]) -> None:
    """Replace each gradient by its mean over the ranks. A rank without one counts as zeros. Collective."""
    for dtype in dict.fromkeys(param.dtype for param in params):
        group = [param for param in params if param.dtype == dtype]
        has_gradient = torch.tensor([param.grad is not None for param in group])
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([*(g.reshape(-1) for g in gradients), has_gradient.to(gradients[0])])
        dist.all_reduce(flat)
        on_any_rank = flat[-len(group) :].tolist()
        flat /= dist.get_world_size()
        means = flat[: -len(group)].split([param.numel() for param in group])
        for param, gradient, mean, found in zip(group, gradients, means, on_any_rank, strict=True):
            if found:
                param.grad = gradient.copy_(mean.view_as(gradient))


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _needs_gradient(value) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _in_mixed_precision(forward):
    """`forward` under the autocast that accelerate would put around a model, with outputs in fp32 as there."""

    @functools.wraps(forward)
    def in_mixed_precision(*args, **kwargs):
        dtype = AMP_DTYPES.get(AcceleratorState._shared_state.get("_mixed_precision"))
        if dtype is None:
            return forward(*args, **kwargs)
        with torch.autocast(AcceleratorState().device.type, dtype):
            output = forward(*args, **kwargs)
        return convert_to_fp32(output)

    return in_mixed_precision


def _apply_to_unsharded(self: nn.Module, fn, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, on which `to`, `cuda` and `float` are built, but shards stay where `load_base` put them.

    FSDP2 does not allow a shard to be moved, and shards of the host's memory are not meant to be on a GPU.
    """
    refuse_other_engines()
    return type(self)._apply(self, lambda t: t if isinstance(t, DTensor) else fn(t), recurse)
