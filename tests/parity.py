"""What the sharded base is compared with: bitsandbytes and PEFT on one process."""

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from lora_dist.adapters import trainable_parameters
from lora_dist.data import collate
from lora_dist.embedded import BASE_DIR
from lora_dist.train import summed_loss

CPU = torch.device("cpu")


def load_unsharded(quantization: str, dtype: torch.dtype, path=BASE_DIR):
    """What transformers and bitsandbytes make of a base, without our code."""
    bitsandbytes = {
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,  # its default is fp32; ours computes in the dtype of the input
        ),
        "none": None,
    }[quantization]
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map={"": CPU}, quantization_config=bitsandbytes
    )


def loss_and_gradients(model):
    """One training step's worth on a ragged batch, with dropout on, at a fixed seed."""
    rows = [list(range(5, 5 + n)) for n in (30, 12, 21)]
    batch = collate(rows, pad_token_id=1)
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(7)
    logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits
    loss = summed_loss(logits, batch.labels_BT)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in trainable_parameters(model).items()}


def randomize(model):
    """Give lora_A a gradient, which it lacks where lora_B is zero, and undo PEFT's rounding of 4-bit bases' lora_A."""
    for index, param in enumerate(trainable_parameters(model).values()):
        param.data.normal_(std=0.02, generator=torch.Generator().manual_seed(index))
