"""Whatever stands in the files of a run folder, the run is continued, or refused in one line and left as it is."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import strategies as st

from lora_dist.cluster.status import comparison, read_status
from lora_dist.config import TrainConfig
from lora_dist.files import MANIFEST, write_manifest
from lora_dist.run import folder as run_folder_module
from lora_dist.run.folder import STEP, RunFolder
from lora_dist.run.resume import begin_or_resume
from lora_dist.tracking.report import write_comparison, write_report
from tests.helpers.properties import answered, counts, holds, json_values, mutations, words
from tests.helpers.reported_runs import make_folder

FACTS = {"num_ranks": 2, "micro_batches_per_step": 8, "mixed_precision": "bf16", "rows": "abc"}
FILES = ["state.json", "config.yaml", "metrics.jsonl", "samples.jsonl", "starts.jsonl"]
FILES += [f"checkpoints/step-00000002/{name}" for name in (MANIFEST, "training_state.json")]


def dumped(value) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture
def run(config, tmp_path, monkeypatch) -> tuple[TrainConfig, Path]:
    """The config and the folder of a run that was interrupted after step 3. This process takes no locks."""
    monkeypatch.setattr(run_folder_module.fcntl, "flock", lambda *_: None)
    config = dataclasses.replace(config, output_dir=str(tmp_path / "run"), save_steps=2)
    folder, _ = begin_or_resume(config, "opt_quotes", dict(FACTS), 2)
    path = folder.checkpoint(2)
    path.mkdir(parents=True)
    progress = {"step": 2, "eval_step": None}
    (path / "training_state.json").write_bytes(
        dumped({"config": dataclasses.asdict(config), "facts": FACTS, "progress": progress})
    )
    (path / "optimizer.safetensors").write_bytes(b"moments")
    write_manifest(path)
    folder.append_lines(folder.metrics, [{STEP: step, "time": 1.0, "train/loss": 2.0} for step in range(4)])
    folder.append_lines(folder.samples, [{STEP: 0, "prompt": "a", "completion": "b"}])
    folder.record_start({"step": 0, "strategy": "ddp"})
    return config, folder.root


@st.composite
def changed(draw, content: bytes) -> bytes:
    """The file of JSON or YAML with one of its values changed or left out, at any depth."""
    parsed = place = yaml.safe_load(content.decode())
    while isinstance(place, dict) and place:
        key = draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and draw(st.booleans()):
            place = place[key]
            continue
        if draw(st.booleans()):
            place[key] = draw(json_values)
        else:
            del place[key]
        break
    return dumped(parsed)


def damaged(root: Path) -> st.SearchStrategy:
    """(name of a file in the folder, other content for it)."""
    whole = {name: (root / name).read_bytes() for name in FILES if (root / name).exists()}
    lines = st.lists(st.dictionaries(st.just(STEP) | words, json_values, max_size=3) | json_values, max_size=3)
    as_lines = lines.map(lambda values: b"".join(dumped(value) + b"\n" for value in values))

    def contents(name: str) -> st.SearchStrategy:
        other = as_lines if name.endswith("l") and not name.endswith("yaml") else changed(whole[name])
        return st.one_of(other, other, mutations(whole[name]), st.binary(max_size=50), json_values.map(dumped))

    return st.sampled_from(sorted(whole)).flatmap(lambda name: st.tuples(st.just(name), contents(name)))


def with_damage(root: Path, check: Callable[[RunFolder], None]) -> Callable[[tuple[str, bytes]], None]:
    """`check` as a function of the damage, on a folder that is whole but for it."""
    whole = root.with_name("whole")
    shutil.copytree(root, whole)

    def damage_and_check(damage: tuple[str, bytes]) -> None:
        shutil.rmtree(root)
        shutil.copytree(whole, root)
        name, content = damage
        (root / name).write_bytes(content)
        with answered(root):
            check(RunFolder(root))

    return damage_and_check


@counts
@pytest.mark.parametrize("from_checkpoint", [False, True])
def test_any_bytes_in_a_file_of_a_run_that_goes_on(count, from_checkpoint, run):
    config, root = run

    def resume(folder: RunFolder) -> None:
        requested = str(root / "checkpoints/step-00000002") if from_checkpoint else "auto"
        again = dataclasses.replace(config, resume_from_checkpoint=requested)
        folder, _ = begin_or_resume(again, "opt_quotes", dict(FACTS), 2)
        folder.record_start({"step": folder.step})
        folder.prune_checkpoints(2, None)
        folder.record_failure("a test")

    without_summary = json.loads((root / "state.json").read_bytes())
    del without_summary["summary"]
    holds(count, damaged(root), with_damage(root, resume), ("state.json", dumped(without_summary)))


@counts
def test_any_bytes_in_a_file_of_a_run_that_is_shown(count, config, tmp_path):
    folder = make_folder(tmp_path / "run", config)
    other = make_folder(tmp_path / "other", config)

    def show(folder: RunFolder) -> None:
        status = read_status(folder.root)
        status.text()
        json.dumps(status.as_dict())
        comparison([read_status(other.root), status])
        write_report(folder)
        write_comparison([folder, other], tmp_path / "comparison.html")

    half = dumped({STEP: 0, "prompt": "\ud800", "completion": "b"})  # of a character
    known = ("config.yaml", b'{"\\ud800"}'), ("config.yaml", b'{"\\ud800": 1}'), ("samples.jsonl", half + b"\n")
    holds(count, damaged(folder.root), with_damage(folder.root, show), *known)
