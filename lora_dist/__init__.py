"""LoRA on a quantized base that is sharded over the GPUs, identical at any number of ranks."""

import importlib
import logging
import warnings

__version__ = "0.1.0"

# Public name to the module that holds it. They are imported at their first use: `import lora_dist` imports no torch.
_MODULE_OF = {
    "TrainConfig": "config",
    "UserError": "errors",
    "run_recipe": "entry",
    "load_base": "library",
    "open_run": "training.session",
    "train": "training.loop",
    "finish": "training.loop",
    "predict": "training.evaluation",
    "held_out_labels": "training.evaluation",
    "f1_scores": "training.evaluation",
}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'lora_dist' has no attribute '{name}'")
    value = globals()[name] = getattr(importlib.import_module(f"lora_dist.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# Warnings of other packages that no user can act on. bitsandbytes asks on import for a CPU kernel from the hub; PEFT
# reads a deprecated attribute of transformers; DeepSpeed calls a deprecated function of torch; FSDP2 warns about writes
# in place to a layer's output, which do not happen here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="`torch.distributed.all_gather_into_tensor`", category=FutureWarning)
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
