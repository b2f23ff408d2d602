"""The adapters: plain fp32 tensors, added to the base after it is sharded, with the same bytes on every rank."""

import contextlib
import hashlib
import json
import math
import os
import re
import sys
from itertools import accumulate
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import _check_lora_target_modules_mamba
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.transformers_weight_conversion import _MOE_TARGET_MODULE_MAPPING
from safetensors.torch import load_file
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN
from transformers.pytorch_utils import Conv1D

from lora_dist.boundary import boundary, ends_within, read_json
from lora_dist.config import TrainConfig
from lora_dist.data.micro_batches import MicroBatch, model_inputs
from lora_dist.data.tasks import CLASSIFIER_HEADS, TASKS
from lora_dist.errors import RunFailed, UserError, in_one_line, require
from lora_dist.files import write_whole
from lora_dist.model.files.configs import load_generation_config, load_model_config
from lora_dist.model.files.lazy_weights import open_checkpoint, read_safetensors_header
from lora_dist.model.load import BaseOptions, check_weights, original_name
from lora_dist.model.quantization import FrozenLinear, quantized_weights
from lora_dist.parallel.fsdp import release
from lora_dist.parallel.ranks import gather
from lora_dist.parallel.strategies import Placement
from lora_dist.parallel.zero import is_partitioned, whole_shape
from lora_dist.seeds import random_key

MAX_MATCH_S = 5  # of one pattern with the names of all modules
LINEARS = (nn.Linear, FrozenLinear, Conv1D)


def check_adapter(folder: Path) -> None:
    """Raises UserError unless an adapter folder and its base can be read, and name no code to be imported."""
    what = f"--adapter {folder}"
    config = read_json(folder / "adapter_config.json", f"{what}: adapter_config.json")
    for key in ("auto_mapping", "megatron_config"):  # PEFT imports the modules that these name
        if config.get(key):
            raise UserError(f"{what}: adapter_config.json: {key} {config[key]} names code, which is never run")
    _read_names(folder, what)
    _check_initialization(config, what)
    alpha = config.get("lora_alpha", 1)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UserError(f"{what}: adapter_config.json: lora_alpha {alpha} is no number")
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{what}: adapter_config.json: base_model_name_or_path {base!r} names no base model")
    base_config = load_model_config(base)
    load_generation_config(base)
    names = [key.removesuffix(".weight") for key in open_checkpoint(base)]
    for pattern in _patterns(config):
        if not ends_within(MAX_MATCH_S, lambda p=pattern: [re.fullmatch(p, name) for name in names]):
            raise UserError(f"{what}: adapter_config.json: the pattern {pattern[:60]!r} did not end in {MAX_MATCH_S} s")
    if config.get("task_type") == "CAUSAL_LM" and not getattr(base_config, "quantization_config", None):
        check_weights(base, BaseOptions("none", torch.float32, torch.device("cpu"), Placement()))


def _patterns(config: dict) -> list[str]:
    """The regular expressions of an adapter_config.json, which PEFT matches with the names of modules."""
    found = [config.get(key) for key in ("target_modules", "exclude_modules")]
    of_ranks = [config.get(key) for key in ("rank_pattern", "alpha_pattern")]
    found += [pattern for patterns in of_ranks if isinstance(patterns, dict) for pattern in patterns]
    return [pattern for pattern in found if isinstance(pattern, str)]


def _read_names(folder: Path, what: str) -> list[str]:
    """The names of an adapter's tensors. Raises UserError if its file is damaged or not there."""
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{what}: holds no file {weights.name}")
    with boundary(f"{what}: {weights.name}"):
        return list(read_safetensors_header(weights)[0])


def _check_initialization(config: dict, what: str) -> None:
    """Raises UserError for an adapter that PEFT made by taking a part out of the base's weights."""
    if (init := config.get("init_lora_weights")) not in BASE_IS_KEPT:
        hint = "convert it to plain LoRA, see PEFT's path_initial_model_for_weight_conversion"
        raise UserError(f"{what}: init_lora_weights {init!r} changed its base model; {hint}")


def check_loaded_adapter(model: PeftModel, folder: Path) -> None:
    """Raises UserError unless PEFT loaded all tensors of an adapter folder, and all numbers of the model are finite."""
    with boundary(f"--adapter {folder}", "give a folder that save_pretrained of PEFT wrote"):
        saved = load_file(folder / "adapter_model.safetensors")
        loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
        if others := sorted(saved.keys() ^ loaded.keys()):
            raise ValueError(f"adapter_model.safetensors lacks, or has besides those of the model, {others[0]}")
        for name, param in model.named_parameters():
            if param.is_floating_point() and param.numel() and not all(map(math.isfinite, param.detach().aminmax())):
                raise ValueError(f"{name} holds NaN or infinite numbers")


