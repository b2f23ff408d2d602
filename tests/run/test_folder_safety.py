"""A run folder's safety: we write and delete only what is ours."""

import dataclasses
import json
import os

import pytest

from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.files import MANIFEST, is_complete, write_manifest
from lora_dist.model.adapters import compare_tensors
from lora_dist.run.folder import RunFolder, read_training_state
from lora_dist.run.ours import remove
from lora_dist.run.resume import _read_run, begin_or_resume
from lora_dist.training.checkpoint import _check_progress
from lora_dist.training.run import Progress

FACTS = {"num_ranks": 1, "micro_batches_per_step": 8, "mixed_precision": "no", "rows": "abc"}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def write(root, *names: str, text: str = "precious") -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def contents(root) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else b"" for p in sorted(root.rglob("*"))}


def add_checkpoint(folder: RunFolder, step: int):
    path = folder.checkpoint(step)
    write(path, "adapter/adapter_model.safetensors", "adapter/unheard.vocab", "training_state.json", text="ours")
    write_manifest(path)
    return path


@pytest.mark.parametrize(
    "name",
    ["config.yaml", "adapter/notes.txt", "report.html", "metrics.jsonl", "photo.jpg", ".hidden", "job.txt",
     "job/config.yaml", "job/job.sbatch"],
)  # fmt: skip
def test_a_folder_with_files_of_others_is_refused_and_untouched(folder, config, name):
    write(folder.root, name)
    before = contents(folder.root)
    with pytest.raises(UserError, match="holds files that no run of lora-dist wrote .*give an empty or new folder"):
        folder.lock()
    assert contents(folder.root) == before


def test_an_adapter_beside_state_json_alone_is_refused_and_untouched(folder, config):
    """Both are all that `generate` reads, so somebody may keep only these."""
    folder.root.mkdir()
    folder.begin(dataclasses.replace(config, output_dir=str(folder.root)))
    folder.config.unlink()
    write(folder.adapter, "adapter_model.safetensors")
    before = contents(folder.root)
    with pytest.raises(UserError, match="holds a run that cannot be read: config.yaml"):
        begin_or_resume(dataclasses.replace(config, output_dir=str(folder.root)), "r", dict(FACTS), 1)
    assert contents(folder.root) == before


@pytest.mark.parametrize("make", ["text", "link", "pipe"])
def test_what_has_the_name_of_a_file_of_ours_is_kept(folder, tmp_path, make):
    folder.root.mkdir()
    target = tmp_path / "target"
    target.write_text("mine")
    lock, partial = folder.root / ".lock", folder.root / "state.json.partial"
    if make == "text":
        lock.write_text("mine")
        with pytest.raises(UserError, match=".lock in it is of something else"):
            folder.lock()
        assert lock.read_text() == "mine"
        return
    partial.symlink_to(target) if make == "link" else os.mkfifo(partial)
    folder.lock()
    with pytest.raises(UserError, match="^--output_dir .*: cannot be written: "):
        folder.begin(TrainConfig(model_name_or_path="embedded", dataset_name="embedded", max_steps=4))
    assert target.read_text() == "mine" and partial.is_symlink() == (make == "link")


@pytest.mark.parametrize("text", ["mine", '{"a": 1}', "[]", ""])
def test_a_state_json_of_others_is_refused_and_untouched(folder, config, text):
    write(folder.root, "state.json", text=text)
    before = contents(folder.root)
    with pytest.raises(UserError, match="^--output_dir .*: holds a run that cannot be read: state.json: "):
        folder.lock()
    assert contents(folder.root) == before


@pytest.mark.parametrize(
    "names", [(), ("job/job.sbatch", "logs/1-node0.log"), ("train.log", "slurm-3.out"), (".lock",)]
)
def test_logs_and_a_job_may_be_there_before_a_run(folder, names):
    folder.root.mkdir()
    write(folder.root, *names, text="")
    if folder.job.is_dir():
        write_manifest(folder.job)
    folder.lock()


