"""Which runs begin, continue or are refused, decided from files alone."""

import dataclasses
import json
import subprocess
import sys

import pytest

from lora_dist.config import ASK_ON_RESUME, FREE_ON_RESUME, TrainConfig
from lora_dist.errors import NothingToDo, UserError
from lora_dist.files import MANIFEST, write_manifest
from lora_dist.run import folder as run_folder_module
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.run.resume import begin_or_resume

FACTS = {"num_ranks": 2, "micro_batches_per_step": 8, "mixed_precision": "bf16", "rows": "abc"}


@pytest.fixture
def run(config, tmp_path, monkeypatch):
    """A config, and the folder of a run that began with it. This process takes no locks."""
    monkeypatch.setattr(run_folder_module.fcntl, "flock", lambda *_: None)
    config = dataclasses.replace(config, output_dir=str(tmp_path / "run"), save_steps=2)
    folder, _ = begin_or_resume(config, "opt_quotes", dict(FACTS), 2)
    return config, folder


def add_checkpoint(folder: RunFolder, step: int, config: TrainConfig):
    path = folder.checkpoint(step)
    path.mkdir(parents=True)
    state = {
        "config": dataclasses.asdict(config),
        "facts": FACTS,
        "progress": {"step": step, "eval_step": None},
        "numerics": {},
    }
    (path / "training_state.json").write_text(json.dumps(state))
    (path / "optimizer.safetensors").write_bytes(b"moments")
    write_manifest(path)
    return path


def opened(config: TrainConfig, facts: dict | None = None, num_groups: int = 2, **changes) -> RunFolder:
    """The folder as another start opens it. `facts`: how this start differs from FACTS."""
    config, facts = dataclasses.replace(config, **changes), FACTS | (facts or {})
    folder, notes = begin_or_resume(config, "opt_quotes", facts, num_groups)
    folder.notes = notes
    return folder


def refusal(config: TrainConfig, facts: dict | None = None, **changes) -> str:
    with pytest.raises(UserError) as error:
        opened(config, facts, **changes)
    return str(error.value)


def test_every_setting_named_is_one():
    names = {field.name for field in dataclasses.fields(TrainConfig)} | {"mixed_precision"}
    assert names >= FREE_ON_RESUME | ASK_ON_RESUME and not FREE_ON_RESUME & ASK_ON_RESUME


def test_it_goes_on_from_the_newest_checkpoint(run):
    config, folder = run
    for step in (2, 4):
        add_checkpoint(folder, step, config)
    now = opened(config, {"num_ranks": 1, "micro_batches_per_step": 4})
    assert now.resume_from == folder.checkpoint(4)
    assert now.facts["micro_batches_per_step"] == 8  # that of the first start, on any number of ranks
    assert (now.restarts, now.read_state()["restarts"]) == (1, 1)


@pytest.mark.parametrize("damage", ["no manifest", "a changed byte", "cut short", "an empty manifest"])
def test_a_damaged_checkpoint_is_named_and_not_used(damage, run):
    config, folder = run
    add_checkpoint(folder, 2, config)
    newest = add_checkpoint(folder, 4, config)
    if damage == "no manifest":
        (newest / MANIFEST).unlink()
    elif damage == "a changed byte":
        (newest / "optimizer.safetensors").write_bytes(b"momentz")
    elif damage == "cut short":
        (newest / "optimizer.safetensors").write_bytes(b"mom")
    else:
        (newest / MANIFEST).write_text("{}")
    assert "is damaged" in refusal(config, resume_from_checkpoint=str(newest))
    now = opened(config)
    assert now.resume_from == folder.checkpoint(2)
    assert (
        f"warning: {newest} is damaged or incomplete; it is not used, and is renamed to {newest.name}.damaged"
        in now.notes
    )
    now.undo()  # the start is refused later, for example because of the checkpoint's content
    assert folder.saved_checkpoints() == [folder.checkpoint(2), newest]
    now.begin_training()
    folder.prune_checkpoints(1, best_step=None)
    assert [path.name for path in folder.saved_checkpoints()] == ["step-00000002"]


def test_what_a_kill_left_is_cleared_and_metrics_are_trimmed(run):
    config, folder = run
    add_checkpoint(folder, 2, config)
    for name in ("step-00000004.partial", "step-00000000.removed"):
        (folder.checkpoints / name).mkdir()
    lines = [json.dumps({"train/global_step": step, "train/loss": 1.0}) + "\n" for step in (1, 2, 3)]
    folder.metrics.write_text("".join(lines) + '{"train/global_st')
    before = folder.metrics.read_text()
    now = opened(config)
    assert folder.metrics.read_text() == before and now.last_logged_step == 3
    now.begin_training()
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000002"]
    assert folder.metrics.read_text() == "".join(lines[:2])