def linear_names(model: nn.Module) -> list[str]:
    """Last name of every linear layer that can get an adapter: the valid values of `--lora_target_modules`.

    Left out are the head and what PEFT does not adapt in a model of this kind.
    """
    modules = [(name.rpartition(".")[2], isinstance(module, LINEARS)) for name, module in model.named_modules()]
    names = {name for name, is_linear in modules if is_linear} - {name for name, is_linear in modules if not is_linear}
    # PEFT takes these names for the experts' stacked parameter and wraps it, which is impossible once it is quantized.
    pattern = _MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    of_experts = _MOE_TARGET_MODULE_MAPPING.get(pattern, {}).keys()
    return sorted(name for name in names - {"lm_head", "embed_out"} - of_experts if _peft_allows(model, name))


def _peft_allows(model: nn.Module, name: str) -> bool:
    """False for a layer that Mamba's kernels use without calling it, so an adapter on it would do nothing."""
    try:
        _check_lora_target_modules_mamba(LoraConfig(), model, name)
    except ValueError:
        return False
    return True


def describe_adapted(model: PeftModel) -> str:
    """How many linear layers have an adapter, and the names of those that have none. One line."""
    adapted, without = 0, set()
    for name, module in model.named_modules():
        *path, last = name.split(".")
        if any(part.startswith("lora_") or part == "modules_to_save" for part in (*path, last)):
            continue
        if isinstance(module, LINEARS) and last == "base_layer":
            adapted += 1
        elif isinstance(module, LINEARS):
            without.add((path[-1] if last == "original_module" else last, name))
        elif not isinstance(module, _ConvNd):  # experts, stacked
            weights = quantized_weights(module) or dict(module.named_parameters(recurse=False))
            without |= {(f"{last}.{key}", f"{name}.{key}") for key, w in weights.items() if len(w.shape) == 3}
    kinds = ", ".join(sorted({kind for kind, _ in without})) or "none"
    return f"adapters: on {adapted} of {adapted + len(without)} linear layers; without one: {kinds}"


def check_targets(model: PreTrainedModel, config: TrainConfig) -> None:
    """Raises UserError if the model lacks a module to adapt or to train whole, or if that module does not allow it."""
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
        is_quantized = any(quantized_weights(m) for module in found for m in module.modules())
        why = "is quantized; only modules that are not quantized can be trained whole"
        require(not is_quantized, "modules_to_save", wanted, why)
        tied = model.config.tie_word_embeddings and not heads.isdisjoint(found)
        why = "is tied to another module, which would keep the old weight, so it cannot be trained whole"
        require(not tied, "modules_to_save", wanted, why)


def is_trained_parameter(config: TrainConfig, name: str) -> bool:
    """True if the base's parameter of this name will be trained. It is then not sharded."""
    return trains_parameter(
        name, config.modules_to_save or [], has_classes=TASKS[config.task_type].has_classes,
        biases=config.lora_bias != "none",
    )  # fmt: skip


def trains_parameter(name: str, modules_to_save: list[str], *, has_classes: bool, biases: bool) -> bool:
    """True if PEFT trains this parameter of a base whole. `has_classes`: the base is a classifier, with a head."""
    modules = list(accumulate(name.split(".")[:-1], lambda path, step: f"{path}.{step}"))
    wanted = [*modules_to_save, *(CLASSIFIER_HEADS if has_classes else ())]
    saved = any(path.endswith(module) for path in modules for module in wanted)  # PEFT's rule
    return saved or (biases and name.endswith("bias"))


