"""The number of operations equals what torch counts on plain transformers + PEFT; and the table of peaks."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from lora_dist.config import TrainConfig
from lora_dist.embedded import EMBEDDED
from lora_dist.model.adapters import trainable_parameters
from lora_dist.model.load import meta_model
from lora_dist.tracking.flops import base_work, peak_tflops, step_work
from tests.helpers.families import make_checkpoint

B, T = 2, 48


def counted(path, *, checkpointing: bool) -> tuple[int, int]:
    """(operations of one forward and backward as torch counts them, number of trained weights)."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    if model.config.model_type == "mixtral":
        model.set_experts_implementation("batched_mm")
    targets = ["c_attn"] if model.config.model_type == "gpt2" else ["q_proj", "v_proj"]
    lora = LoraConfig(r=8, target_modules=targets, fan_in_fan_out="c_attn" in targets, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora).train()
    model.enable_input_require_grads()  # or the first layer's q, k and v would need no gradient of their input
    if checkpointing:
        model.base_model.model.activation_checkpointing_enable()
    ids = torch.randint(3, 120, (B, T))
    # torch stops the recomputation before a last product whose result is not saved. A quantized linear is recomputed.
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops(), sum(p.numel() for p in trainable_parameters(model).values())


@pytest.mark.parametrize("family", ["opt", "llama", "llama_tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_operations_are_those_that_torch_counts(config, tmp_path, family, checkpointing):
    path = make_checkpoint(family, tmp_path, torch.float32)
    total, trained = counted(path, checkpointing=checkpointing)
    config = dataclasses.replace(config, gradient_checkpointing=checkpointing)
    for quantization in ("none", "int8"):
        base = base_work(meta_model(str(path), quantization, torch.float32), config)
        work = step_work(base, trained, num_positions=B * T, num_pairs=B * T * T)
        assert work.needed + work.recomputed == total
        assert (work.recomputed > 0) == checkpointing


def test_a_head_that_is_trained_whole_costs_6_and_not_4(config):
    skeleton = meta_model(EMBEDDED, "none", torch.float32)
    head = skeleton.get_output_embeddings().weight.numel()
    base = base_work(skeleton, config)
    trained_head = base_work(skeleton, dataclasses.replace(config, modules_to_save=["lm_head"]))
    assert base.weights - trained_head.weights == head
    more = step_work(trained_head, head, 1, 0).needed - step_work(base, 0, 1, 0).needed
    assert more == 2 * head


def test_opt_6_7b_is_about_4_n():
    config = OPTConfig(
        hidden_size=4096, ffn_dim=16384, num_hidden_layers=32, num_attention_heads=32, word_embed_proj_dim=4096
    )
    with torch.device("meta"):
        skeleton = OPTForCausalLM(config)
    base = base_work(skeleton, TrainConfig())
    assert base.weights == pytest.approx(6.65e9, rel=0.005) and base.attention_channels == 32 * 4096
    assert step_work(base, 0, 1, 0).needed == 4 * base.weights


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA H200", "fp16", 989.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100 80GB PCIe", "bf16", 312),
        ("NVIDIA L40S", "bf16", 362),
        ("NVIDIA L4", "bf16", 121),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),  # its tensor cores have no bf16
        ("NVIDIA H100 80GB HBM3", "no", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA A1000", "bf16", None),
        ("NVIDIA X900", "bf16", None),
    ],
)
def test_a_peak_is_known_or_none(device, precision, peak):
    assert peak_tflops(device, precision) == peak
