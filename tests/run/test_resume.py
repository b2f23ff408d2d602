"""A run that was killed and continued, on any number of ranks, has every loss and byte of a run that was not killed."""

import json
import os
import re
import signal

import pytest
from safetensors.torch import load_file, save_file

from lora_dist.files import write_manifest
from lora_dist.run.folder import RunFolder
from tests.helpers.ranks import PATIENCE_S, fork_ranks

STEPS = 12
# 4 micro-batches per step, of 2 rows each, so 1 to 4 ranks can share them. Dropout is on, as in the recipe.
FLAGS = ("--max_steps", str(STEPS), "--warmup_steps", "2", "--learning_rate", "3e-3", "--max_length", "64")
FLAGS += ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2", "--eval_fraction", "0.01")
FLAGS += ("--save_steps", "2", "--eval_steps", "5", "--report_to", "none", "--sample_prompt", "")


def killed_after(step: int):
    """A patch: SIGKILL to this rank after a step, once its checkpoint is written."""

    def patch(rank: int) -> None:
        import lora_dist.training.loop as train

        savers, take_step = [], train.train_step

        class Saver(train.Saver):
            def __init__(self, run):
                super().__init__(run)
                savers.append(self)

        def train_step(run, done):
            if done == step:
                savers[0].finish()
                os.kill(os.getpid(), signal.SIGKILL)
            return take_step(run, done)

        train.Saver, train.train_step = Saver, train_step

    return patch


def start(folder: RunFolder, *flags: str, kill_after: int | None = None, **kwargs) -> list[tuple[int, str, str]]:
    """One start of a run, until its end or until all ranks are killed after a step."""
    patch = killed_after(kill_after) if kill_after else None
    ended = fork_ranks(*FLAGS, *flags, "--output_dir", str(folder.root), patch=patch, timeout_s=PATIENCE_S, **kwargs)
    expected = -signal.SIGKILL if kill_after else 0
    assert [code for code, _, _ in ended] == [expected] * len(ended), ended[0][1:]
    return ended


def trajectory(folder: RunFolder) -> list[tuple]:
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    keys = ("train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_seen", "eval/loss")
    return [(m["train/global_step"], *(m.get(key) for key in keys)) for m in lines if "checkpoint/save_time_s" not in m]


def adapter(folder: RunFolder) -> bytes:
    return (folder.adapter / "adapter_model.safetensors").read_bytes()


def summary(folder: RunFolder) -> dict:
    return folder.read_state()["summary"]


KINDS = {
    "bf16, packed": ("--packing", "true", "--max_length", "128"),
    "fp32, streamed, cosine, LoRA+": (
        "--streaming", "true", "--lr_scheduler_type", "cosine", "--loraplus_lr_ratio", "4"),
    "bf16, classifier, biases, DoRA": (
        "--lora_bias", "all", "--use_dora", "true", "--lr_scheduler_type", "constant", "--num_labels", "8",
    ),
    "fp32, pairs": ("--lora_dropout", "0.05"),
}  # fmt: skip


@pytest.fixture(
    scope="module", params=[pytest.param(kind, marks=[] if "packed" in kind else pytest.mark.slow) for kind in KINDS]
)
def undisturbed(request, tmp_path_factory):
    """(flags, how it is started, folder) of a run on 2 ranks that was not killed."""
    how = {"env": {"ACCELERATE_MIXED_PRECISION": "bf16"} if "bf16" in request.param else {}}
    recipes = {"classifier": "quotes_tags", "pairs": "dpo"}
    how["recipe"] = next((recipe for word, recipe in recipes.items() if word in request.param), "opt_quotes")
    folder = RunFolder(tmp_path_factory.mktemp("undisturbed") / "run")
    start(folder, *KINDS[request.param], strategy="fsdp", **how)
    return KINDS[request.param], how, folder