def test_without_a_checkpoint_it_begins_again_with_the_same_batches(run):
    config, folder = run
    folder.metrics.write_text(json.dumps({"train/global_step": 0, "eval/loss": 1.0}) + "\n")
    now = opened(config, {"micro_batches_per_step": 4})
    assert now.resume_from is None and now.facts["micro_batches_per_step"] == 8
    now.begin_training()
    assert folder.metrics.read_text() == ""


def test_changed_settings_are_refused_by_name(run):
    config, folder = run
    add_checkpoint(folder, 2, config)
    said = refusal(config, learning_rate=1e-3, max_steps=8)
    assert said.startswith(f"--output_dir {folder.root}: holds a run with other settings: ")
    assert "max_steps was 4, is now 8" in said and "learning_rate was 0.0002, is now 0.001" in said
    assert said.endswith("or --allow_config_change max_steps learning_rate")
    said = refusal(config, lora_r=8, learning_rate=1e-3)
    assert "lora_r was 16, is now 8" in said and "--allow_config_change" not in said  # lora_r cannot change
    assert "lora_r" in refusal(config, lora_r=8, learning_rate=1e-3, allow_config_change=["learning_rate"])
    assert "mixed_precision was bf16, is now no" in refusal(config, {"mixed_precision": "no"})
    assert "dataset_name embedded has other rows now" in refusal(config, {"rows": "xyz"})
    before = folder.config.read_text()
    now = opened(config, learning_rate=1e-3, allow_config_change=["learning_rate"])
    assert "changed in this run: learning_rate was 0.0002, is now 0.001" in now.notes
    assert folder.config.read_text() != before
    assert opened(config, learning_rate=1e-3).resume_from == folder.checkpoint(
        2
    )  # the new value belongs to the run now


def test_settings_that_change_nothing_may_differ(run):
    config, folder = run
    add_checkpoint(folder, 2, config)
    assert opened(config, save_steps=1, resident_layers="all", eval_steps=3, gradient_checkpointing=False).resume_from


def test_accumulation_is_refitted_or_refused(run):
    config, folder = run
    add_checkpoint(folder, 2, config)
    four_ranks = {"num_ranks": 4, "micro_batches_per_step": 8}
    assert opened(config, four_ranks, gradient_accumulation_steps=2).facts["micro_batches_per_step"] == 8
    said = refusal(config, {"micro_batches_per_step": 6}, gradient_accumulation_steps=3)
    assert "gradient_accumulation_steps was 4, is now 3" in said


def test_more_ranks_than_micro_batches_are_refused_with_what_works(run):
    config, folder = run
    add_checkpoint(folder, 2, config)
    state = folder.state.read_bytes()
    with pytest.raises(UserError, match="num_processes 9: a step of this run has 8 micro-batches, so 1 to 8 ranks can"):
        opened(config, {"num_ranks": 9, "micro_batches_per_step": 36}, num_groups=9)
    with pytest.raises(UserError, match="so 1 to 16 ranks can share it"):  # two ranks share each row
        opened(config, {"num_ranks": 18, "micro_batches_per_step": 72}, num_groups=9)
    assert folder.state.read_bytes() == state
    assert opened(config, {"num_ranks": 9, "micro_batches_per_step": 36}, num_groups=1).resume_from  # a pipeline


def test_a_completed_run_is_nothing_to_do_unless_it_is_lengthened(run):
    config, folder = run
    add_checkpoint(folder, 4, config)
    folder.write_state("completed", 4)
    with pytest.raises(NothingToDo, match="the run is completed, at step 4"):
        opened(config)
    assert opened(config, max_steps=8, allow_config_change=["max_steps"]).resume_from == folder.checkpoint(4)