def test_a_file_a_dangling_link_and_a_path_below_a_file_are_refused(folder, tmp_path):
    folder.root.write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for root in (folder.root, tmp_path / "link", folder.root / "below", tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(UserError, match="^--output_dir "):
            RunFolder(root).lock()
    assert folder.root.read_text() == "mine"


def test_the_lock_does_not_follow_a_link(folder, tmp_path):
    write(tmp_path, "mine")
    folder.root.mkdir()
    (folder.root / ".lock").symlink_to(tmp_path / "mine")
    with pytest.raises(UserError, match="^--output_dir "):
        folder.lock()
    assert (tmp_path / "mine").read_text() == "precious"


def test_copies_beside_checkpoints_are_neither_read_nor_deleted(folder):
    for step in (2, 4, 6):
        add_checkpoint(folder, step)
    names = ("step-00000002-mine", "step-00000002.bak", "step-2", "step-000000021", "step-note.partial", "x.removed")
    for name in names:
        write(folder.checkpoints / name, MANIFEST, "adapter/adapter_model.safetensors")
    write(folder.checkpoints, "step-note", "step-00000009")
    kept = contents(folder.checkpoints)
    folder.clear_leftovers()
    folder.prune_checkpoints(1, best_step=None)
    assert folder.newest_whole_checkpoint() == (folder.checkpoint(6), [])
    gone = kept.keys() - contents(folder.checkpoints).keys()
    assert gone and all(name.startswith(("step-00000002/", "step-00000004/")) or "/" not in name for name in gone)
    assert {name for name in gone if "/" not in name} == {"step-00000002", "step-00000004"}


def test_a_file_of_others_in_our_checkpoint_is_kept_with_one_warning(folder, capsys):
    for step in (2, 4):
        write(add_checkpoint(folder, step), "notes.txt")
    folder.prune_checkpoints(1, best_step=None)
    removed = folder.checkpoints / "step-00000002.removed"
    assert contents(removed) == {"notes.txt": b"precious"}
    assert capsys.readouterr().err == f"warning: {removed}: kept, because no run wrote 'notes.txt'\n"
    folder.clear_leftovers()
    assert contents(removed) == {"notes.txt": b"precious"} and not capsys.readouterr().err


def test_a_file_of_others_moves_along_when_a_folder_is_replaced(folder):
    write(folder.adapter, "README.md", "notes.txt", "more/photo.jpg", "adapter_config.json", text="old")
    for text in ("first", "second"):
        write(folder.make_partial(folder.adapter), "README.md", text=text)
        folder.put_in_place(folder.partial_name(folder.adapter), folder.adapter)
    assert contents(folder.root) == {
        "adapter": b"", "adapter/README.md": b"second", "adapter/notes.txt": b"old", "adapter/more": b"",
        "adapter/more/photo.jpg": b"old",
    }  # fmt: skip


def test_what_is_removed_twice_keeps_both_files_of_others(folder):
    for text in ("first", "second"):
        write(folder.adapter, "adapter_config.json", "README.md", text="ours")
        write(folder.adapter, "notes.txt", text=text)
        remove(folder.adapter)
    assert contents(folder.root) == {
        "adapter.removed": b"", "adapter.removed/notes.txt": b"first",
        "adapter.removed-2": b"", "adapter.removed-2/notes.txt": b"second",
    }  # fmt: skip


def test_a_file_in_place_of_our_folder_is_set_aside(folder):
    write(folder.checkpoints, "step-00000004", "step-00000004.partial")
    folder.put_in_place(folder.make_partial(folder.checkpoint(4)), folder.checkpoint(4))
    assert sorted(contents(folder.checkpoints).values()) == [b"", b"precious", b"precious"]


def test_leftovers_of_a_kill_lose_only_what_is_ours(folder):
    write(folder.checkpoints / "step-00000004.partial", "optimizer.safetensors", "adapter/tokenizer.json", "notes.txt")
    write(folder.checkpoints / "step-00000002.removed-2", "training_state.json")
    folder.clear_leftovers()
    assert contents(folder.checkpoints).keys() == {"step-00000004.partial", "step-00000004.partial/notes.txt"}


@pytest.mark.parametrize(
    "manifest",
    ["[]", "null", "3", '["a"]', '{"a": {}}', '{"a": 1}', "[" * 100_000, '{"a\\u0000": {"bytes": 1}}', "\0\xff", "{}",
     "folder", "pipe", "outside", "up", "entry is a pipe"],
)  # fmt: skip
def test_any_manifest_is_whole_or_damaged(folder, tmp_path, manifest):
    path = add_checkpoint(folder, 2)
    write(tmp_path, "secret", text="ours")  # what it would hold is right
    (path / "optimizer.safetensors").touch()
    write_manifest(path)
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).unlink()
    if manifest == "folder":
        (path / MANIFEST).mkdir()
    elif manifest == "pipe":
        os.mkfifo(path / MANIFEST)
    elif manifest in ("outside", "up"):
        name = str(tmp_path / "secret") if manifest == "outside" else "../../../secret"
        (path / MANIFEST).write_text(text.replace("training_state.json", name))
    elif manifest == "entry is a pipe":
        (path / MANIFEST).write_text(text)
        (path / "optimizer.safetensors").unlink()
        os.mkfifo(path / "optimizer.safetensors")
    else:
        (path / MANIFEST).write_text(manifest)
    assert not is_complete(path)
    assert folder.newest_whole_checkpoint() == (None, [path])
    folder.mark_damaged(path)
    assert (tmp_path / "secret").read_text() == "ours"


