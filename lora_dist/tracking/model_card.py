"""README.md of an adapter: the model card that the hub shows, made from the settings and results of the run."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from lora_dist.config import TrainConfig
from lora_dist.environment import versions
from lora_dist.files import write_whole

# Task: (the hub's pipeline tag, PEFT's class that loads the adapter with its base)
TASKS_OF_HUB = {
    "CAUSAL_LM": ("text-generation", "AutoPeftModelForCausalLM"),
    "SEQ_2_SEQ_LM": ("text2text-generation", "AutoPeftModelForSeq2SeqLM"),
    "SEQ_CLS": ("text-classification", "AutoPeftModelForSequenceClassification"),
    "TOKEN_CLS": ("token-classification", "AutoPeftModelForTokenClassification"),
}
QUANTIZATIONS = {
    "int8": "int8 (LLM.int8)", "nf4": "NF4 with double quantization (QLoRA)", "nf4_plain": "NF4 without double "
    "quantization", "none": "not quantized",
}  # fmt: skip


@dataclass(frozen=True)
class TrainingResult:
    """What the card says beside the settings. Losses in nats per token; None if there are no held-out rows."""

    num_steps: int
    sequences_per_step: int  # over all ranks
    tokens_seen: int  # without padding
    eval_loss_base: float | None
    eval_loss: float | None
    scores: dict[str, float]  # by NAME_base, of the base alone, and NAME
    classes: tuple[str, ...] = ()  # names of a classifier's classes


def write_model_card(folder: Path, config: TrainConfig, result: TrainingResult) -> None:
    """Write README.md into an adapter's folder, over the one that PEFT wrote."""
    write_whole(folder / "README.md", model_card(config, result))


def model_card(config: TrainConfig, result: TrainingResult) -> str:
    """The card's text: a YAML header that the hub reads, then Markdown."""
    base, data = config.model_name_or_path, config.dataset_name
    header = ModelCardData(
        base_model=base if _is_hub_name(base) else None,
        datasets=[data] if _is_hub_name(data) else None,
        library_name="peft",
        pipeline_tag=TASKS_OF_HUB[config.task_type][0],
        tags=["lora", "lora-dist", *(["quantized-base"] if config.quantization != "none" else [])],
    )
    sections = [
        f"---\n{header.to_yaml()}\n---",
        f"# LoRA adapter for {base}",
        f"A LoRA adapter for `{base}`, trained on `{data}` with lora-dist. The base stayed frozen; this folder holds "
        "the adapter and the tokenizer.",
        "## How to load it\n\n" + _snippet(config, result),
        "## How it was trained\n\n" + _table(_settings(config, result)),
    ]
    if results := _results(config, result):
        head = f"| held-out rows of `{data}` | base | base + adapter |\n|---|---|---|\n"
        rows = "\n".join(f"| {name} | {before} | {after} |" for name, before, after in results)
        sections.append(f"## Results\n\n{head}{rows}")
    sections.append("## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions().items()))
    return "\n\n".join(sections) + "\n"


def _is_hub_name(name: str) -> bool:
    """True for OWNER/NAME or NAME; embedded bases, files and directories are not on the hub."""
    is_embedded = name.partition("/")[0] == "embedded"
    is_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    return bool(is_name) and not is_embedded and not Path(name).exists()


def _snippet(config: TrainConfig, result: TrainingResult) -> str:
    loader, adapter = TASKS_OF_HUB[config.task_type][1], config.hub_model_id or "path/to/this/folder"
    num_labels = f", num_labels={len(result.classes)}" if result.classes else ""
    lines = [
        f"from peft import {loader}", "from transformers import AutoTokenizer", "",
        f'model = {loader}.from_pretrained("{adapter}"{num_labels})',
        f'tokenizer = AutoTokenizer.from_pretrained("{adapter}")',
    ]  # fmt: skip
    classes = f"\n\nClasses, in the order of the logits: {', '.join(result.classes)}." if result.classes else ""
    return "```python\n" + "\n".join(lines) + "\n```" + classes


def _settings(config: TrainConfig, result: TrainingResult) -> list[tuple[str, str]]:
    kind = "DoRA" if config.use_dora else "rank-stabilized LoRA" if config.use_rslora else "LoRA"
    trained_whole = ", ".join(config.modules_to_save or ())
    return [
        ("method", kind),
        ("rank r", f"{config.lora_r}"),
        ("alpha", f"{config.lora_alpha}"),
        ("dropout", f"{config.lora_dropout}"),
        ("target modules", ", ".join(config.lora_target_modules)),
        *([("modules trained whole", trained_whole)] if trained_whole else []),
        ("base", QUANTIZATIONS[config.quantization]),
        ("precision", {"no": "fp32"}.get(config.mixed_precision, config.mixed_precision)),
        ("steps", f"{result.num_steps}"),
        ("batch", f"{result.sequences_per_step} sequences of up to {config.max_length} tokens"),
        ("tokens seen", f"{result.tokens_seen:,} (padding not counted)"),
        ("learning rate", f"{config.learning_rate:g}, {config.lr_scheduler_type}, {config.warmup_steps} warm-up steps"),
        ("seed", f"{config.seed}"),
    ]


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _results(config: TrainConfig, result: TrainingResult) -> list[tuple[str, str, str]]:
    """(name, base, base + adapter) of each number that was measured before and after."""
    found = []
    before, after = result.eval_loss_base, result.eval_loss
    if before is not None and after is not None:
        found.append(("loss", f"{before:.4f}", f"{after:.4f}"))
        if not (config.task_type.endswith("_CLS") or config.has_pairs):
            found.append(("perplexity", f"{math.exp(before):.2f}", f"{math.exp(after):.2f}"))
    for name in result.scores:
        if f"{name}_base" in result.scores:
            found.append((name.replace("_", " "), f"{result.scores[f'{name}_base']:.3f}", f"{result.scores[name]:.3f}"))
    return found
