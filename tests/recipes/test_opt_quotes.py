"""The recipe through `accelerate launch` on 2 ranks, and what it leaves behind."""

import json
import math
import signal
import time

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dist.embedded import BASE_DIR
from lora_dist.errors import RunFailed
from lora_dist.files import is_complete
from lora_dist.flags import parse_config
from lora_dist.run.folder import RunFolder
from tests.helpers.parity import batch_of, load_sharded
from tests.helpers.ranks import PATIENCE_S, fork_ranks, launch, launch_recipe, start_rank

STEPS = 6
# Unquantized and in fp32, so that a plain transformers base is the very same function.
FLAGS = ("--max_steps", str(STEPS), "--warmup_steps", "1", "--learning_rate", "3e-3", "--max_length", "64")
FLAGS += ("--save_steps", "2", "--save_total_limit", "1", "--eval_steps", "3")


@pytest.fixture(scope="module")
def int8_run(tmp_path_factory):
    """An int8 fsdp run: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "int8"
    return RunFolder(folder), launch_recipe("fsdp", *FLAGS, "--output_dir", str(folder))


def metrics_of(folder: RunFolder) -> list[dict]:
    return [json.loads(line) for line in folder.metrics.read_text().splitlines()]


def test_it_really_ran_sharded_on_two_ranks(int8_run):
    folder, _ = int8_run
    state = json.loads(folder.state.read_text())
    summary = state["summary"]
    assert (state["status"], state["step"]) == ("completed", STEPS)
    assert (summary["world_size"], summary["strategy"], summary["quantization"]) == (2, "fsdp", "int8")
    assert summary["base_bytes_per_rank"] * 2 == summary["base_bytes_total"]
    assert summary["effective_batch_sequences"] == 4 * 4 * 2
    assert summary["gathered_bytes_per_step"] > summary["base_bytes_total"]
    assert len(summary["peak_memory_bytes_per_rank"]) == 2
    contract = """world_size strategy quantization base_bytes_total base_bytes_per_rank gathered_bytes_per_step
        trainable_params all_params effective_batch_sequences tokens_seen tokens_per_second loss_first loss_last
        eval_loss peak_memory_bytes_per_rank load_s steps restarts"""
    assert set(contract.split()) <= summary.keys()


def test_the_loss_falls(int8_run):
    summary = json.loads(int8_run[0].state.read_text())["summary"]
    assert summary["eval_loss"] < summary["eval_loss_base"] - 0.02


def test_metrics_hold_every_step_once(int8_run):
    metrics = metrics_of(int8_run[0])
    train = [m for m in metrics if "train/loss" in m]
    assert [m["train/global_step"] for m in train] == list(range(1, STEPS + 1))
    assert all(math.isfinite(m["train/loss"]) and m["train/grad_norm"] > 0 for m in train)
    assert all(0 < m["perf/padding_fraction"] < 1 and m["perf/tokens_per_second"] > 0 for m in train)
    assert train[-1]["train/tokens_seen"] == json.loads(int8_run[0].state.read_text())["summary"]["tokens_seen"]
    assert [m["train/global_step"] for m in metrics if "eval/loss" in m] == [0, 3, 6]
    assert all(m["eval/perplexity"] == math.exp(m["eval/loss"]) for m in metrics if "eval/loss" in m)
    saves = [m for m in metrics if "checkpoint/save_time_s" in m]  # of steps 2, 3 (the best so far), 4, 6
    assert len(saves) == 4 and saves[-1]["train/global_step"] == STEPS
    assert all(0 < m["checkpoint/save_time_s"] and 0 < m["checkpoint/write_time_s"] < 5 for m in saves)


def test_the_run_folder_is_as_promised(int8_run):
    folder, _ = int8_run
    assert [path.name for path in folder.saved_checkpoints()] == ["step-00000006"]  # save_total_limit 1
    assert is_complete(folder.checkpoint(STEPS))
    names = {path.name for path in folder.adapter.iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "README.md"}
    report = folder.report.read_text()
    assert "<svg" in report and "Two things are infinite" in report and "http" not in report.replace("https://", "http")
    config = yaml.safe_load(folder.config.read_text())
    assert config["learning_rate"] == 3e-3 and config["model_name_or_path"] == "embedded"
    again = parse_config(parse_config.__globals__["TrainConfig"](), ["--config", str(folder.config)])
    assert again.max_steps == STEPS and again.lora_target_modules == ["q_proj", "v_proj"]


def test_what_it_prints(int8_run):
    lines = int8_run[1].stdout.splitlines()
    assert "trainable params: 49152 || all params: 2270592 || trainable%: 2.1647" in lines
    assert sum(line.startswith("trainable params:") for line in lines) == 1  # rank 0 only
    for start in ("loss:", "held-out perplexity:", "base:", "tokens per second:", "before:", "after:", "run folder:"):
        assert any(line.startswith(start) for line in lines), start
    assert "it/s" not in int8_run[1].stderr  # no progress bar in a log file


def test_wandb_has_one_offline_run_with_every_step(int8_run):
    (run,) = (int8_run[0].root / "wandb").glob("offline-run-*")
    shown = launch("wandb", "leet", "inspect", "--json", str(run))
    records = [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]
    history = [r["history"]["item"] for r in records if "history" in r]
    steps = [row["train/global_step"] for row in history if "train/loss" in row]
    assert steps == list(range(1, STEPS + 1))
    assert any("eval/loss" in row for row in history)
    assert any("exit" in r for r in records)


@pytest.mark.slow  # tests/run/test_faults.py has a fast one
@pytest.mark.parametrize("signalled_rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_a_step(signalled_rank, tmp_path):
    folder = RunFolder(tmp_path / "run")
    ranks = [start_rank(rank, "--output_dir", str(folder.root), "--report_to", "none") for rank in range(2)]
    deadline = time.monotonic() + PATIENCE_S
    while not (folder.metrics.exists() and '"train/loss"' in folder.metrics.read_text()):
        assert time.monotonic() < deadline and all(rank.poll() is None for rank in ranks)
        time.sleep(0.1)
    asked_at = metrics_of(folder)[-1]["train/global_step"]  # one more may be done before the signal is there
    ranks[signalled_rank].send_signal(signal.SIGUSR1)
    outputs = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    state = json.loads(folder.state.read_text())
    assert state["status"] == "preempted" and asked_at <= state["step"] <= asked_at + 2 < 200
    assert folder.newest_whole_checkpoint() == (folder.checkpoint(state["step"]), [])
    assert [m["train/global_step"] for m in metrics_of(folder) if "train/loss" in m] == [*range(1, state["step"] + 1)]
    assert state["summary"]["eval_loss"] is None and not folder.adapter.exists() and folder.report.exists()
    assert "preempted: saved" in outputs[0][0]


def test_a_signal_while_loading_ends_the_process_at_once_and_begins_nothing(tmp_path):
    process = start_rank(0, "--output_dir", str(tmp_path / "run"), "--report_to", "none", num_ranks=1)
    time.sleep(1.5)  # in the middle of the imports
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, out, err) == (-signal.SIGTERM, "", "")
    assert not (tmp_path / "run").exists()


def test_slurms_signal_while_loading_is_not_lost(tmp_path):
    process = start_rank(0, "--output_dir", str(tmp_path / "run"), "--report_to", "none", num_ranks=1)
    time.sleep(1.5)  # in the middle of the imports
    process.send_signal(signal.SIGUSR1)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, err
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["step"]) == ("preempted", 0)  # it leaves before its first step
    assert "preempted: nothing to save yet, 0 of 200 steps" in out


def test_a_checkpoint_with_a_changed_byte_is_not_complete(int8_run, tmp_path):
    import shutil

    copy = tmp_path / "step-00000006"
    shutil.copytree(int8_run[0].checkpoint(STEPS), copy)
    assert is_complete(copy)
    weights = copy / "adapter" / "adapter_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert not is_complete(copy)


def test_a_completed_run_is_left_as_it_is(int8_run):
    folder, _ = int8_run
    files = {
        path: path.stat().st_mtime_ns for path in folder.root.rglob("*") if path.is_file() and path.name != ".lock"
    }
    again = ("--output_dir", str(folder.root), "--report_to", "wandb")
    bf16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
    done = fork_ranks(*FLAGS, *again, strategy="fsdp", env=bf16)
    assert [(code, err) for code, _, err in done] == [(0, ""), (0, "")]
    assert done[0][1] == f"{folder.root}: the run is completed, at step {STEPS}; nothing to do\n" and not done[1][1]
    done = fork_ranks(*FLAGS, *again, "--seed", "1", env=bf16)
    assert [code for code, _, _ in done] == [2, 2]
    expected = f"error: --output_dir {folder.root}: holds a run with other settings: seed was 42, is now 1"
    assert done[0][2].startswith(expected)
    now = {path: path.stat().st_mtime_ns for path in folder.root.rglob("*") if path.is_file() and path.name != ".lock"}
    assert now == files


def test_plain_peft_loads_the_adapter_to_the_logits_of_training(tmp_path):
    """Trained on an unquantized fp32 base on 2 ranks, loaded by PEFT on a plain transformers base."""
    folder = RunFolder(tmp_path / "run")
    flags = ("--quantization", "none", "--report_to", "none", "--output_dir", str(folder.root))
    ended = fork_ranks(*FLAGS, *flags, strategy="fsdp")
    assert [code for code, _, _ in ended] == [0, 0], ended[0][2]
    base = AutoModelForCausalLM.from_pretrained(BASE_DIR, dtype=torch.float32)
    saved = load_file(folder.adapter / "adapter_model.safetensors")
    assert len(saved) == 4 * 2 * 2 and all(t.any() for t in saved.values())  # layers x (q, v) x (A, B), none zero
    model = PeftModel.from_pretrained(base, folder.adapter)
    loaded = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert len(loaded) == len(saved)
    for name, tensor in saved.items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)

    # The held-out loss that training measured at its end is the loss of that model.
    from lora_dist.data.micro_batches import collate
    from lora_dist.data.rows import prepare_rows
    from lora_dist.data.tasks import CAUSAL_LM

    config = parse_config(parse_config.__globals__["TrainConfig"](), ["--config", str(folder.config)])
    tokenizer = AutoTokenizer.from_pretrained(folder.adapter)
    rows = sorted(prepare_rows(config, tokenizer).held_out, key=lambda row: len(row["input_ids"]))
    loss = num_tokens = 0
    with torch.no_grad():
        for start in range(0, len(rows), 8):
            batch = collate(rows[start : start + 8], tokenizer.pad_token_id)
            logits = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT).logits
            loss += CAUSAL_LM.summed_loss(logits, batch.labels_BL).item()
            num_tokens += batch.num_trained_tokens
    measured = json.loads(folder.state.read_text())["summary"]["eval_loss"]
    assert loss / num_tokens == pytest.approx(measured, abs=1e-6)


def test_generate_completes_a_prompt(int8_run):
    done = launch("lora-dist", "generate", "--adapter", str(int8_run[0].adapter), "--json", "Two things are infinite: ")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["completion"].startswith("Two things are infinite: ") and len(answer["completion"]) > 40
    model = AutoPeftModelForCausalLM.from_pretrained(int8_run[0].adapter)
    assert model.active_adapter == "default"
    done = launch("lora-dist", "generate", "--adapter", str(int8_run[0].adapter), "--max_new_tokens", "9999", "Hi")
    says = "error: --max_new_tokens 9999: the base has 512 positions, and the prompt"
    assert done.returncode == 2 and done.stderr.startswith(says) and done.stderr.count("\n") == 1


def test_a_tampered_adapter_is_found_out(int8_run, tmp_path, config):
    """The program's own check after a save, on adapters that were damaged in four ways."""
    from lora_dist.data.formats import load_tokenizer
    from lora_dist.model.adapters import add_adapters, save_adapter, verify_adapter

    base = load_sharded("int8")
    model, probe = add_adapters(base, config), batch_of([[2, 5, 6, 7, 8]])
    folder = tmp_path / "adapter"
    save_adapter(model, load_tokenizer("embedded"), folder)
    with pytest.raises(RunFailed, match="every lora_B of the adapter is zero"):
        verify_adapter(model, folder, probe)

    weights = folder / "adapter_model.safetensors"
    whole = load_file(weights)
    save_file(dict(list(whole.items())[1:]), weights)
    with pytest.raises(RuntimeError, match="keys differ"):
        verify_adapter(model, folder, probe)
    save_file({n: t + 1 for n, t in whole.items()}, weights)
    with pytest.raises(RuntimeError, match="bytes differ"):
        verify_adapter(model, folder, probe)

    for param in model.parameters():
        if param.requires_grad:
            param.data.fill_(0.1)
    save_adapter(model, load_tokenizer("embedded"), folder)
    verify_adapter(model, folder, probe)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    with pytest.raises(RuntimeError, match="other logits"):
        verify_adapter(model, folder, probe)