def test_a_run_that_was_killed_before_its_state_can_begin(folder, config):
    write(folder.root, ".lock", "state.json.partial", text="")
    config = dataclasses.replace(config, output_dir=str(folder.root))
    begun, _ = begin_or_resume(config, "opt_quotes", dict(FACTS), 1)
    assert begun.state.exists()


@pytest.mark.parametrize("text", ["3\n", "null\n", "[]\n", '{"a": 1}\n', "\x00\xff\n", "[" * 100_000 + "\n",
                                  '{"train/global_step": "x"}\n', '{"train/global_step": null}\n'])  # fmt: skip
def test_lines_of_any_content_are_left_out(tmp_path, text):
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(text.encode("latin-1") + b'{"train/global_step": 1}\n')
    folder.trim_metrics(1)
    assert folder.metrics.read_text() == '{"train/global_step": 1}\n'
    assert folder.newest_metrics_step() == 1 and all(isinstance(line, dict) for line in folder.read_metrics())


@pytest.mark.parametrize("state", ["[]", "{}", '{"progress": 1}', '{"progress": {"step": -1}}',
                                   '{"progress": {"step": 2}, "facts": {}, "config": {}, "numerics": {}}',
                                   '{"progress": {"step": 1}, "facts": {"rows": 1}, "config": {}, "numerics": {}}',
                                   '{"progress": {"step": true}, "facts": {}, "config": {}, "numerics": {}}',
                                  ])  # fmt: skip
def test_the_state_of_another_step_or_shape_is_refused(tmp_path, state):
    path = add_checkpoint(RunFolder(tmp_path), 1)
    (path / "training_state.json").write_text(state)
    with pytest.raises(UserError, match=r"training_state\.json"):
        read_training_state(path)
    good = {"progress": {"step": 1}, "facts": FACTS, "config": {}, "numerics": {}}
    (path / "training_state.json").write_text(json.dumps(good))
    assert read_training_state(path) == good


def test_a_tensor_of_another_name_shape_or_type_is_refused():
    import torch

    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    compare_tensors("optimizer", {name: tensor.clone() for name, tensor in expected.items()}, expected)
    for changed, says in [
        ({"a": torch.zeros(1, 3)}, r"a of the optimizer is torch.float32 \(1, 3\), and the run needs"),
        ({"a": torch.zeros(2, 3).half()}, "float16"),
        ({"c": torch.zeros(1)}, "lacks, or has besides the run's own, c"),
    ]:
        with pytest.raises(ValueError, match=says):
            compare_tensors("optimizer", expected | changed, expected)
    with pytest.raises(ValueError, match="lacks"):
        compare_tensors("optimizer", {"a": expected["a"]}, expected)


def test_a_refused_start_leaves_no_folder(folder, tmp_path):
    folder = RunFolder(tmp_path / "a/b/run")
    folder.lock()
    folder.write_state("running", 0)
    folder.record_start({"step": 0})
    folder.metrics.touch()
    folder.record_failure("--lora_r 0: must be more", refused=True)
    assert not (tmp_path / "a").exists()
    folder.lock()
    folder.has_begun = True
    folder.write_state("running", 0)
    folder.record_failure("row 7 is empty", refused=True)
    assert folder.read_state()["status"] == "failed"


