"""The precision of a run: what the user asks, what the launcher says, and what the CPU computes natively."""

import dataclasses
import re
import subprocess
import sys

import pytest
import torch
import yaml

from lora_dist.config import TrainConfig
from lora_dist.data.rows import PreparedData, Rows
from lora_dist.data.tasks import TASKS
from lora_dist.environment import bf16_slowdown
from lora_dist.errors import UserError
from lora_dist.model.load import meta_model
from lora_dist.parallel.strategies import STRATEGIES, Launch
from lora_dist.training import plan
from lora_dist.training.plan import check_length, check_names, check_rank, choose_precision
from tests.helpers.ranks import ROOT, launch_recipe


@pytest.fixture(params=[True, False], ids=["native", "emulated"])
def native(request, monkeypatch) -> bool:
    monkeypatch.setattr(plan, "has_gpu", lambda: False)
    monkeypatch.setattr(plan, "cpu_has_bf16", lambda: request.param)
    return request.param


def chosen(config, *, asked: str, launched: str) -> tuple[str, str]:
    config, why = choose_precision(
        dataclasses.replace(config, mixed_precision=asked), Launch(STRATEGIES["ddp"], launched)
    )
    return config.mixed_precision, why


def test_auto_follows_the_launcher_except_for_emulated_bf16(config, native):
    expected = ("bf16", "as the launcher says") if native else ("no", "fp32, because this CPU has no bf16 instructions")
    assert chosen(config, asked="auto", launched="bf16") == expected
    assert chosen(config, asked="auto", launched="no") == ("no", "as the launcher says")


def test_what_the_user_asks_is_done_and_emulation_is_warned_of(config, native, monkeypatch, capsys):
    monkeypatch.setattr(plan, "bf16_slowdown", lambda: 75.4)
    assert chosen(config, asked="no", launched="bf16") == ("no", "as asked")
    assert capsys.readouterr().err == ""
    assert chosen(config, asked="bf16", launched="no") == ("bf16", "as asked")
    warned = "a matrix product takes 75 times as long in bf16 as in fp32; --mixed_precision no trains in fp32"
    assert (warned in capsys.readouterr().err) is not native
    monkeypatch.setenv("RANK", "1")
    chosen(config, asked="bf16", launched="no")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("asked", "launched", "where"),
    [("auto", "fp16", "accelerate config mixed_precision: fp16"), ("fp16", "bf16", "--mixed_precision: fp16")],
)
def test_fp16_needs_a_gpu(config, native, asked, launched, where):
    with pytest.raises(UserError, match=f"^{where}: not supported without a GPU; use no or bf16$"):
        chosen(config, asked=asked, launched=launched)


def test_the_slowdown_is_measured():
    assert 0.01 < bf16_slowdown() < 1000


