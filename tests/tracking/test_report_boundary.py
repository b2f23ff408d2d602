"""Reports and statuses of run folders with anything in them: what can be read is shown, and the rest is named."""

import argparse
import json
import os
import re

import pytest

from lora_dist import commands
from lora_dist.cluster import status
from lora_dist.errors import UserError
from lora_dist.tracking.record import RunRecord
from lora_dist.tracking.report import render, render_comparison
from tests.helpers.reported_runs import SUMMARY, make_folder, page, step_line

FILES = ("state.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "starts.jsonl", "bad_steps.jsonl",
         "profile/table.json", "job/submitted.json")  # fmt: skip
CONTENTS = [
    b"[]\n",
    b"null\n",
    b"3\n",
    b"\0\xff\xfe\n",
    b"[" * 100_000 + b"\n",
    b'{"a": {"b": [null]}}\n',
    b"{" + b"\n",
]
OBJECT = CONTENTS[-2]
HARMLESS = {("config.yaml", b"null\n"), *((name, OBJECT) for name in ("config.yaml", "state.json", "starts.jsonl",
            "job/submitted.json"))}  # fmt: skip
VALUES = [None, "x", -1, True, [], {}, [None], {"a": None}, float("nan"), float("inf"), 1e300, 10**400, "\0"]


@pytest.fixture
def folder(tmp_path, config, monkeypatch):
    monkeypatch.setattr(status, "job_fields", lambda job_id: {})
    return make_folder(tmp_path / "run", config)


def shown(folder) -> tuple[list[str], str, str]:
    """(problems of the report, the page, the text of the status), after both were made as one run and as two."""
    record = RunRecord(folder)
    text = render(record)
    render_comparison([RunRecord(folder), RunRecord(folder)])
    found = status.read_status(folder.root)
    json.dumps(found.as_dict())
    status.comparison([found, found])
    assert all("\n" not in problem for problem in record.problems)
    return record.problems, text, found.text()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [*CONTENTS, os.mkdir, os.mkfifo])
def test_any_content_of_any_file(folder, name, content):
    path = folder.root / name
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    problems, text, status_text = shown(folder)
    if name == "job/submitted.json":  # only the status reads it
        problems, text = status_text.splitlines(), "Not everything"
    if (name, content) not in HARMLESS:
        assert any(name in problem for problem in problems), problems
        assert "Not everything" in text


@pytest.mark.parametrize("value", VALUES)
def test_any_value_in_the_state(folder, value):
    state = folder.read_state()
    for changed in (dict.fromkeys(state, value), state | {"summary": dict.fromkeys(SUMMARY, value)}):
        folder.state.write_text(json.dumps(changed))
        _, text, _ = shown(folder)
        assert "before" in text  # the samples are shown all the same


@pytest.mark.parametrize("value", VALUES)
def test_any_value_in_the_lines(folder, value):
    files = [(folder.metrics, step_line(11, **{"eval/loss": 1.0, "memory/rank0/peak_allocated_gib": 1.0})),
             (folder.starts, folder.read_lines(folder.starts)[0]),
             (folder.samples, folder.read_lines(folder.samples)[0]),
             (folder.bad_steps, {"step": 3, "loss": "nan", "grad_norm": "nan", "micro_batches": []})]  # fmt: skip
    for path, line in files:
        before = path.read_text() if path.exists() else ""
        path.write_text(before + "".join(json.dumps(line | {name: value}) + "\n" for name in line))
        _, text, _ = shown(folder)
        assert "Held-out" in text or "held-out" in text
        path.write_text(before)


def test_what_is_whole_has_no_problems(folder):
    assert shown(folder)[0] == [] and "Not everything" not in page(folder)


def report(*folders, output=None) -> None:
    commands.report(argparse.Namespace(run_folders=[str(folder.root) for folder in folders], output=output))


