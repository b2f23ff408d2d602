"""Every accelerate config, launched for real: the ranks, where the base lies, and one trajectory, byte for byte."""

import json
import subprocess

import pytest

from lora_dist.config import TrainConfig
from lora_dist.data.formats import load_tokenizer
from lora_dist.data.micro_batches import MicroBatches
from lora_dist.data.rows import prepare_rows
from lora_dist.parallel.strategies import STRATEGIES
from tests.helpers.ranks import BIN, PATIENCE_S, ROOT, launch, launch_recipe, start_rank

STEPS = 4
FLAGS = ("--max_steps", str(STEPS), "--warmup_steps", "1", "--max_length", "64", "--report_to", "none")
FLAGS += ("--learning_rate", "3e-3", "--per_device_train_batch_size", "2", "--sample_prompt", "")
FLAGS += ("--model_name_or_path", "embedded", "--dataset_name", "embedded")  # on a machine with GPUs too
# Of the base's bytes, what a rank holds on 2 ranks; None: the stated bound below.
HELD = {
    "single": 1, "ddp": 1, "zero2": 1, "fsdp": 1 / 2, "hsdp": 1 / 2, "fsdp_offload": 1 / 2, "zero3": None,
    "zero3_offload": None, "pipeline": None,
}  # fmt: skip


def trained(folder) -> tuple[bytes, list, dict]:
    """The adapter's bytes, the trajectory, and the summary of a run folder."""
    state = json.loads((folder / "state.json").read_text())
    assert (state["status"], state["step"]) == ("completed", STEPS)
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_seen", "eval/loss")
    trajectory = [[m[name] for name in names if name in m] for m in metrics if "checkpoint/save_time_s" not in m]
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), trajectory, state["summary"]


def launch_strategy(strategy, folder, *flags, launcher_flags=()):
    accumulation = "4" if strategy == "single" else "2"
    flags = (*FLAGS, "--gradient_accumulation_steps", accumulation, "--output_dir", str(folder), *flags)
    return launch_recipe(strategy, *flags, launcher_flags=launcher_flags)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "single"
    launch_strategy("single", folder)
    return trained(folder)


# Their placement is among those of tests/training/test_same_bytes.py, which is fast.
SLOW = ("ddp", "hsdp", "fsdp_offload", "zero2", "zero3", "zero3_offload", "pipeline")


@pytest.mark.parametrize(
    "strategy", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in STRATEGIES]
)
def test_each_config_trains_the_same_adapter(strategy, single, tmp_path):
    row = STRATEGIES[strategy]
    if strategy == "single":
        adapter, trajectory, summary = single
    else:
        printed = launch_strategy(strategy, tmp_path / "run").stdout
        assert f"strategy: {strategy} (" in printed and "= 8 sequences a step" in printed
        adapter, trajectory, summary = trained(tmp_path / "run")
    assert (summary["strategy"], summary["world_size"]) == (strategy, 1 if strategy == "single" else 2)
    held = summary["base_bytes_per_rank"] / summary["base_bytes_total"]
    if HELD[strategy]:
        assert held == HELD[strategy]
    elif row.engine == "ZeRO-3":  # vectors stay whole; the matrices are halved
        assert 0.5 < held < 0.53
    else:  # the pipeline: the layers are halved, embeddings and head whole
        assert 0.5 < held < 0.7
    gathered = summary["gathered_bytes_per_step"]
    if row.engine == "FSDP2":
        assert gathered > summary["base_bytes_total"]
    else:
        assert gathered == (None if row.engine == "ZeRO-3" else 0)  # DeepSpeed's are not counted
    assert summary["effective_batch_sequences"] == 8
    assert len(trajectory) == STEPS + 2 and trajectory == single[1]
    assert adapter == single[0]


def test_the_effective_batch_is_the_rows_that_were_seen(single):
    embedded = {"model_name_or_path": "embedded", "dataset_name": "embedded", "dataset_text_field": "quote"}
    config = TrainConfig(**embedded, max_length=64)
    rows = prepare_rows(config, load_tokenizer("embedded")).train
    batches = MicroBatches(rows, pad_token_id=1, seed=config.seed, sequences=2, per_step=4)
    ids = [i for step in range(STEPS) for index in range(4) for (i,) in batches.row_ids(step, index)]
    assert len(ids) == STEPS * 8
    assert single[2]["tokens_seen"] == sum(rows.lengths[i] for i in ids)


