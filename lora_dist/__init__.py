"""LoRA on a quantized base that is sharded over the GPUs, identical at any number of ranks."""

import logging
import warnings

__version__ = "0.1.0"

# Upstream noise that no user can act on. bitsandbytes asks on import for a CPU kernel from the hub; PEFT reads a
# deprecated attribute of transformers, DeepSpeed calls a deprecated function of torch; FSDP2 warns of in-place writes
# to a layer's output, of which we make none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
warnings.filterwarnings("ignore", message="`torch.distributed.all_gather_into_tensor`", category=FutureWarning)
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
