"""Trains a base under an unmodified Trainer of transformers or TRL, for tests of `lora_dist.load_base`."""

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from lora_dist import load_base
from lora_dist.data.formats import load_tokenizer
from lora_dist.parallel.fsdp import gathered_bytes
from tests.helpers.parity import load_unsharded, randomize

with warnings.catch_warnings(action="ignore"):  # TRL warns that it is experimental
    from trl.experimental import orpo

NUM_ROWS, ROWS_PER_STEP, NUM_STEPS = 64, 8, 4
TEXTS = [f"Hope is number {i} of {i * 7} things that stay." for i in range(NUM_ROWS)]
PROMPTS = [f"Name {i} thing{'s' * (i % 3)}:" for i in range(NUM_ROWS)]
ANSWERS = {"chosen": " a lamp, a sea", "rejected": " nothing at all"}


@dataclass(frozen=True)
class Case:
    """One training."""

    trainer: str  # the name of its class
    quantization: str = "nf4"
    ours: bool = True  # False: the base as transformers and bitsandbytes load it
    settings: dict = field(default_factory=dict)  # of the trainer's arguments
    base: dict = field(default_factory=dict)  # of load_base
    reference_adapter: bool = False  # DPO: a second adapter is the reference
    resume: str | None = None  # Trainer's checkpoint to continue from
    as_on_gpus: bool = False  # accelerate then treats the model as on several GPUs, where it refuses more


def train(rank: int, case: Case, folder: Path) -> dict:
    """What came out, and where it was computed."""
    warnings.simplefilter("ignore")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # torch's threads do not survive the fork of this process
    os.environ["ACCELERATE_USE_CPU"] = "true"  # as `accelerate launch` sets it on a machine without a GPU
    trainer = make_trainer(case, folder)
    if case.as_on_gpus:
        type(trainer.accelerator).multi_device = property(lambda accelerator: True)
    held = held_bytes(trainer.model)
    trainer.train(resume_from_checkpoint=case.resume)
    model = trainer.accelerator.unwrap_model(trainer.model)
    logs = trainer.state.log_history
    return {
        "world": trainer.args.world_size,
        "losses": [log["loss"] for log in logs if "loss" in log],
        "eval_losses": [log["eval_loss"] for log in logs if "eval_loss" in log],
        "adapter": {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
        "held": (held, held_bytes(trainer.model)),
        "whole": sum(p.nbytes for p in base_parameters(model)),
        "gathered": gathered_bytes(model),
        "kinds": {type(p).__name__ for p in base_parameters(model) if p.dim() == 2},
        "step": trainer.state.global_step,
        "best": trainer.state.best_model_checkpoint,
    }  # fmt: skip


def base_parameters(model) -> list[torch.nn.Parameter]:
    """The frozen ones, without those of a reference adapter."""
    return [p for name, p in model.named_parameters() if not p.requires_grad and "lora_" not in name]


def held_bytes(model) -> int:
    """Bytes of the frozen base in this process."""
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in base_parameters(model))


def make_trainer(case: Case, folder: Path) -> Trainer:
    tokenizer, ranks = load_tokenizer("embedded"), dist.get_world_size()
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    if case.trainer == "RewardTrainer":
        lora.task_type = "SEQ_CLS"
    model = load(case, lora)
    settings = {
        "output_dir": str(folder), "max_steps": NUM_STEPS, "per_device_train_batch_size": ROWS_PER_STEP // ranks,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": [], "seed": 0,
        "gradient_checkpointing": False, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    torch.manual_seed(1)
    if case.trainer == "Trainer":
        rows = [tokenizer(text) for text in TEXTS]
        rows = Dataset.from_list([{**row, "labels": row["input_ids"]} for row in rows])
        return Trainer(
            get_peft_model(model, lora), TrainingArguments(**settings | case.settings), train_dataset=rows,
            eval_dataset=rows.select(range(8)), data_collator=DataCollatorForSeq2Seq(tokenizer),
        )  # fmt: skip
    if case.reference_adapter:  # TRL copies the adapter that it is given, and makes the copy the reference
        model, lora = get_peft_model(model, lora), None
        randomize(model)
    rows, own_settings, arguments = data_of(case.trainer)
    module = orpo if case.trainer == "ORPOTrainer" else trl
    make, make_settings = (getattr(module, case.trainer.replace("Trainer", end)) for end in ("Trainer", "Config"))
    trainer = make(
        model, args=make_settings(**settings | own_settings | case.settings), train_dataset=rows,
        eval_dataset=rows.select(range(8)), processing_class=tokenizer, peft_config=lora, **arguments,
    )  # fmt: skip
    for param in trainer.model.parameters():  # TRL rounds the adapters of a quantized base to bf16
        if param.requires_grad:
            param.data = param.data.float()
    return trainer


def load(case: Case, lora: LoraConfig) -> torch.nn.Module:
    """The base in fp32, without dropout, whose random numbers depend on the rank."""
    is_reward = lora.task_type == "SEQ_CLS"
    torch.manual_seed(0)  # of a new head
    if case.ours:
        settings = {"num_labels": 1, "peft_config": lora} if is_reward else {}
        model = load_base("embedded", quantization=case.quantization, dtype=torch.float32, **settings, **case.base)
    else:
        model = load_unsharded(case.quantization, torch.float32, num_labels=1 if is_reward else None)
    for module in model.modules():
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def data_of(trainer: str) -> tuple[Dataset, dict, dict]:
    """(rows, settings, other arguments) of a trainer of TRL."""
    settings, arguments = {"max_length": 64}, {}
    data = {"prompt": PROMPTS} | {side: [text] * NUM_ROWS for side, text in ANSWERS.items()}
    if trainer == "SFTTrainer":
        data = {"text": TEXTS}
    elif trainer == "KTOTrainer":
        answers = [side for _ in range(NUM_ROWS // 2) for side in ANSWERS]
        data = {
            "prompt": PROMPTS, "completion": [ANSWERS[side] for side in answers],
            "label": [side == "chosen" for side in answers],
        }  # fmt: skip
    elif trainer == "RewardTrainer":
        data = {side: [prompt + text for prompt in PROMPTS] for side, text in ANSWERS.items()}
    elif trainer == "GRPOTrainer":
        data = {"prompt": PROMPTS}
        settings = {"num_generations": 2, "max_completion_length": 12}
        arguments["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
    return Dataset.from_dict(data), settings, arguments