def test_a_refused_start_leaves_a_folder_as_it_was(folder):
    (folder.root / "logs").mkdir(parents=True)
    write(folder.root, "train.log")
    before = contents(folder.root)
    folder.lock()
    folder.write_state("running", 0)
    folder.undo()
    assert contents(folder.root) == before


def test_a_refused_start_leaves_a_run_as_it_was(folder, config):
    config = dataclasses.replace(config, output_dir=str(folder.root))
    folder, _ = begin_or_resume(config, "opt_quotes", dict(FACTS), 1)
    before = contents(folder.root)
    again = RunFolder(folder.root)
    again._lock = os.dup(folder._lock)  # this process has the lock already
    again.lock()
    again.write_state("running", 7)
    again.write_config(dataclasses.replace(config, lora_r=3))
    again.record_start({"step": 0})
    again.undo()
    after = contents(folder.root)
    assert after.keys() == before.keys()
    assert after["state.json"] == before["state.json"] and after["config.yaml"] == before["config.yaml"]


def test_a_lock_on_a_deleted_file_is_no_lock(folder):
    folder.lock()
    other = RunFolder(folder.root)
    other._lock = os.dup(folder._lock)
    folder.undo()
    folder.root.mkdir()
    assert other._try_lock() and os.path.samestat(os.fstat(other._lock), os.stat(folder.root / ".lock"))


@pytest.mark.parametrize("state", ["{}", "[]", "null", "3", "\0", '{"hello": "terraform"}', "[" * 100_000])
def test_a_state_of_others_is_refused_and_the_folder_untouched(folder, config, state):
    write(folder.root, "photo.jpg", "config.yaml")
    write(folder.root, "state.json", text=state)
    before = contents(folder.root)
    with pytest.raises(UserError, match=f"^--output_dir {folder.root}: ") as raised:
        begin_or_resume(dataclasses.replace(config, output_dir=str(folder.root)), "opt_quotes", dict(FACTS), 1)
    assert "\n" not in str(raised.value) and contents(folder.root) == before


BAD_VALUES = [-1, True, "5", None, [], {}, 1e300, float("nan"), 10**30]


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("name", ["step", "restarts", "status", "wandb_run_id", "facts", "num_ranks", "from"])
def test_a_state_with_impossible_values_is_refused(folder, config, name, value):
    if value is None and name in ("wandb_run_id", "from"):
        return
    if isinstance(value, str) and name in ("wandb_run_id", "from"):
        return
    folder.root.mkdir()
    folder.facts = dict(FACTS)
    folder.begin(config)
    state = folder.read_state()
    (state["facts"] if name in ("num_ranks", "from") else state)[name] = value
    folder.state.write_text(json.dumps(state))
    with pytest.raises(UserError, match=f"^--output_dir {folder.root}: ") as raised:
        _read_run(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.jsonl", "bad_steps.jsonl", "report.html", "starts.jsonl",
                                  "state.json", "config.yaml", "checkpoints"])  # fmt: skip
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo])
def test_a_folder_or_a_pipe_in_place_of_a_file_is_refused(folder, config, name, make):
    if (name, make) == ("checkpoints", os.mkdir):
        return
    folder.root.mkdir()
    folder.facts = dict(FACTS)
    folder.begin(config)
    (folder.root / name).unlink(missing_ok=True)
    make(folder.root / name)
    with pytest.raises(UserError, match=f"^--output_dir {folder.root}: .*{name}") as raised:
        begin_or_resume(dataclasses.replace(config, output_dir=str(folder.root)), "opt_quotes", dict(FACTS), 1)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", BAD_VALUES)
@pytest.mark.parametrize("name", ["step", "tokens_seen", "train_time_s", "first_losses", "best_step", "eval_loss", "x"])
def test_a_progress_with_impossible_values_is_refused(name, value):
    may_be = {"best_step": [None], "eval_loss": [None, -1, 1e300, 10**30], "first_losses": [[]],
              "train_time_s": [1e300, 10**30]}  # fmt: skip
    if value in may_be.get(name, []) or (name == "eval_loss" and value != value):
        return
    with pytest.raises((ValueError, TypeError)):
        _check_progress(Progress(**{name: value}))
