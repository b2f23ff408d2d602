"""DeepSpeed under the same training loop: ZeRO-3 holds the frozen base, ZeRO-2 shards the adapters' optimizer.

DeepSpeed never sees the gradient of a micro-batch. Gradients are summed along the tree of `exact_sum`, as under every
strategy, so the training is the same, bit for bit. Under ZeRO-3 DeepSpeed partitions the base, gathers each module's
weights for its forward and backward, and offloads them; adapters are added afterwards and DeepSpeed does not know them.
Under ZeRO-2 DeepSpeed gets the reduced gradient once per step.
"""

import copy
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from lora_dist.boundary import boundary
from lora_dist.parallel.fsdp import decoder_layers


def modules_with_matrices(model: nn.Module) -> list[nn.Module]:
    """The modules that DeepSpeed gets: those that hold a matrix, with their vectors. Norms stay whole on every rank.

    DeepSpeed does not get the whole model, because it puts identity functions around each module that it knows. A norm
    uses its input more than once, so around a norm they would change the order in which its gradient is summed.
    """
    return [m for m in model.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]


def split_rows(model: nn.Module, device: torch.device) -> None:
    """Split the parameters that DeepSpeed will get by rows over all ranks, on meta, so that a rank reads only its rows.

    Collective.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("fsdp",))
    split = {}
    for module in modules_with_matrices(model):
        for name, param in module.named_parameters(recurse=False):
            if param not in split:
                rows = -(-param.shape[0] // mesh.size())  # torch.chunk's rule, which the loader follows
                own = param.data[rows * mesh.get_rank() : rows * (mesh.get_rank() + 1)]
                whole = DTensor.from_local(own, mesh, [Shard(0)], shape=param.shape, stride=param.stride())
                split[param] = nn.Parameter(whole, requires_grad=False)
            setattr(module, name, split[param])  # tied parameters stay tied


def partition_base(model: nn.Module, settings: dict, device: torch.device) -> None:
    """Hand a base that `split_rows` has split to ZeRO-3. Only one parameter is whole at a time. Collective.

    `settings`: DeepSpeed's config.
    """
    deepspeed = _import_deepspeed(device)
    config = engine_config(settings, model)
    modules, partitioned, first = modules_with_matrices(model), {}, None
    for module in modules:
        for name, param in list(module.named_parameters(recurse=False)):
            if param not in partitioned:
                rows = DTensor.from_local(  # rows of an offloaded base are in host memory
                    param.to_local().to(device), param.device_mesh, param.placements,
                    shape=param.shape, stride=param.stride(),
                )  # fmt: skip
                whole = nn.Parameter(rows.full_tensor(), requires_grad=False)
                if first is None:
                    first = whole
                    deepspeed.zero.Init(module=nn.ParameterList([whole]), config_dict_or_path=config)
                else:
                    first.convert_to_zero_parameters([whole])
                partitioned[param] = whole
            setattr(module, name, partitioned[param])
    engine = deepspeed.initialize(model=nn.ModuleList(modules), config=config, dist_init_required=False)[0]
    model.register_forward_pre_hook(lambda *_: engine.optimizer.get_param_coordinator().reset_step())


def is_partitioned(model: nn.Module) -> bool:
    """True if DeepSpeed has partitioned the base."""
    return any(hasattr(param, "ds_tensor") for param in model.parameters())


def engine_config(settings: dict, base: nn.Module | None = None) -> dict:
    """The config for DeepSpeed: one micro-batch per step, because the loop accumulates, clips and casts by itself.

    `base` is needed under ZeRO-3.
    """
    zero = copy.deepcopy(settings["zero_optimization"])
    if zero["stage"] == 3:
        layer = max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(base))
        # DeepSpeed's defaults are absolute numbers, with which a small or an 8-bit base stays whole on every rank.
        defaults = {
            "stage3_param_persistence_threshold": max(p.numel() for p in base.parameters() if p.dim() == 1),
            "stage3_max_live_parameters": 2 * layer,
            "stage3_max_reuse_distance": layer,  # backward uses what the recomputation has just gathered
            "stage3_prefetch_bucket_size": layer,
        }
        zero |= {key: value for key, value in defaults.items() if zero.get(key, "auto") == "auto"}
        zero.setdefault("memory_efficient_linear", False)  # true would replace torch.nn.functional.linear
    passed_on = {key: value for key, value in settings.items() if key == "comms_logger"}
    return passed_on | {
        "zero_optimization": zero, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the default is 1
        "zero_allow_untested_optimizer": True, "steps_per_print": 2**31,
    }  # fmt: skip


def check_zero(settings: dict, skeleton: nn.Module) -> None:
    """Raises UserError if DeepSpeed does not accept its part of the config. `skeleton`: the model on meta."""
    _import_deepspeed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    from deepspeed.comm.config import DeepSpeedCommsConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    config = engine_config(settings, skeleton)
    with boundary("DeepSpeed config", "DeepSpeed's documentation lists the valid keys"):
        try:
            DeepSpeedCommsConfig(config)
            DeepSpeedZeroConfig(**config["zero_optimization"])
        except ValidationError as error:  # its text has several lines
            first = error.errors()[0]
            section = "comms_logger" if error.title == "CommsLoggerConfig" else "zero_optimization"
            key = ".".join(map(str, (section, *first["loc"])))
            raise ValueError(f"{key} {str(first['input'])[:100]}: {first['msg'].lower()}") from None


def shard_optimizer(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, settings: dict):
    """DeepSpeed's ZeRO-2 engine: it updates `params` and keeps 1/N of the optimizer's state on each rank. Collective.

    `settings`: DeepSpeed's config.
    """
    deepspeed = _import_deepspeed(params[0].device)
    config = engine_config(settings)
    adapters = nn.ParameterList(params)  # without the base, which DeepSpeed would move and cast
    return deepspeed.initialize(model=adapters, optimizer=optimizer, config=config, dist_init_required=False)[0]


def zero2_step(engine, params: list[nn.Parameter], grad: torch.Tensor) -> None:
    """One optimizer step with the gradient `grad`: flat, reduced, the same on all ranks. Collective.

    DeepSpeed averages the gradients of the ranks. Rank 0 gives it N times `grad` and the others give zeros, so the
    average is exact if N is a power of two, and otherwise differs by one rounding at most.
    """
    grad = grad * (dist.get_world_size() if dist.get_rank() == 0 else 0)
    parts = grad.split([p.numel() for p in params])
    engine.backward(sum((p * part.view_as(p)).sum() for p, part in zip(params, parts, strict=True)))
    engine.step()


def zero2_state(engine, params: list[nn.Parameter]) -> list[dict[str, torch.Tensor]]:
    """AdamW's state of each parameter, put together from all ranks; [] before the first step. Collective."""
    from deepspeed.utils import safe_get_full_optimizer_state

    partitions = engine.optimizer.single_partition_of_fp32_groups
    states = [engine.optimizer.optimizer.state.get(partition) for partition in partitions]
    if not all(states):
        return []
    step = states[0]["step"]
    return [
        {"step": step} | {key: safe_get_full_optimizer_state(param, key) for key in ("exp_avg", "exp_avg_sq")}
        for param in params
    ]


