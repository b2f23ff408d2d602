"""The adapters: added to the base after it is sharded, plain fp32 tensors, the same bytes on every rank."""

import contextlib
import hashlib
import json
from itertools import accumulate
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lora_dist.config import TrainConfig
from lora_dist.data.micro_batches import MicroBatch, model_inputs
from lora_dist.data.tasks import CLASSIFIERS, TASKS
from lora_dist.errors import RunFailed, UserError, require
from lora_dist.files import write_whole
from lora_dist.model.quantization import FrozenLinear, packed_weights
from lora_dist.parallel.fsdp import release
from lora_dist.parallel.ranks import gather
from lora_dist.parallel.zero import is_partitioned, whole_shape
from lora_dist.seeds import random_key

# In a model with experts PEFT takes these for the experts' stacked weights, and wraps those: not once they are packed.
EXPERT_NAMES = {"gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def linear_names(model: nn.Module) -> list[str]:
    """Last name of every linear layer that can get an adapter, as `--lora_target_modules` takes them.

    Not the head; and in a model with experts not the names that PEFT takes for experts.
    """
    names = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, FrozenLinear, Conv1D))
    }
    has_experts = any(param.dim() == 3 for param in model.parameters())
    return sorted(names - {"lm_head", "embed_out"} - (EXPERT_NAMES if has_experts else set()))


def check_targets(model: PreTrainedModel, config: TrainConfig) -> None:
    """Raises UserError where a module to adapt or to train whole is not in the model, or cannot be."""
    targets, names = config.lora_target_modules, linear_names(model)
    for target in targets:
        if target not in names and targets != ["all-linear"]:
            raise UserError(
                f"--lora_target_modules {target}: no such linear layer in {config.model_name_or_path}; "
                f"it has {' '.join(names)}, or give all-linear"
            )
    heads = {model.get_input_embeddings(), model.get_output_embeddings()}
    for wanted in config.modules_to_save or ():
        found = [module for name, module in model.named_modules() if name.endswith(wanted)]
        example = " ".join(name.rpartition(".")[2] for name, module in model.named_modules() if module in heads)
        require(found, "modules_to_save", wanted, f"no such module; e.g. {example}")
        is_packed = any(packed_weights(m) for module in found for m in module.modules())
        require(not is_packed, "modules_to_save", wanted, "is quantized, and only the unquantized can be trained whole")
        tied = model.config.tie_word_embeddings and not heads.isdisjoint(found)
        require(not tied, "modules_to_save", wanted, "is tied to another, which would stay as it is")


def is_trained(config: TrainConfig, name: str) -> bool:
    """Whether a parameter of the base, by its name, may be trained: such is kept whole on every rank."""
    modules = list(accumulate(name.split(".")[:-1], lambda path, step: f"{path}.{step}"))
    wanted = [*(config.modules_to_save or ()), *(CLASSIFIERS if TASKS[config.task_type].has_classes else ())]
    saved = any(path.endswith(module) for path in modules for module in wanted)  # PEFT's rule
    return saved or (config.lora_bias != "none" and name.endswith("bias"))