# id: (command, strategy, accumulation)
LAUNCHERS = {
    "python": (["python"], "single", 4),
    "torchrun": (["torchrun", "--nproc_per_node", "2"], "ddp", 2),
    "deepspeed": (["deepspeed", "--num_gpus", "2"], "zero3", 2),
    "hsdp on 4 ranks, two copies": (
        ["accelerate", "launch", "--config_file", "accelerate_configs/hsdp.yaml", "--num_processes", "4"], "hsdp", 1,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_other_launchers_train_the_same_adapter(launcher, single, tmp_path):
    command, strategy, accumulation = LAUNCHERS[launcher]
    flags = [*FLAGS, "--gradient_accumulation_steps", str(accumulation), "--output_dir", str(tmp_path / "run")]
    if launcher == "deepspeed":
        flags += ["--deepspeed", "launch/deepspeed/zero3.json"]
    if strategy == "hsdp":
        flags += ["--shard_size", "2"]
    # What an accelerate config says of the precision, the other launchers do not.
    env = {"ACCELERATE_MIXED_PRECISION": "bf16", "DS_ACCELERATOR": "cpu"}
    done = launch(*command, "recipes/opt_quotes.py", *flags, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    adapter, trajectory, summary = trained(tmp_path / "run")
    assert summary["strategy"] == strategy and summary["world_size"] * accumulation == 4
    assert trajectory == single[1] and adapter == single[0]


# Of two machines, which are two launchers here: the launcher's further flags, and the ranks that share a copy.
MACHINES = {
    "hsdp": ((), 2),
    "fsdp": ((), 4),
    "zero3": (("--deepspeed_multinode_launcher", "standard"), 4),
    "pipeline": (("--megatron_lm_pp_degree", "4"), None),
}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", MACHINES)
def test_two_machines_train_the_same_adapter(strategy, single, tmp_path):
    launcher_flags, shard_ranks = MACHINES[strategy]
    machines = [
        subprocess.Popen(
            [str(BIN / "accelerate"), "launch", "--config_file", f"accelerate_configs/{strategy}.yaml",
             "--num_machines", "2", "--machine_rank", str(machine), "--main_process_ip", "127.0.0.1",
             "--main_process_port", str(29700 + list(MACHINES).index(strategy)), "--num_processes", "4",
             *launcher_flags, "recipes/opt_quotes.py", *FLAGS, "--gradient_accumulation_steps", "1",
             "--output_dir", str(tmp_path / "run")],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for machine in range(2)
    ]  # fmt: skip
    outputs = [machine.communicate(timeout=PATIENCE_S) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs[0][1][-3000:] + outputs[1][1][-3000:]
    assert f"strategy: {strategy} (" in outputs[0][0] and "strategy: " not in outputs[1][0]  # rank 0 speaks
    adapter, trajectory, summary = trained(tmp_path / "run")
    assert (summary["strategy"], summary["world_size"]) == (strategy, 4)
    if shard_ranks:
        held = summary["base_bytes_per_rank"] / summary["base_bytes_total"]
        assert 1 / shard_ranks <= held < 1 / shard_ranks + 0.05
    assert trajectory == single[1] and adapter == single[0]


# What rank 1 is started with, beside what rank 0 is; what the line must hold.
DIFFERENT = {
    "a setting": (["--lora_r", "8"], {}, ["--lora_r: 16 on rank 0", "8 on rank 1", "all ranks need the same"]),
    "the precision": (["--mixed_precision", "bf16"], {}, ["--mixed_precision: no on rank 0", "bf16 on rank 1"]),
    "a package": ([], {"PYTHONPATH": "older"}, ["the package datasets: ", "on rank 0", "0.0.1 on rank 1"]),
}


@pytest.mark.parametrize(
    "what", [pytest.param(what, marks=[] if what == "a setting" else [pytest.mark.slow]) for what in DIFFERENT]
)
def test_ranks_that_differ_are_refused_naming_both(what, tmp_path):
    flags, env, expected = DIFFERENT[what]
    if what == "a package":  # found before the installed one
        info = tmp_path / "older" / "datasets-0.0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: datasets\nVersion: 0.0.1\n")
        env = {"PYTHONPATH": str(tmp_path / "older")}
    common = ("--output_dir", str(tmp_path / "run"), "--report_to", "none")
    ranks = [start_rank(0, *common), start_rank(1, *common, *flags, env=env)]
    outputs = [rank.communicate(timeout=PATIENCE_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], outputs
    (out, err), other = outputs
    assert (out, other) == ("", ("", "")) and err.startswith("error: ") and err.count("\n") == 1, outputs
    assert all(words in err for words in expected), err
    assert not (tmp_path / "run").exists()


def test_strategies_prints_the_table():
    table = json.loads(launch("lora-dist", "strategies", "--json").stdout)
    assert [row["name"] for row in table] == list(STRATEGIES)
    assert all(row["summary"] and row["traffic_per_step"] and row["quantizations"] for row in table)
    printed = launch("lora-dist", "strategies").stdout
    assert all(f"{name}: {row.summary}" in printed for name, row in STRATEGIES.items())
