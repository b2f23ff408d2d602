"""DeepSpeed's JSON: read from the launcher and compared with the settings, before anything is imported. No torch.

Under DeepSpeed the training loop is the same as under every strategy. The loop owns the accumulation, the clipping, the
schedule of the optimizer and the precision of the adapters. DeepSpeed holds, gathers and offloads the base (ZeRO-3), or
shards the optimizer (ZeRO-2). What the JSON says about the loop must agree with the flags. A section of the JSON that
has no effect is an error, and a key of ZeRO that has none is named at the start.
"""

import importlib.util
import json
import os

from lora_dist.boundary import boundary, read_json
from lora_dist.config import TrainConfig
from lora_dist.environment import env_count
from lora_dist.errors import UserError

# Sections of the JSON that have an effect here. DeepSpeed itself checks the keys inside of them.
SECTIONS = {
    "zero_optimization", "bf16", "fp16", "comms_logger", "steps_per_print", "zero_allow_untested_optimizer",
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
}  # fmt: skip
# Objects of the JSON that are looked into here; "a.b" is inside "a".
OBJECTS = {
    "bf16": '{"enabled": true}', "fp16": '{"enabled": true}', "comms_logger": '{"enabled": true}',
    "zero_optimization": '{"stage": 3}', "zero_optimization.offload_param": '{"device": "cpu"}',
    "zero_optimization.offload_optimizer": '{"device": "none"}',
}  # fmt: skip
# Keys of zero_optimization about gradients or the optimizer. Under ZeRO-3 DeepSpeed holds only the base, which has
# neither.
GRADIENT_KEYS = {
    "allgather_partitions", "allgather_bucket_size", "reduce_scatter", "reduce_bucket_size", "contiguous_gradients",
    "round_robin_gradients", "sub_group_size", "stage3_gather_16bit_weights_on_model_save",
}  # fmt: skip


def env_is_true(name: str) -> bool:
    """True if this environment variable is "true", as a launcher sets it."""
    return os.environ.get(name, "false").lower() == "true"


def read_deepspeed_config(config: TrainConfig, num_ranks: int) -> dict | None:
    """The DeepSpeed config of this run; None if it was not started with one. Raises UserError if it is not supported.

    It comes from `--deepspeed FILE.json` (the `deepspeed` launcher), or from the accelerate config: a file that this
    names, or its own fields.
    """
    by_accelerate = env_is_true("ACCELERATE_USE_DEEPSPEED")
    if not by_accelerate and config.deepspeed is None:
        return None
    source = "accelerate config deepspeed_config" if by_accelerate else f"--deepspeed {config.deepspeed}"
    if by_accelerate and config.deepspeed:
        raise UserError(
            f"--deepspeed {config.deepspeed}: the accelerate config already names a DeepSpeed config; "
            "leave one of them out"
        )
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{source}: deepspeed is not installed; pip install 'lora-dist[deepspeed]'")
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") if by_accelerate else config.deepspeed
    settings = (
        _accelerate_fields() if file == "none" else read_json(file, f"{source}: {file}" if by_accelerate else source)
    )
    _check(settings, config, num_ranks, source)
    return settings


def mixed_precision(settings: dict) -> str:
    """Returns "no", "bf16" or "fp16", as the JSON says; accelerate's precision if the JSON says "auto" or nothing."""
    asked = {name: settings[name].get("enabled") for name in ("bf16", "fp16") if name in settings}
    for name, enabled in asked.items():
        if enabled is True:
            return name
    if not asked or "auto" in asked.values():
        return os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return "no"


def keys_without_effect(settings: dict) -> list[str]:
    """Sorted keys of zero_optimization that are given but have no effect under ZeRO-3."""
    zero = settings["zero_optimization"]
    return sorted(zero.keys() & GRADIENT_KEYS) if zero["stage"] == 3 else []


