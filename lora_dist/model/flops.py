"""How many floating-point operations a step needs, and how many a GPU could do.

A frozen weight costs 4 operations a token: 2 in forward, 2 for the gradient of its input; no gradient of its own. A
trained one costs 6. Attention costs 12 for each pair of positions and each channel of its heads: two products in
forward, four in backward; all pairs are counted, also those that a causal mask hides. Positions that are padding
count, as they are computed. Embeddings are looked up, norms are small: neither counts.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lora_dist.config import TrainConfig
from lora_dist.data.tasks import CLASSIFIERS, TASKS
from lora_dist.model.quantization import packed_weights
from lora_dist.parallel.fsdp import decoder_layers

# Dense peak of the tensor cores in TFLOP/s, by NVIDIA's and AMD's data sheets: (name of the device, bf16, fp16).
PEAKS = (
    (r"NVIDIA (GB200|GB300)", 2500, 2500),
    (r"NVIDIA (B200|B300.*)", 2250, 2250),
    (r"NVIDIA (H100 80GB HBM3|H200|H800|GH200 (120GB|480GB))", 989.5, 989.5),
    (r"NVIDIA H100 NVL", 835.5, 835.5),
    (r"NVIDIA (H100|H800) PCIe", 756, 756),
    (r"NVIDIA H20", 148, 148),
    (r"NVIDIA A(100|800)(-SXM4-[48]0GB|-PCIE-40GB| 80GB PCIe)", 312, 312),
    (r"NVIDIA L40S", 362, 362),
    (r"NVIDIA L40", 181, 181),
    (r"NVIDIA L4", 121, 121),
    (r"NVIDIA A40", 149.7, 149.7),
    (r"NVIDIA A10", 125, 125),
    (r"NVIDIA RTX A6000", 154.8, 154.8),
    (r"NVIDIA GeForce RTX 4090", 165.2, 165.2),
    (r"NVIDIA GeForce RTX 3090", 71, 71),
    (r"Tesla V100-SXM[23]-(16|32)GB.*", None, 125),
    (r"Tesla V100-PCIE-(16|32)GB", None, 112),
    (r"Tesla T4", None, 65),
    (r"AMD Instinct MI300X.*", 1307, 1307),
)


def peak_tflops(device_name: str, mixed_precision: str) -> float | None:
    """Of one GPU; None where it is not known, or the precision is not one of 16 bits."""
    for pattern, bf16, fp16 in PEAKS:
        if re.fullmatch(pattern, device_name):  # whole: a slice of a GPU (MIG) has a name of its own
            return {"bf16": bf16, "fp16": fp16}.get(mixed_precision)
    return None


@dataclass(frozen=True)
class BaseWork:
    """What of the base takes part in the work of a token: weights, experts by those that are chosen."""

    weights: float  # of all frozen matrices
    weights_in_layers: float  # of those, in the layers that are recomputed
    attention_channels: int  # heads x head size, summed over the layers
    recomputed: bool


def base_work(skeleton: nn.Module, config: TrainConfig) -> BaseWork | None:
    """Of a base, packed or not, on meta. None for an encoder and decoder, whose tokens differ in what they pass."""
    if config.task_type == "SEQ_2_SEQ_LM":
        return None
    layers = decoder_layers(skeleton)
    replaced = {*(config.modules_to_save or ()), *(CLASSIFIERS if TASKS[config.task_type].has_classes else ())}
    model_config = skeleton.config.get_text_config()
    heads = getattr(model_config, "num_attention_heads", 0)
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // max(heads, 1)
    chosen = getattr(model_config, "num_experts_per_tok", None) or 1
    return BaseWork(
        weights=_frozen_weights([skeleton], replaced, chosen),
        weights_in_layers=_frozen_weights(layers, replaced, chosen),
        attention_channels=heads * head_dim * len(layers),
        recomputed=config.gradient_checkpointing,
    )


def _frozen_weights(roots: Iterable[nn.Module], replaced: set[str], chosen: int) -> float:
    """Of the matrices a token is multiplied with; of stacked experts (E, ., .) the `chosen` ones."""
    total = 0.0
    for name, module in (pair for root in roots for pair in root.named_modules()):
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in replaced:
            continue
        packed = packed_weights(module)
        parts = {part for weight in packed.values() for part in weight.names}
        shapes = [weight.shape for weight in packed.values()]
        shapes += [param.shape for part, param in module.named_parameters(recurse=False) if part not in parts]
        for shape in shapes:
            total += math.prod(shape) * (chosen / shape[0] if len(shape) == 3 else len(shape) == 2)
    return total


@dataclass(frozen=True)
class StepWork:
    """Operations of a step on all ranks: what it needs, and what is done again on top."""

    needed: float
    recomputed: float


def step_work(base: BaseWork, num_trained_weights: int, num_positions: float, num_pairs: float) -> StepWork:
    """`num_trained_weights`: of the trained matrices. `num_pairs`: the sum of T x T over the rows, T positions each."""
    attention = num_pairs * base.attention_channels
    needed = num_positions * (4 * base.weights + 6 * num_trained_weights) + 12 * attention
    again = num_positions * 2 * (base.weights_in_layers + num_trained_weights) + 4 * attention
    return StepWork(needed, again if base.recomputed else 0.0)
