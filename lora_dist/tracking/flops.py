"""How many floating-point operations a step needs, and how many a GPU can do per second.

A frozen weight costs 4 operations per token: 2 in forward and 2 for the gradient of its input, because it has no
gradient of its own. A trained weight costs 6. Attention costs 12 for each pair of positions and each channel of its
heads: two products in forward and four in backward. All pairs are counted, even those that a causal mask hides.
Padding is counted too, because it is computed. Embeddings are looked up and norms are small, so they are not counted.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from lora_dist.config import TrainConfig
from lora_dist.data.tasks import CLASSIFIER_HEADS, TASKS
from lora_dist.model.quantization import quantized_weights
from lora_dist.parallel.fsdp import decoder_layers

# (pattern of the device's name, bf16, fp16): dense peak of the tensor cores in TFLOP/s, from NVIDIA's and AMD's data
# sheets.
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
    """Peak of one GPU in TFLOP/s; None if it is not known, or if the precision is not bf16 or fp16."""
    for pattern, bf16, fp16 in PEAKS:
        if re.fullmatch(pattern, device_name):  # the full name, because a slice of a GPU (MIG) has a longer one
            return {"bf16": bf16, "fp16": fp16}.get(mixed_precision)
    return None


@dataclass(frozen=True)
class BaseWork:
    """Base weights used per token. In a layer with experts only those that a token is sent to count."""

    weights: float  # of all frozen matrices
    weights_in_layers: float  # of those in decoder layers, which are recomputed
    attention_channels: int  # heads x head size, summed over the layers
    recomputed: bool  # with gradient checkpointing


def base_work(skeleton: nn.Module, config: TrainConfig) -> BaseWork | None:
    """Count the weights of a base on meta, quantized or not.

    None for an encoder-decoder, because its source and target tokens pass through different layers.
    """
    if config.task_type == "SEQ_2_SEQ_LM":
        return None
    layers = decoder_layers(skeleton)
    replaced = {*(config.modules_to_save or ()), *(CLASSIFIER_HEADS if TASKS[config.task_type].has_classes else ())}
    model_config = skeleton.config.get_text_config()
    heads = getattr(model_config, "num_attention_heads", 0)
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // max(heads, 1)
    num_experts = getattr(model_config, "num_experts_per_tok", None) or 1
    return BaseWork(
        weights=_frozen_weights([skeleton], replaced, num_experts),
        weights_in_layers=_frozen_weights(layers, replaced, num_experts),
        attention_channels=heads * head_dim * len(layers),
        recomputed=config.gradient_checkpointing,
    )


def _frozen_weights(roots: Iterable[nn.Module], replaced: set[str], num_experts: int) -> float:
    """Number of weights in the matrices that a token is multiplied with.

    `replaced`: names of modules that are trained whole instead. `num_experts`: how many experts of a stack (E, O, I) a
    token is sent to.
    """
    total = 0.0
    for name, module in (pair for root in roots for pair in root.named_modules()):
        if isinstance(module, nn.Embedding) or name.rpartition(".")[2] in replaced:
            continue
        quantized = quantized_weights(module)
        part_names = {part_name for weight in quantized.values() for part_name in weight.part_names}
        shapes = [weight.shape for weight in quantized.values()]
        shapes += [p.shape for param_name, p in module.named_parameters(recurse=False) if param_name not in part_names]
        for shape in shapes:
            total += math.prod(shape) * (num_experts / shape[0] if len(shape) == 3 else len(shape) == 2)
    return total


@dataclass(frozen=True)
class StepWork:
    """Floating-point operations of a step on all ranks."""

    needed: float
    recomputed: float  # in addition, by gradient checkpointing


def step_work(base: BaseWork, num_trained_weights: int, num_positions: float, num_pairs: float) -> StepWork:
    """Operations of a step. `num_trained_weights`: weights in trained matrices. `num_positions`: with padding.

    `num_pairs`: the sum of T x T over the rows, each of T positions.
    """
    attention = num_pairs * base.attention_channels
    needed = num_positions * (4 * base.weights + 6 * num_trained_weights) + 12 * attention
    recomputed = num_positions * 2 * (base.weights_in_layers + num_trained_weights) + 4 * attention
    return StepWork(needed, recomputed if base.recomputed else 0.0)