def add_adapters(model: PreTrainedModel, config: TrainConfig) -> PeftModel:
    """Add LoRA to the target modules, initialised from `--seed` alone, and turn on gradient checkpointing if asked."""
    targets = config.lora_target_modules
    lora = LoraConfig(
        task_type=config.task_type, r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules=linear_names(model) if targets == ["all-linear"] else targets, bias=config.lora_bias,
        use_rslora=config.use_rslora, use_dora=config.use_dora, modules_to_save=config.modules_to_save,
    )  # fmt: skip
    torch.manual_seed(random_key(config.seed, "adapters") % 2**32)
    for name in vars(model).get("new_parameters", ()):  # a classifier's head that the checkpoint lacks
        param = model.get_parameter(name)
        param.data.normal_(std=0.02) if param.dim() > 1 else param.data.zero_()
    peft_model = get_peft_model(model, lora)
    for param in trainable_parameters(peft_model).values():  # PEFT copies modules to save in the base's 16 bits
        param.data = param.data.float()
    if config.gradient_checkpointing:
        # Reentrant checkpointing would require a gradient for the input of a frozen layer.
        options = {"use_reentrant": False}
        if is_partitioned(model):  # the check would compare shapes of weights that DeepSpeed has freed again
            options["determinism_check"] = "none"
        model.activation_checkpointing_enable(options)
    return peft_model


SAME_IN_ADAPTER = ("r", "lora_alpha", "use_rslora", "use_dora", "bias")  # besides the modules; LoraConfig's names
# LoraConfig's entries that do not change what trained weights compute, or that the names of the weights show.
FREE_IN_ADAPTER = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "target_parameters", "ensure_weight_tying",
)  # fmt: skip
BASE_IS_KEPT = (True, False, None, "gaussian", "eva", "orthogonal")  # init_lora_weights; others subtract from the base


def check_first_adapter(config: TrainConfig, setting: str = "adapter_name_or_path") -> None:
    """Raises UserError unless the folder that `setting` names is a LoRA adapter with the settings of this run.

    Warns if it was trained on a base of another name.
    """
    folder = Path(getattr(config, setting))
    what = f"--{setting} {folder}"
    saved = read_json(folder / "adapter_config.json", f"{what}: adapter_config.json")
    defaults = LoraConfig().to_dict()
    for name, value in saved.items():
        usual = name in (*SAME_IN_ADAPTER, *FREE_IN_ADAPTER) or value in (None, {}, defaults.get(name))
        if not usual:
            raise UserError(f"{what}: its {name} is {in_one_line(value, 60)}, which a run cannot go on from")
    _check_initialization(saved, what)
    for name in SAME_IN_ADAPTER:
        setting = {"r": "lora_r", "bias": "lora_bias"}.get(name, name)
        then, now = saved.get(name, defaults[name]), getattr(config, setting)  # older versions of PEFT lack some
        require(then == now, setting, now, f"the adapter of {what} has {then}; give that")
    names = _read_names(folder, what)
    adapted = sorted({name.split(".")[-3] for name in names if name.endswith(".lora_A.weight")})
    asked = config.lora_target_modules
    why = f"the adapter of {what} is on {' '.join(adapted)}; give these"
    require(asked == ["all-linear"] or sorted(set(asked)) == adapted, "lora_target_modules", " ".join(asked), why)
    then, now = saved.get("base_model_name_or_path"), original_name(config.model_name_or_path)
    if then != now and os.environ.get("RANK", "0") == "0":
        print(f"warning: {what} was trained on {in_one_line(then, 200)}, and this run's base is {now}", file=sys.stderr)


def check_first_classes(config: TrainConfig, classes: list[str]) -> None:
    """Raises UserError unless the classifier of `--adapter_name_or_path` was trained on the same classes, in order."""
    what = f"--adapter_name_or_path {config.adapter_name_or_path}"
    saved = read_json(Path(config.adapter_name_or_path) / "labels.json", f"{what}: labels.json", list)
    if saved != classes:
        then, now = (in_one_line(" ".join(map(str, names)), 100) for names in (saved, classes))
        raise UserError(f"{what}: its classes are {then}, and the data has {now}; they must be the same")