@pytest.mark.parametrize("make", ["file", "folder", "pipe", "link"])
def test_safety_of_what_output_names(folder, tmp_path, make):
    path = tmp_path / "notes.txt"
    {"file": lambda: path.write_text("mine"), "folder": path.mkdir, "pipe": lambda: os.mkfifo(path),
     "link": lambda: path.symlink_to(tmp_path / "nowhere")}[make]()  # fmt: skip
    with pytest.raises(UserError, match=f"^--output {path}: is there, and is no page of lora-dist"):
        report(folder, output=str(path))
    assert make != "file" or path.read_text() == "mine"


def test_safety_of_a_page_of_somebody_else_in_the_folder(folder):
    folder.report.write_text("mine")
    with pytest.raises(UserError, match="is there, and is no page of lora-dist"):
        report(folder)
    assert folder.report.read_text() == "mine"


@pytest.mark.parametrize("make", ["file", "link", "pipe"])
def test_safety_of_what_is_beside_the_page(folder, tmp_path, make):
    """A page is written under this name first."""
    path, partial = tmp_path / "a.html", tmp_path / "a.html.partial"
    (tmp_path / "target").write_text("mine")
    {"file": lambda: partial.write_text("mine"), "pipe": lambda: os.mkfifo(partial),
     "link": lambda: partial.symlink_to(tmp_path / "target")}[make]()  # fmt: skip
    with pytest.raises(UserError, match=f"^--output {partial}: is there, and is no page of lora-dist"):
        report(folder, output=str(path))
    assert not path.exists() and (tmp_path / "target").read_text() == "mine"


def test_a_config_that_is_not_of_a_run_is_compared_all_the_same(folder, tmp_path):
    text = folder.config.read_text()
    folder.config.write_text(re.sub("^task_type: .*$", "task_type: [a]", text, flags=re.MULTILINE))
    report(folder, folder, output=str(tmp_path / "b.html"))
    assert (tmp_path / "b.html").exists()


def test_a_page_is_drawn_again_over_itself(folder, tmp_path, capsys):
    for _ in range(2):
        report(folder, output=str(tmp_path / "a.html"))
        report(folder, folder, output=str(tmp_path / "b.html"))
        report(folder)
    folder.state.write_text("[]")
    report(folder)
    assert "warning: cannot be read: state.json" in capsys.readouterr().err
    with pytest.raises(UserError, match="^--output .*no/folder"):
        report(folder, output=str(tmp_path / "no/folder/a.html"))


def test_push_sends_what_can_be_read(folder, monkeypatch, capsys):
    from lora_dist.tracking import wandb_run

    sent = []
    monkeypatch.setattr(wandb_run, "_init", lambda *args, **kwargs: sent.append(wandb_run._wandb_config(folder)) or W())
    monkeypatch.setenv("WANDB_MODE", "offline")

    class W:
        url = "https://a"
        log = staticmethod(lambda values, step: sent.append(step))
        finish = staticmethod(lambda exit_code: None)

    monkeypatch.setattr(wandb_run, "_table", lambda samples, step: None)
    folder.state.write_text("[]")
    folder.config.write_bytes(b"\xff")
    folder.append_lines(folder.metrics, [{"train/global_step": "x"}])
    assert wandb_run.push(folder, None, None) == "https://a"
    assert sent[0]["config"] == {} and sent[1:] == list(range(11))
    said = capsys.readouterr().err
    assert "cannot be read: state.json" in said and "cannot be read: metrics.jsonl: 1 of its lines" in said
    folder.starts.write_text("null\n")
    with pytest.raises(UserError, match="has no starts.jsonl"):
        wandb_run.push(folder, None, None)


@pytest.mark.parametrize("content", [*CONTENTS, os.mkfifo])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "tokenizer.json"])
def test_generate_of_any_adapter_is_one_line(tmp_path, name, content):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    good = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tmp_path / "no"), "r": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(good))
    (adapter / name).unlink(missing_ok=True)
    content(adapter / name) if callable(content) else (adapter / name).write_bytes(content)
    args = argparse.Namespace(adapter=str(adapter), prompt="a", bare=False, json=False, max_new_tokens=1)
    with pytest.raises(UserError, match=f"^--adapter {adapter}: ") as raised:
        commands.generate(args)
    assert "\n" not in str(raised.value)