def _accelerate_fields() -> dict:
    """The config from an accelerate config without a DeepSpeed file: `accelerate launch` passes its fields on."""
    stage = env_count("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2, setting="accelerate config deepspeed_config: zero_stage")
    zero = {"stage": stage}
    for key in ("offload_optimizer", "offload_param"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_{key.upper()}_DEVICE", "none")
        if device != "none":
            zero[key] = {"device": device}
    settings = {"zero_optimization": zero}
    for key in ("gradient_accumulation_steps", "gradient_clipping"):
        value = os.environ.get(f"ACCELERATE_{key.upper()}", "auto")
        with boundary(f"accelerate config deepspeed_config: {key} {value[:60]}", "must be a number, or auto"):
            settings[key] = value if value == "auto" else float(value)
    return settings


def _check(settings: dict, config: TrainConfig, num_ranks: int, source: str) -> None:
    """Raises UserError for the first setting that is not supported. `source`: where the settings come from."""
    _check_shapes(settings, source)
    _check_sections(settings, source)
    _check_batch(settings, config, num_ranks, source)
    _check_offload(settings["zero_optimization"], source)
    stage = settings["zero_optimization"]["stage"]
    if stage == 2 and mixed_precision(settings) == "fp16":
        why = "is not supported with stage 2, which has no loss scaling here; use bf16"
        raise _refused(source, "fp16", settings.get("fp16", "auto"), why)
    if num_ranks == 1 and config.deepspeed:
        why = f"ZeRO-{stage} needs 2 ranks or more; start them with deepspeed --num_gpus N, or leave --deepspeed out"
        raise UserError(f"{source}: {why}")
    if num_ranks == 1:
        raise UserError(
            f"accelerate config num_processes: 1: ZeRO-{stage} needs 2 ranks or more; "
            "use accelerate_configs/single.yaml, or --num_processes N"
        )


def _refused(source: str, key: str, value, why: str) -> UserError:
    return UserError(f"{source}: {key} {json.dumps(value)[:100]}: {why}")


def _check_shapes(settings: dict, source: str) -> None:
    """Raises UserError if a part that is looked into below is no JSON object, or a precision is no answer."""
    for path in OBJECTS:
        *parents, key = path.split(".")
        holder = settings.get(parents[0], {}) if parents else settings
        if not isinstance(holder.get(key, {}), dict):
            raise _refused(source, path, holder[key], "must be a JSON object, such as " + OBJECTS[path])
    for name in ("bf16", "fp16"):
        enabled = settings.get(name, {}).get("enabled", False)
        if type(enabled) is not bool and enabled != "auto":
            raise _refused(source, f"{name}.enabled", enabled, 'must be true, false or "auto"')


def _check_sections(settings: dict, source: str) -> None:
    stage = settings.get("zero_optimization", {}).get("stage")
    if type(stage) is not int or stage not in (2, 3):
        why = "must be 2 or 3; to train without sharding, use accelerate_configs/ddp.yaml"
        raise _refused(source, "zero_optimization.stage", stage, why)
    unknown = sorted(settings.keys() - SECTIONS)
    if unknown:
        why = "has no effect here, because flags or the training loop decide it; remove this section"
        raise UserError(f"{source}: {unknown[0]}: {why}")


def _check_batch(settings: dict, config: TrainConfig, num_ranks: int, source: str) -> None:
    """What the JSON says about batches and clipping must agree with the flags."""
    sequences, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    product = "--per_device_train_batch_size x --gradient_accumulation_steps x ranks"
    expected = {  # key: (value, where it comes from)
        "train_micro_batch_size_per_gpu": (sequences, "--per_device_train_batch_size"),
        "gradient_accumulation_steps": (accumulation, "--gradient_accumulation_steps"),
        "train_batch_size": (sequences * accumulation * num_ranks, product),
        "gradient_clipping": (config.max_grad_norm, "--max_grad_norm"),
    }
    for key, (value, flags) in expected.items():
        if settings.get(key, "auto") not in ("auto", value):
            raise _refused(source, key, settings[key], f'must be {value}, the value of {flags}, or "auto"')


def _check_offload(zero: dict, source: str) -> None:
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        why = "is not supported: the optimizer of the adapters takes only some MiB; offload the base with offload_param"
        raise _refused(source, "zero_optimization.offload_optimizer", zero["offload_optimizer"], why)
    device = zero.get("offload_param", {}).get("device", "none")
    if device != "none" and zero["stage"] != 3:
        raise _refused(source, "zero_optimization.offload_param", zero["offload_param"], "needs stage 3")
    if device not in ("none", "cpu"):
        why = "is not supported: DeepSpeed swaps all tensors in one dtype, which rounds quantized weights; use cpu"
        raise _refused(source, "zero_optimization.offload_param.device", device, why)