def load_zero2_state(engine, params: list[nn.Parameter], states: list[dict[str, torch.Tensor]]) -> None:
    """Give DeepSpeed the parameters as they are now, and the state that `zero2_state` returned. Collective."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if all(states):
        for partition in engine.optimizer.single_partition_of_fp32_groups:
            moments = {key: torch.zeros_like(partition) for key in ("exp_avg", "exp_avg_sq")}
            engine.optimizer.optimizer.state[partition] = {"step": states[0]["step"].clone(), **moments}
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    for param, state in zip(params, states, strict=True):
        safe_set_full_fp32_param(param, param.data)
        for key in ("exp_avg", "exp_avg_sq") if state else ():
            safe_set_full_optimizer_state(param, state[key], key)


def partitioned_bytes(param: nn.Parameter) -> int | None:
    """Bytes of a parameter that this rank keeps between uses; None if DeepSpeed has not partitioned it."""
    if not hasattr(param, "ds_tensor"):
        return None
    return param.ds_tensor.nbytes + (param.ds_numel * param.ds_tensor.itemsize if param.ds_persist else 0)


def whole_shape(param: nn.Parameter) -> torch.Size:
    """The shape of the whole parameter. DeepSpeed leaves a partitioned one empty between uses."""
    return getattr(param, "ds_shape", param.shape)


def _import_deepspeed(device: torch.device):
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # here, because it takes seconds

    if device.type == "cpu":
        # DeepSpeed would compile its own all-reduce at the first start, which needs a compiler and is not used here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