def test_an_asked_checkpoint(run, tmp_path, monkeypatch):
    config, folder = run
    for step in (2, 4):
        add_checkpoint(folder, step, config)
    newest, older = str(folder.checkpoint(4)), str(folder.checkpoint(2))
    assert "holds a run already" in refusal(config, resume_from_checkpoint="none")
    assert "no such checkpoint" in refusal(config, resume_from_checkpoint=str(tmp_path / "step-00000009"))
    assert f"--output_dir {folder.root} holds a newer checkpoint, step-00000004; give another" in refusal(
        config, resume_from_checkpoint=older
    )
    assert opened(config, resume_from_checkpoint=newest).resume_from == folder.checkpoint(4)
    in_place = opened(config, resume_from_checkpoint=str(folder.root), output_dir=None)
    assert in_place.root == folder.root and in_place.resume_from == folder.checkpoint(4)
    with monkeypatch.context() as inside:
        inside.chdir(folder.checkpoints)
        in_place = opened(config, resume_from_checkpoint="step-00000004", output_dir=None)
        assert in_place.root == folder.root and in_place.resume_from == folder.checkpoint(4)
    branch = opened(config, resume_from_checkpoint=older, output_dir=str(tmp_path / "branch"))
    assert branch.root != folder.root and branch.resume_from == folder.checkpoint(2) and branch.restarts == 0
    assert branch.facts == FACTS | {"from": older}
    said = refusal(config, resume_from_checkpoint=older, output_dir=str(tmp_path / "other"), lora_r=8)
    assert said.startswith(f"--resume_from_checkpoint {older}: ")
    # The same command again, with and without the checkpoint, while the branch has no checkpoint of its own.
    for again in (older, "auto"):
        assert (
            opened(config, resume_from_checkpoint=again, output_dir=str(branch.root)).resume_from == branch.resume_from
        )
    assert "holds another run" in refusal(config, resume_from_checkpoint=newest, output_dir=str(branch.root))
    add_checkpoint(branch, 4, config)
    assert opened(config, resume_from_checkpoint=older, output_dir=str(branch.root)).resume_from == branch.checkpoint(4)


def test_a_restart_by_torchrun_needs_a_folder(config, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert refusal(config).startswith("--output_dir None: a restart would not find the run again")


def test_the_lock_goes_with_its_process(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder_module, "LOCK_PATIENCE_S", 0.3)
    hold = "from pathlib import Path; from lora_dist.run.folder import STEP, RunFolder; import time\n"
    hold += f"RunFolder(Path({str(tmp_path)!r})).lock(); print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"is in use by process {holder.pid} on "):
            RunFolder(tmp_path).lock()
    finally:
        holder.kill()
        holder.wait()
    RunFolder(tmp_path).lock()  # the lock file still exists, but is not locked


def test_the_best_checkpoint_is_kept_beside_the_newest(run):
    config, folder = run
    for step in (2, 4, 6, 8):
        add_checkpoint(folder, step, config)
    folder.prune_checkpoints(2, best_step=4)
    assert [path.name for path in folder.saved_checkpoints()] == ["step-00000004", "step-00000006", "step-00000008"]


def test_what_comes_after_the_step_gone_on_from_is_left_out(tmp_path):
    folder = RunFolder(tmp_path)
    files = {folder.metrics: "train/global_step", folder.samples: "train/global_step", folder.bad_steps: "step"}
    for path, key in files.items():
        folder.append_lines(path, [{key: step, "text": "\u2028"} for step in range(9)])
        with open(path, "a") as file:
            file.write('{"' + key)  # cut off by a kill
    with open(folder.metrics, "a") as file:
        file.write('{"a line of its own": 1}\n')  # it follows the cut-off line, so it is lost too
    assert folder.newest_metrics_step() == 8
    folder.trim_metrics(5)
    for path, key in files.items():
        folder.append_lines(path, [{key: 6}])
        assert [line[key] for line in folder.read_lines(path)] == list(range(7))


def test_an_evaluation_that_the_checkpoint_does_not_know_comes_again(tmp_path):
    """A run was stopped and saved before the evaluation at its step; the next start evaluated and was killed."""
    folder = RunFolder(tmp_path)
    lines = [{STEP: 4, "eval/loss": 2.0}, {STEP: 5, "train/loss": 1.0}, {STEP: 5, "eval/loss": 1.5}]
    samples = [{STEP: 4, "completion": "a"}, {STEP: 5, "completion": "b"}]
    for evaluated, left in ((True, 3), (False, 2)):
        for path, of_file in ((folder.metrics, lines), (folder.samples, samples)):
            path.unlink(missing_ok=True)
            folder.append_lines(path, of_file)
        folder.trim_metrics(5, evaluated=evaluated)
        assert folder.read_metrics() == lines[:left] and folder.read_lines(folder.samples) == samples[: left - 1]


def test_each_start_is_a_line_also_after_a_half_written_one(tmp_path):
    folder = RunFolder(tmp_path)
    folder.record_start({"step": 0})
    with open(folder.starts, "a") as file:
        file.write('{"ste')
    folder.previous = {"status": "running", "error": None}
    folder.record_start({"step": 5})
    assert folder.read_lines(folder.starts) == [
        {"step": 0, "previous": None}, {"step": 5, "previous": {"status": "running", "error": None}}
    ]  # fmt: skip
