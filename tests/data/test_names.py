"""Several files after one flag, as a shell writes them for a pattern."""

import json

import pytest

from lora_dist.config import TrainConfig
from lora_dist.flags import parse_config
from tests.helpers.ranks import launch


@pytest.mark.parametrize(
    "words, value",
    [
        (["--dataset_name", "a.jsonl"], "a.jsonl"),
        (["--dataset_name", "a b.jsonl"], "a b.jsonl"),
        (["--dataset_name", "a.jsonl", "b c.jsonl"], "a.jsonl 'b c.jsonl'"),
        (["--dataset-name", "a.jsonl", "b.jsonl", "--max_length", "64"], "a.jsonl b.jsonl"),
        (["--max_length", "64", "--dataset_name=a.jsonl"], "a.jsonl"),
        (["--dataset_name", "a", "b", "--dataset_name", "c", "d"], "c d"),
    ],
)
def test_boundary_all_names_after_the_flag_are_one_value(words, value):
    config = parse_config(TrainConfig(), ["--model_name_or_path", "embedded", *words])
    assert config.dataset_name == value


def test_boundary_doctor_takes_several_files(tmp_path):
    files = [tmp_path / "a b.jsonl", tmp_path / "c.jsonl"]
    for file in files:
        file.write_text(json.dumps({"text": file.name}) + "\n")
    done = launch("lora-dist", "doctor", "--eval_fraction", "0", "--data", *map(str, files), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["examples"] == ["⟦</s>a b.jsonl</s>⟧", "⟦</s>c.jsonl</s>⟧"]