def test_onednn_says_what_the_cpu_computes_natively():
    """With ONEDNN_MAX_CPU_ISA=AVX2 every x86-64 CPU behaves as one without bf16 instructions."""
    code = "from lora_dist.environment import cpu_has_bf16; print(cpu_has_bf16())"
    env = {"ONEDNN_MAX_CPU_ISA": "AVX2", "PATH": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_run_on_a_cpu_without_bf16_says_so_and_keeps_it_in_its_config(tmp_path):
    flags = ("--max_steps", "1", "--warmup_steps", "0", "--eval_fraction", "0", "--dataset_test_split", "none")
    flags += ("--report_to", "none", "--sample_prompt", "", "--output_dir", str(tmp_path / "run"))
    done = launch_recipe("fsdp", *flags, env={"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert "ranks: 2 on cpu, mixed precision no (fp32, because this CPU has no bf16 instructions)\n" in done.stdout
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["mixed_precision"] == "no"


def data_of(*lengths: int) -> PreparedData:
    rows = Rows.of([([1] * length, [1] * length) for length in lengths])
    return PreparedData(rows, Rows.of([]), {}, "text", None)


@pytest.mark.parametrize(
    ("settings", "num_ranks", "says"),
    [
        ({"num_train_epochs": 1}, 8, "--num_train_epochs 1: is 1 step, which trains nothing with --warmup_steps 20"),
        ({"num_train_epochs": 1, "packing": True}, 1, "--num_train_epochs 1: is 1 step, which trains nothing"),
        ({"num_train_epochs": 3, "packing": True}, 1, "is as long as the run of 2 steps: the learning rate only rises"),
        ({"num_train_epochs": 30}, 8, "--warmup_steps 20 is as long as the run of 10 steps"),
        ({"num_train_epochs": 4}, 1, "--warmup_steps 20 is as long as the run of 10 steps"),
        ({"num_train_epochs": 10}, 1, ""),
        ({"num_train_epochs": 1, "lr_scheduler_type": "constant"}, 8, ""),
        ({"max_steps": 20}, 1, "reaches 95% of --learning_rate 0.0002"),
        ({"max_steps": 21}, 1, ""),
        ({}, 1, "--max_steps None: give this, or --num_train_epochs"),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_seen_before_it_begins(monkeypatch, capsys, settings, num_ranks, says):
    """10 rows of 10 tokens; 4 sequences per rank and step."""
    monkeypatch.setenv("WORLD_SIZE", str(num_ranks))
    few = {"warmup_steps": 20, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 50}
    config = TrainConfig(**few | settings)
    if says.startswith("--") and "as long" not in says:
        with pytest.raises(UserError, match=re.escape(says)):
            check_length(config, data_of(*[10] * 10))
        return
    check_length(config, data_of(*[10] * 10))
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == bool(says)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"early_stopping_patience": 1, "max_steps": 20},
            "early_stopping_patience 1: has no effect: with",
        ),
        ({"early_stopping_patience": 1, "max_steps": 21}, ""),
        ({"early_stopping_patience": 2, "num_train_epochs": 10}, "the run of 25 steps ends before it can act"),
        ({"early_stopping_patience": 2, "num_train_epochs": 16}, ""),
        ({"early_stopping_patience": 3, "num_train_epochs": 16, "packing": True}, "early_stopping_patience 3: has no"),
        ({"load_best_model_at_end": True, "max_steps": 10}, "load_best_model_at_end True: has no effect: with --eval_"),
        ({"load_best_model_at_end": True, "max_steps": 11}, ""),
    ],
)
def test_what_the_held_out_loss_should_decide_must_be_decided_before_the_run_ends(settings, says):
    """10 rows of 10 tokens; 4 sequences per step."""
    fixed = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_length": 50, "warmup_steps": 0}
    config = TrainConfig(**{"eval_steps": 10, "save_steps": 10} | fixed | settings)
    data = dataclasses.replace(data_of(*[10] * 10), held_out=data_of(10).train)
    if says:
        with pytest.raises(UserError, match=says):
            check_length(config, data)
    else:
        check_length(config, data)


def test_a_run_that_is_continued_keeps_its_length(tmp_path):
    (tmp_path / "state.json").touch()
    config = TrainConfig(num_train_epochs=1, output_dir=str(tmp_path))
    check_length(config, data_of(10))
    check_length(dataclasses.replace(config, output_dir=None, resume_from_checkpoint="runs/a"), data_of(10))


def test_boundary_a_rank_above_the_width_of_the_layers(config):
    for quantization in ("none", "int8"):
        for targets in (["q_proj"], ["all-linear"]):
            config = dataclasses.replace(config, lora_target_modules=targets)
            model = meta_model("embedded", quantization, torch.float32, TASKS["CAUSAL_LM"], None)
            width = model.config.hidden_size
            check_rank(model, dataclasses.replace(config, lora_r=width))
            with pytest.raises(UserError, match=f"--lora_r {width + 1}: .*give at most {width}"):
                check_rank(model, dataclasses.replace(config, lora_r=width + 1))


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("WANDB_PROJECT", "", "WANDB_PROJECT : is empty"),
        ("WANDB_PROJECT", "team/project", "WANDB_PROJECT team/project: has /, which no project"),
        ("WANDB_NAME", "two\nlines", "WANDB_NAME two lines: has the character"),
        ("WANDB_ENTITY", "x" * 5000, "has 5,000 characters"),
    ],
)
def test_boundary_names_for_wandb_are_checked_before_the_run(config, monkeypatch, variable, value, says):
    monkeypatch.setenv(variable, value)
    check_names(dataclasses.replace(config, report_to="none"))
    with pytest.raises(UserError, match=re.escape(says)):
        check_names(dataclasses.replace(config, report_to="wandb"))


def test_a_disk_without_room_for_a_checkpoint_is_seen_before_a_run_begins(monkeypatch, tmp_path):
    config = TrainConfig(model_name_or_path="embedded", output_dir=str(tmp_path / "run"), lora_r=8)
    skeleton = meta_model("embedded", "int8", torch.float32)
    adapted = {name: module for name, module in skeleton.named_modules() if name.endswith(("q_proj", "v_proj"))}
    adapter_bytes = 4 * sum(8 * (module.in_features + module.out_features) for module in adapted.values())
    monkeypatch.setattr(plan, "free_bytes", lambda path: 4 * adapter_bytes - 1)
    with pytest.raises(
        UserError, match="^--output_dir .*/run: the adapter and a checkpoint need .* free; give another"
    ):
        plan.check_disk(skeleton, config)
    monkeypatch.setattr(plan, "free_bytes", lambda path: 4 * adapter_bytes)
    plan.check_disk(skeleton, config)
    monkeypatch.setattr(plan, "free_bytes", lambda path: 0)
    monkeypatch.setenv("RANK", "1")
    plan.check_disk(skeleton, config)
    monkeypatch.setenv("RANK", "0")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/state.json").touch()
    plan.check_disk(skeleton, config)  # a run that goes on has room for what it has