def add_adapters(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """LoRA on the target modules, initialised from `--seed` alone, with gradient checkpointing if asked for."""
    targets = config.lora_target_modules
    lora = LoraConfig(
        task_type=config.task_type, r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules=linear_names(model) if targets == ["all-linear"] else targets, bias=config.lora_bias,
        use_rslora=config.use_rslora, use_dora=config.use_dora, modules_to_save=config.modules_to_save,
    )  # fmt: skip
    torch.manual_seed(random_key(config.seed, "adapters") % 2**32)
    for name in vars(model).get("new_parameters", ()):  # a head that the checkpoint lacks
        param = model.get_parameter(name)
        param.data.normal_(std=0.02) if param.dim() > 1 else param.data.zero_()
    peft_model = get_peft_model(model, lora)
    for param in trainable_parameters(peft_model).values():  # copies of modules to save are in the base's 16 bits
        param.data = param.data.float()
    if config.gradient_checkpointing:
        # Non-reentrant: the inputs of a frozen layer need no gradient, which the reentrant form would require.
        how = {"use_reentrant": False}
        if is_partitioned(model):  # it would look at the weights' shapes when DeepSpeed has freed them again
            how["determinism_check"] = "none"
        model.activation_checkpointing_enable(how)
    return peft_model


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters, counting the weights of a packed layer and not the numbers that encode them."""
    packed = [(module, p) for module in model.modules() for p in packed_weights(module).values()]
    parts = {id(part) for module, p in packed for part in p.parts(module)}
    total = sum(torch.Size(p.shape).numel() for _, p in packed)
    total += sum(whole_shape(param).numel() for param in model.parameters() if id(param) not in parts)
    return sum(param.numel() for param in trainable_parameters(model).values()), total


def fingerprint(model: nn.Module) -> bytes:
    """sha256 of all adapter parameters: names, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, param in trainable_parameters(model).items():
        digest.update(f"{name} {param.dtype} {tuple(param.shape)}".encode())
        digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def check_identical(model: nn.Module) -> str:
    """The adapters' sha256, in hex. Raises RuntimeError where ranks hold different adapters. Collective."""
    own = fingerprint(model)
    digests = gather(own)
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if odd:
        raise RuntimeError(f"the adapters of ranks {odd} differ from rank 0's")
    return own.hex()


def save_adapter(model: PeftModel, tokenizer, folder: Path, params: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter in PEFT's format, with the tokenizer. Rank 0 only.

    `params`: the trainable parameters by name, where it is not those in the model.
    """
    # No embedding is trained unasked; left to find that out, PEFT would ask the hub for the base's vocabulary.
    model.save_pretrained(folder, state_dict=params, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    if TASKS[model.peft_config["default"].task_type].has_classes:  # PEFT does not keep the base's config
        write_whole(folder / "labels.json", json.dumps(list(model.config.id2label.values())) + "\n")


def verify_adapter(model: PeftModel, folder: Path, probe: MicroBatch, *, autocast=contextlib.nullcontext) -> None:
    """Read a saved adapter back and raise RuntimeError unless it is the one in `model`. Collective: it runs the base.

    Checks that no key is missing or extra, that every tensor has the bytes in memory, that `lora_B` is not all zero
    (RunFailed), and that PEFT, loading the folder beside the live adapter, computes the same logits.
    """
    saved, expected = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    if saved.keys() != expected.keys():
        raise RuntimeError(f"{folder}: keys differ from the model's: {sorted(saved.keys() ^ expected.keys())[:4]}")
    changed = [name for name, tensor in saved.items() if not torch.equal(tensor, expected[name].cpu())]
    if changed:
        raise RuntimeError(f"{folder}: bytes differ from the model's in {changed[:4]}")
    if not any(tensor.any() for name, tensor in saved.items() if "lora_B" in name):
        raise RunFailed("the adapter is dead: every lora_B is zero, so nothing was trained; see --learning_rate")
    live = probe_logits(model, probe, autocast)
    if model.peft_config["default"].bias != "none":  # PEFT has no second adapter then: load it over the live one
        for param in trainable_parameters(model).values():
            param.data.zero_()
        set_peft_model_state_dict(model, saved)
        reloaded = probe_logits(model, probe, autocast)
    else:
        reloaded = _logits_of_second_adapter(model, folder, probe, autocast)
    if not torch.equal(live, reloaded):
        raise RuntimeError(f"{folder}: PEFT loads it to other logits, by up to {(live - reloaded).abs().max():.3g}")


def _logits_of_second_adapter(model: PeftModel, folder: Path, probe: MicroBatch, autocast) -> torch.Tensor:
    model.load_adapter(str(folder), "reloaded")
    try:
        model.set_adapter("reloaded")
        return probe_logits(model, probe, autocast)
    finally:
        model.set_adapter("default")
        model.delete_adapter("reloaded")


@torch.no_grad()
def probe_logits(model: nn.Module, probe: MicroBatch, autocast) -> torch.Tensor:
    """Logits without dropout. Collective. Each under its own `autocast`: one keeps the casts of what it has seen."""
    training = model.training
    model.eval()
    with autocast():
        logits = model(**model_inputs(model, probe), use_cache=False).logits
    model.train(training)
    release(model)
    return logits