def test_on_two_one_four_two_ranks_and_every_strategy(undisturbed, tmp_path):
    flags, how, whole = undisturbed
    folder = RunFolder(tmp_path / "run")
    start(folder, *flags, kill_after=3, num_ranks=2, strategy="fsdp", **how)
    one = start(folder, *flags, kill_after=6, num_ranks=1, **how)
    four = start(folder, *flags, "--shard_size", "2", kill_after=9, num_ranks=4, strategy="hsdp", **how)
    two = start(folder, *flags, num_ranks=2, strategy="ddp", **how)
    for ended, step, ranks in ((one, 2, 1), (four, 6, 4), (two, 8, 2)):
        assert f"continuing from {folder.checkpoint(step)}" in ended[0][1]
        kind = "pairs" if how["recipe"] == "dpo" else "sequences"
        assert f"shared by {ranks} rank(s) = 8 {kind} a step" in ended[0][1]
        assert not ended[0][2]  # no warning
    assert adapter(folder) == adapter(whole)
    assert trajectory(folder) == trajectory(whole)
    assert [line[0] for line in trajectory(folder) if line[1]] == list(range(1, STEPS + 1))  # each step once
    then, now = summary(whole), summary(folder)
    for name in ("loss_first", "loss_last", "eval_loss_base", "eval_loss", "tokens_seen", "best_step", "steps"):
        assert now[name] == then[name], name
    assert (then["restarts"], now["restarts"], now["world_size"]) == (0, 3, 2)


@pytest.mark.slow
def test_three_ranks_share_four_micro_batches(undisturbed, tmp_path):
    flags, how, whole = undisturbed
    folder = RunFolder(tmp_path / "run")
    start(folder, *flags, kill_after=7, num_ranks=2, **how)
    start(folder, *flags, num_ranks=3, strategy="fsdp", **how)
    assert (adapter(folder), trajectory(folder)) == (adapter(whole), trajectory(whole))


def test_killed_after_every_step(undisturbed, tmp_path):
    flags, how, whole = undisturbed
    flags += ("--save_steps", "1", "--gradient_accumulation_steps", "4")  # one rank: the same 4 micro-batches
    folder = RunFolder(tmp_path / "run")
    for step in range(1, STEPS):
        start(folder, *flags, kill_after=step, num_ranks=1, **how)
    start(folder, *flags, num_ranks=1, **how)
    assert (adapter(folder), trajectory(folder)) == (adapter(whole), trajectory(whole))
    assert summary(folder)["restarts"] == STEPS - 1


@pytest.mark.slow
def test_into_and_out_of_deepspeed(undisturbed, tmp_path):
    """On 2 ranks DeepSpeed rounds in the same way, so every byte is the same here too."""
    flags, how, whole = undisturbed
    if how["recipe"] == "quotes_tags":
        pytest.skip("classifiers are refused under ZeRO-3")
    folder = RunFolder(tmp_path / "run")
    engines = {}
    for stage in (2, 3):
        path = tmp_path / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": bool(how["env"])}}))
        engines[stage] = ("--deepspeed", str(path))
    start(folder, *flags, kill_after=3, num_ranks=2, **how)
    start(folder, *flags, *engines[2], kill_after=5, num_ranks=2, recipe=how["recipe"])
    start(folder, *flags, *engines[2], kill_after=7, num_ranks=2, recipe=how["recipe"])
    start(folder, *flags, *engines[3], kill_after=9, num_ranks=2, recipe=how["recipe"])
    ended = start(folder, *flags, num_ranks=2, strategy="fsdp", **how)
    assert f"continuing from {folder.checkpoint(8)}" in ended[0][1]
    assert trajectory(folder) == trajectory(whole)
    assert adapter(folder) == adapter(whole)


