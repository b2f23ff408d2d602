"""A run writes and deletes only what runs wrote, and reads a run folder of any content in one line."""

import json

import pytest

from lora_dist.errors import UserError
from lora_dist.files import write_manifest
from lora_dist.run.folder import RunFolder, read_training_state
from lora_dist.training.checkpoint import _compare


def checkpoint(folder: RunFolder, step: int):
    path = folder.checkpoint(step)
    (path / "adapter").mkdir(parents=True)
    (path / "adapter/adapter_model.safetensors").touch()
    (path / "optimizer.safetensors").touch()
    write_manifest(path)
    return path


@pytest.mark.parametrize("name", ["adapter", "config.yaml", "report.html", "notes.txt", ".git", "metrics.jsonl"])
def test_a_folder_with_files_of_others_is_refused_untouched(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match=f"holds files that no run of lora-dist wrote \\({name}\\); give an empty"):
        RunFolder(tmp_path).lock()
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize("names", [[], ["job", "logs"], [".lock", "config.yaml"], [".lock", ".starts", "wandb"],
                                   ["state.json", "notes.txt"]])  # fmt: skip
def test_a_folder_of_a_run_or_of_its_job_is_used(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    RunFolder(tmp_path).refuse_files_of_others()


def test_a_file_or_a_link_to_nothing_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "absent")
    for name in ("file", "link"):
        with pytest.raises(UserError, match="is not a folder"):
            RunFolder(tmp_path / name).lock()


def test_copies_that_a_user_made_are_neither_read_nor_pruned_nor_cleared(tmp_path):
    folder = RunFolder(tmp_path)
    ours = [checkpoint(folder, step) for step in (1, 2, 3)]
    users = [
        checkpoint(folder, 1).rename(folder.checkpoints / name)
        for name in ("step-00000001-mine", "step-backup", "step-00000001.old", "x.partial", "step-1", "my.removed")
        if not folder.checkpoint(1).exists() or folder.remove(folder.checkpoint(1)) is None
    ]
    ours[0] = checkpoint(folder, 1)
    (folder.checkpoints / "step-note").write_text("a note")
    assert folder.saved_checkpoints() == ours
    folder.prune_checkpoints(1, None)
    folder.clear_leftovers()
    assert folder.saved_checkpoints() == ours[2:]
    assert all((path / "optimizer.safetensors").exists() for path in users) and len(users) == 6
    assert (folder.checkpoints / "step-note").read_text() == "a note"


def test_a_users_file_in_a_checkpoint_or_adapter_survives(tmp_path, capsys):
    folder = RunFolder(tmp_path)
    path = checkpoint(folder, 1)
    (path / "notes.txt").write_text("mine")
    folder.remove(path)
    assert (path.with_suffix(".removed") / "notes.txt").read_text() == "mine" and not path.exists()
    assert "kept notes.txt" in capsys.readouterr().err
    folder.adapter.mkdir()
    for name in ("notes.txt", "adapter_config.json", "chat_template.jinja"):
        (folder.adapter / name).write_text("old")
    partial = folder.make_partial(folder.adapter)
    (partial / "adapter_config.json").write_text("new")
    folder.put_in_place(partial, folder.adapter)
    assert {p.name: p.read_text() for p in folder.adapter.iterdir()} == {
        "adapter_config.json": "new", "notes.txt": "old",
    }  # fmt: skip
    assert not folder.adapter.with_suffix(".removed").exists()


@pytest.mark.parametrize("manifest", ['["a"]', '{"a": {}}', '{"a": 3}', "null", '{"../users.txt": {"bytes": 0}}',
                                      '{"/etc/hostname": {}}', "[" * 100_000, "\x00"])  # fmt: skip
def test_a_manifest_of_any_content_is_a_damaged_checkpoint(tmp_path, manifest):
    folder = RunFolder(tmp_path)
    path = checkpoint(folder, 1)
    (folder.checkpoints / "users.txt").touch()
    (path / "manifest.json").write_text(manifest)
    assert folder.newest_whole_checkpoint() == (None, [path])
    folder.remove(path)
    assert not path.exists() and (folder.checkpoints / "users.txt").exists()


@pytest.mark.parametrize("text", ["3\n", "null\n", "[]\n", '{"a": 1}\n', "\x00\xff\n", "[" * 100_000 + "\n",
                                  '{"train/global_step": "x"}\n', '{"train/global_step": null}\n'])  # fmt: skip
def test_lines_of_any_content_are_left_out(tmp_path, text):
    folder = RunFolder(tmp_path)
    folder.metrics.write_bytes(text.encode("latin-1") + b'{"train/global_step": 1}\n')
    folder.trim_metrics(1)
    assert folder.metrics.read_text() == '{"train/global_step": 1}\n'
    assert folder.last_logged_step == 1 and all(isinstance(line, dict) for line in folder.read_metrics())


@pytest.mark.parametrize("state", ["[]", "{}", '{"progress": 1}', '{"progress": {"step": -1}}',
                                   '{"progress": {"step": 2}, "facts": {}, "config": {}, "numerics": {}}'])  # fmt: skip
def test_the_state_of_another_step_or_shape_is_refused(tmp_path, state):
    path = checkpoint(RunFolder(tmp_path), 1)
    (path / "training_state.json").write_text(state)
    with pytest.raises(UserError, match=r"training_state\.json"):
        read_training_state(path)
    good = {"progress": {"step": 1}, "facts": {}, "config": {}, "numerics": {}}
    (path / "training_state.json").write_text(json.dumps(good))
    assert read_training_state(path) == good


def test_a_tensor_of_another_name_shape_or_type_is_refused():
    import torch

    expected = {"a": torch.zeros(2, 3), "b": torch.zeros(())}
    _compare("optimizer", {name: tensor.clone() for name, tensor in expected.items()}, expected)
    for changed, says in [
        ({"a": torch.zeros(1, 3)}, r"a of the optimizer is torch.float32 \(1, 3\), and the run needs"),
        ({"a": torch.zeros(2, 3).half()}, "float16"),
        ({"c": torch.zeros(1)}, "lacks, or has besides the run's own, c"),
    ]:
        with pytest.raises(ValueError, match=says):
            _compare("optimizer", expected | changed, expected)
    with pytest.raises(ValueError, match="lacks"):
        _compare("optimizer", {"a": expected["a"]}, expected)
