"""DeepSpeed's JSON: read from the launcher, held against the recipe's settings, before anything is imported for it.

Under DeepSpeed the loop is the same as everywhere: it owns the accumulation, the clipping, the optimizer's schedule and
the precision of the adapters. DeepSpeed holds, gathers and offloads the base (ZeRO-3), or shards the optimizer
(ZeRO-2). What the JSON says of the loop must agree with the flags; what would do nothing is refused or named.
"""

import importlib.util
import json
import os
from pathlib import Path

from lora_dist.config import TrainConfig
from lora_dist.errors import UserError

# Sections of the JSON that act under this toolkit. Their own keys are DeepSpeed's to check.
SECTIONS = {
    "zero_optimization", "bf16", "fp16", "comms_logger", "steps_per_print", "zero_allow_untested_optimizer",
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
}  # fmt: skip
# Keys of zero_optimization that tune the reduction of gradients or the optimizer, which the base has not.
OF_GRADIENTS = {
    "allgather_partitions", "allgather_bucket_size", "reduce_scatter", "reduce_bucket_size", "contiguous_gradients",
    "round_robin_gradients", "sub_group_size", "stage3_gather_16bit_weights_on_model_save",
}  # fmt: skip


def is_set(name: str) -> bool:
    """Whether the launcher said true in the environment."""
    return os.environ.get(name, "false").lower() == "true"


def read_deepspeed_config(config: TrainConfig, num_ranks: int) -> dict | None:
    """The DeepSpeed config of this run, None where it is not started with one. Raises UserError where it cannot be had.

    It comes from `--deepspeed FILE.json` (the `deepspeed` launcher), or from the accelerate config: the file that it
    names, or its own fields.
    """
    by_accelerate = is_set("ACCELERATE_USE_DEEPSPEED")
    if not by_accelerate and config.deepspeed is None:
        return None
    where = "accelerate config deepspeed_config" if by_accelerate else f"--deepspeed {config.deepspeed}"
    if by_accelerate and config.deepspeed:
        raise UserError(
            f"--deepspeed {config.deepspeed}: the accelerate config is a DeepSpeed one already; leave one out"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{where}: deepspeed is not installed; pip install 'lora-dist[deepspeed]'")
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") if by_accelerate else config.deepspeed
    settings = _of_environment() if file == "none" else _read_json(file, where)
    _check(settings, config, num_ranks, where)
    return settings


def mixed_precision(settings: dict) -> str:
    """One of no, bf16 and fp16, as the JSON asks; accelerate's where it says auto, or nothing."""
    asked = {name: settings[name].get("enabled") for name in ("bf16", "fp16") if name in settings}
    for name, enabled in asked.items():
        if enabled is True:
            return name
    if not asked or "auto" in asked.values():
        return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return "no"


def idle_keys(settings: dict) -> list[str]:
    """Keys that were given and have nothing to act on under ZeRO-3, where DeepSpeed holds a base without gradients."""
    zero = settings["zero_optimization"]
    return sorted(zero.keys() & OF_GRADIENTS) if zero["stage"] == 3 else []


def _of_environment() -> dict:
    """The fields of an accelerate config that names no file, as `accelerate launch` passes them on."""
    zero = {"stage": int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))}
    for key in ("offload_optimizer", "offload_param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_{key.upper()}_DEVICE", "none")
        if device != "none":
            zero[key] = {"device": device}
    settings = {"zero_optimization": zero}
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        value = os.environ.get(f"ACCELERATE_{key.upper()}", "auto")
        settings[key] = value if value == "auto" else float(value)
    return settings


def _read_json(file: str, where: str) -> dict:
    try:
        settings = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {file} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{where}: {file} must hold a JSON object")
    return settings


def _check(settings: dict, config: TrainConfig, num_ranks: int, where: str) -> None:
    def refuse(key, value, why):
        raise UserError(f"{where}: {key} {json.dumps(value)}: {why}")

    zero = settings.get("zero_optimization", {})
    if zero.get("stage") not in (2, 3):
        refuse(
            "zero_optimization.stage", zero.get("stage"), "give 2 or 3; without sharding, accelerate_configs/ddp.yaml"
        )
    unknown = sorted(settings.keys() - SECTIONS)
    if unknown:
        refuse(unknown[0], "...", "has no effect here: flags set it, or the loop owns it; remove it")
    accumulation = config.gradient_accumulation_steps
    expected = {
        "train_micro_batch_size_per_gpu": config.per_device_train_batch_size,
        "gradient_accumulation_steps": accumulation,
        "train_batch_size": config.per_device_train_batch_size * accumulation * num_ranks,
        "gradient_clipping": config.max_grad_norm,
    }
    flags = {
        "train_micro_batch_size_per_gpu": "--per_device_train_batch_size",
        "gradient_accumulation_steps": "--gradient_accumulation_steps",
        "train_batch_size": "the flags and the number of ranks",
        "gradient_clipping": "--max_grad_norm",
    }
    for key, value in expected.items():
        if settings.get(key, "auto") not in ("auto", value):
            refuse(key, settings[key], f'{flags[key]} make it {value}; give "auto"')
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        refuse(
            "zero_optimization.offload_optimizer", zero["offload_optimizer"],
            "the adapters' optimizer is some MiB and stays on the device; offload the base with offload_param",
        )  # fmt: skip
    device = zero.get("offload_param", {}).get("device", "none")
    if device != "none" and zero["stage"] != 3:
        refuse("zero_optimization.offload_param", zero["offload_param"], "needs stage 3")
    if device not in ("none", "cpu"):
        refuse(
            "zero_optimization.offload_param.device", device,
            "DeepSpeed swaps all tensors in one dtype, and packed weights come back rounded; use cpu",
        )  # fmt: skip
    if zero["stage"] == 2 and mixed_precision(settings) == "fp16":
        refuse(
            "fp16", settings.get("fp16", "auto"), "cannot be had with stage 2, which knows no loss scale here; use bf16"
        )
    if num_ranks == 1:
        raise UserError(
            f"accelerate config num_processes: 1: ZeRO-{zero['stage']} shards over 2 ranks or more; "
            "use accelerate_configs/single.yaml, or --num_processes N"
        )