@pytest.mark.slow
def test_under_a_pipeline(undisturbed, tmp_path):
    flags, how, whole = undisturbed
    if how["recipe"] == "quotes_tags":
        pytest.skip("classifiers are refused in a pipeline")
    folder = RunFolder(tmp_path / "run")
    start(folder, *flags, kill_after=5, num_ranks=2, strategy="pipeline", **how)
    start(folder, *flags, num_ranks=3, strategy="pipeline", **how)
    assert (adapter(folder), trajectory(folder)) == (adapter(whole), trajectory(whole))


@pytest.mark.slow
def test_the_loss_scaler_goes_on(tmp_path):
    """The loss scaler of fp16, here on the CPU. It doubles every 3 steps."""

    def scaled(then=lambda rank: None):
        def patch(rank: int) -> None:
            import torch

            import lora_dist.training.session as session

            start = session.start_ranks

            def start_ranks(*args):
                accelerator = start(*args)
                accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
                return accelerator

            session.start_ranks = start_ranks
            then(rank)

        return patch

    scalers = []
    for name, kill in (("whole", None), ("killed", killed_after(5))):
        folder = RunFolder(tmp_path / name)
        flags = (*FLAGS, "--output_dir", str(folder.root))
        if kill:
            assert fork_ranks(*flags, num_ranks=1, patch=scaled(kill))[0][0] == -signal.SIGKILL
        ((code, out, err),) = fork_ranks(*flags, num_ranks=1, patch=scaled())
        assert code == 0 and ("continuing from" in out) == (name == "killed"), err
        scalers.append(json.loads((folder.checkpoint(STEPS) / "training_state.json").read_text())["loss_scaler"])
    assert scalers[0] == scalers[1] and scalers[0]["scale"] == 256 * 2 ** (STEPS // 3)


def test_what_changes_is_warned_of_or_refused(tmp_path):
    folder = RunFolder(tmp_path / "run")
    start(folder, kill_after=3, num_ranks=1)
    fewer = ("--max_steps", "1", "--warmup_steps", "0", "--allow_config_change", "max_steps", "warmup_steps")
    ((code, out, err),) = fork_ranks(*FLAGS, *fewer, "--output_dir", str(folder.root), num_ranks=1)
    assert (code, err) == (2, "error: --max_steps 1: the run is at step 2 already; give more\n")
    back = ("--allow_config_change", "max_steps", "warmup_steps")  # back to the first values
    ((code, out, err),) = fork_ranks(
        *FLAGS, *back, "--output_dir", str(folder.root), num_ranks=1,
        patch=lambda rank: os.environ.update(OMP_NUM_THREADS="2"),
    )  # fmt: skip
    assert code == 0
    assert "warning: threads was 1, is now 2: the bits may differ from this step on" in err


def test_a_checkpoint_that_does_not_fit_is_refused_with_safety(tmp_path):
    """Its manifest is right all the same. The refused starts leave the run as it was."""
    folder = RunFolder(tmp_path / "run")
    start(folder, kill_after=3, num_ranks=1)
    checkpoint = folder.checkpoint(2)
    optimizer, training_state = checkpoint / "optimizer.safetensors", checkpoint / "training_state.json"
    moments, state, run_state = load_file(optimizer), training_state.read_text(), folder.state.read_bytes()
    name = next(name for name in moments if name.startswith("exp_avg."))
    for content, says in (
        (moments | {name: moments[name][:1].clone()}, "of the optimizer is torch.float32 (1, "),
        (moments, "progress.tokens_seen is -5 (ValueError); remove this checkpoint"),
    ):
        save_file(content, optimizer)
        if content is moments:
            training_state.write_text(re.sub(r'"tokens_seen": \d+', '"tokens_seen": -5', state, count=1))
        write_manifest(checkpoint)
        ((code, _, err),) = fork_ranks(*FLAGS, "--output_dir", str(folder.root), num_ranks=1)
        assert code == 2 and says in err and err.count("\n") == 1, err
        assert folder.state.read_bytes() == run_state
    training_state.write_text(state)
    write_manifest(checkpoint)
    start(folder, num_ranks=1)