def adapter_digest(folder: str) -> str:
    """Hash of an adapter's weights and settings."""
    with boundary(f"--reference_adapter {folder}"):
        files = [Path(folder) / name for name in ("adapter_model.safetensors", "adapter_config.json")]
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def load_first_adapter(model: PeftModel, config: TrainConfig, setting: str = "adapter_name_or_path") -> None:
    """Put the weights of the adapter that `setting` names into the new adapters. Every rank reads them.

    Raises UserError unless they have the names and shapes of the run's own.
    """
    folder = Path(getattr(config, setting))
    with boundary(f"--{setting} {folder}", "give an adapter for this base, with the same target modules"):
        saved = {name: tensor.float() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        compare_tensors("adapter", saved, get_peft_model_state_dict(model, save_embedding_layers=False))
        if any(not tensor.isfinite().all() for tensor in saved.values()):
            raise ValueError("it holds values that are not finite")
    set_peft_model_state_dict(model, saved)


def compare_tensors(what: str, saved: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raises ValueError unless both hold tensors of the same names, shapes and types."""
    if others := sorted(saved.keys() ^ expected.keys()):
        raise ValueError(f"the {what} lacks, or has besides the run's own, {' '.join(others[:3])}")
    for name, tensor in expected.items():
        if (saved[name].shape, saved[name].dtype) != (tensor.shape, tensor.dtype):
            then, now = (f"{t.dtype} {tuple(t.shape)}" for t in (saved[name], tensor))
            raise ValueError(f"{name} of the {what} is {then}, and the run needs {now}")


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """(number of trainable parameters, of all). A quantized weight counts by its float shape, not by its parts."""
    quantized = [(module, weight) for module in model.modules() for weight in quantized_weights(module).values()]
    parts = {id(part) for module, weight in quantized for part in weight.parts(module)}
    total = sum(torch.Size(weight.shape).numel() for _, weight in quantized)
    total += sum(whole_shape(param).numel() for param in model.parameters() if id(param) not in parts)
    return sum(param.numel() for param in trainable_parameters(model).values()), total


def fingerprint(model: nn.Module) -> bytes:
    """sha256 of the names, dtypes, shapes and bytes of all trainable parameters."""
    digest = hashlib.sha256()
    for name, param in trainable_parameters(model).items():
        digest.update(f"{name} {param.dtype} {tuple(param.shape)}".encode())
        digest.update(param.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.digest()


def check_identical(model: nn.Module) -> str:
    """The adapters' sha256, in hex. Raises RuntimeError if they are not the same on all ranks. Collective."""
    own = fingerprint(model)
    digests = gather(own)
    differing = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if differing:
        raise RuntimeError(f"the adapters of ranks {differing} differ from rank 0's")
    return own.hex()


def save_adapter(model: PeftModel, tokenizer, folder: Path, params: dict[str, torch.Tensor] | None = None) -> None:
    """Write the adapter in PEFT's format, with the tokenizer. Called on rank 0 only.

    `params`: the trainable parameters by name. Default: those in the model.
    """
    # Embeddings are trained only if modules_to_save names them; to find out, PEFT would ask the hub for the base's
    # vocabulary.
    model.save_pretrained(folder, state_dict=params, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    if TASKS[model.peft_config["default"].task_type].has_classes:  # PEFT does not save the base's config
        write_whole(folder / "labels.json", json.dumps(list(model.config.id2label.values())) + "\n")


def verify_adapter(model: PeftModel, folder: Path, probe: MicroBatch, *, autocast=contextlib.nullcontext) -> None:
    """Read a saved adapter back and raise RuntimeError unless it equals the one in `model`. Collective.

    It checks that no key is missing or extra, that every tensor has the same bytes as in memory, and that PEFT computes
    the same logits with the adapter from the folder. Raises RunFailed if every `lora_B` is zero.
    """
    saved, expected = load_file(folder / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    if saved.keys() != expected.keys():
        raise RuntimeError(f"{folder}: keys differ from the model's: {sorted(saved.keys() ^ expected.keys())[:4]}")
    changed = [name for name, tensor in saved.items() if not torch.equal(tensor, expected[name].cpu())]
    if changed:
        raise RuntimeError(f"{folder}: bytes differ from the model's in {changed[:4]}")
    if not any(tensor.any() for name, tensor in saved.items() if "lora_B" in name):
        raise RunFailed("every lora_B of the adapter is zero, so nothing was trained; check --learning_rate")
    live = probe_logits(model, probe, autocast)
    if model.peft_config["default"].bias != "none":  # PEFT then allows no second adapter: load over the live one
        for param in trainable_parameters(model).values():
            param.data.zero_()
        set_peft_model_state_dict(model, saved)
        reloaded = probe_logits(model, probe, autocast)
    else:
        reloaded = _logits_of_second_adapter(model, folder, probe, autocast)
    if not torch.equal(live, reloaded):
        apart = (live - reloaded).abs().max()
        raise RuntimeError(f"{folder}: PEFT computes other logits with it; they differ by up to {apart:.3g}")


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
    """Logits of `probe` without dropout (B, T, V), under `autocast()`. Collective.

    Each call makes its own autocast context, because a context caches its casts of the weights.
    """
    training = model.training
    model.eval()
    with autocast():
        logits = model(**model_inputs(model, probe), use_cache=False).logits
    model.train(training)
    release(model)
    return logits
