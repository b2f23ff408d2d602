"""References for the sharded base: bitsandbytes and PEFT on one process, and trajectories that are checked in."""

import json
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as F
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

from lora_dist.data.micro_batches import MicroBatch, collate
from lora_dist.data.rows import Rows
from lora_dist.data.tasks import CAUSAL_LM
from lora_dist.embedded import BASE_DIR
from lora_dist.model.adapters import is_trained_parameter, trainable_parameters
from lora_dist.model.load import BaseOptions, load_with
from lora_dist.model.quantize_model import keep_norms_in_fp32
from lora_dist.parallel.strategies import Placement

CPU = torch.device("cpu")


def load_unsharded(quantization: str, dtype: torch.dtype, path=BASE_DIR, device=CPU, num_labels: int | None = None):
    """The base as transformers and bitsandbytes load it, without our code. `num_labels`: of a sequence classifier."""
    cls = AutoModelForSequenceClassification if num_labels else AutoModelForCausalLM
    settings = {} if quantization == "none" else {"experts_implementation": "eager"}
    settings |= {"num_labels": num_labels} if num_labels else {}
    model = cls.from_pretrained(
        path, dtype=dtype, device_map={"": device}, quantization_config=bitsandbytes_config(quantization, dtype),
        **settings,
    )  # fmt: skip
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if (
                param.dim() == 3 and quantization != "none"
            ):  # experts, which transformers' integration does not quantize
                setattr(module, name, torch.nn.Parameter(there_and_back(param.data, quantization), requires_grad=False))
    keep_norms_in_fp32(model)
    for name, param in cls.from_pretrained(path, dtype=torch.float32).named_parameters():
        # Norms as in the checkpoint, not rounded to `dtype` on the way.
        if param.dim() == 1 and model.get_parameter(name).dtype == torch.float32:
            model.get_parameter(name).data = param.data.to(device)
    return model


def bitsandbytes_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization == "none":
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=quantization == "nf4",
        bnb_4bit_compute_dtype=dtype,  # the default is fp32; our linear computes in the dtype of its input
    )  # fmt: skip


def there_and_back(experts: torch.Tensor, quantization: str) -> torch.Tensor:
    """Experts (E, O, I), quantized all at once with bitsandbytes' public functions, and dequantized."""
    if quantization == "int8":
        codes, scale, _ = F.int8_vectorwise_quant(experts.half().flatten(0, 1))
        return (codes.to(experts.dtype) * scale.unsqueeze(1).mul(1.0 / 127.0)).to(experts.dtype).view(experts.shape)
    codes, state = F.quantize_4bit(experts, quant_type="nf4", compress_statistics=quantization == "nf4")
    return F.dequantize_4bit(codes, state)


def rows_of(ids: list[list[int]]) -> Rows:
    """Rows in which every token is trained."""
    return Rows.of([(row, row) for row in ids])


def batch_of(ids: list[list[int]], pad_token_id: int = 1) -> MicroBatch:
    return collate([{"input_ids": row, "labels": row} for row in ids], pad_token_id)


def loss_and_gradients(model, device=CPU):
    """(loss, {name: gradient}) of one batch of rows of different lengths, with dropout, at a fixed seed."""
    rows = [list(range(5, 5 + n)) for n in (30, 12, 21)]
    batch = batch_of(rows, pad_token_id=1).to(device)
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits
    loss = CAUSAL_LM.summed_loss(logits, batch.labels_BL)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainable_parameters(model).items()}


def randomize(model):
    """Set the adapters. lora_A gets no gradient while lora_B is zero, and PEFT rounds it on a 4-bit base."""
    for index, param in enumerate(trainable_parameters(model).values()):
        param.data.copy_(torch.randn(param.shape, generator=torch.Generator().manual_seed(index)) * 0.02)


def load_sharded(quantization: str, dtype: torch.dtype = torch.float32, path="embedded", config=None, **placement):
    """Our base, sharded over all ranks unless `placement` says otherwise."""
    placement = {"shard_ranks": dist.get_world_size() if dist.is_initialized() else 1} | placement
    return load_placed(Placement(**placement), quantization, dtype, path, config)


def load_placed(placement: Placement, quantization: str, dtype: torch.dtype, path="embedded", config=None):
    """Our base on the CPU. `config`: decides which of its parameters will be trained."""
    trained = {"will_be_trained": partial(is_trained_parameter, config)} if config else {}
    return load_with(str(path), BaseOptions(quantization, dtype, CPU, placement, **trained))


def zero(stage: int, offload: bool = False, **zero_optimization) -> dict:
    """A DeepSpeed config as the launcher passes it on."""
    if offload:
        zero_optimization["offload_param"] = {"device": "cpu"}
    return {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage, **zero_optimization}}


TRAJECTORIES = Path(__file__).parents[1] / "trajectories.json"
# Relative differences on other processors, whose kernels round differently; measured in docs/exactness.md.
BOUNDS = {"no": 1e-5, "bf16": 5e-2}


def environment() -> dict[str, str]:
    """Everything that the bits of a run on a CPU depend on."""
    model = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name"))
    packages = {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    return packages | {"cpu": model.split(":")[1].strip(), "kernels": torch.backends.cpu.get_cpu_capability()}


def assert_as_checked_in(name: str, trajectory: list) -> None:
    """Compare with `trajectories.json`: bit for bit in the environment that it was made in, otherwise within BOUNDS.

    `name` ends in the precision. With WRITE_TRAJECTORIES set, the file is written instead.
    """
    file = json.loads(TRAJECTORIES.read_text()) if TRAJECTORIES.exists() else {}
    if os.environ.get("WRITE_TRAJECTORIES"):
        file |= {"environment": environment(), name: trajectory}
        TRAJECTORIES.write_text(json.dumps(file, indent=1) + "\n")
    expected = file[name]
    if file["environment"] == environment():
        assert trajectory == expected
    else:
        pairs = zip(flat(trajectory), flat(expected), strict=True)
        bound = BOUNDS[name.split()[-1]]
        assert [(mine, theirs) for mine, theirs in pairs if abs(mine - theirs) > bound * abs(theirs)] == []


def flat(trajectory: list) -> list[float]:
    return [number for entry in trajectory for number in (entry if isinstance(entry, list) else [entry])]
