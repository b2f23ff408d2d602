import dataclasses
import re

import pytest
import yaml

from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.flags import parse_config

DEFAULTS = TrainConfig(dataset_text_field="quote", max_steps=200)


def test_flags_override_the_file_and_the_file_the_recipe(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "lora_r: 8\nlearning_rate: 1e-3\nlora_target_modules: [k_proj, fc1]\ngradient_checkpointing: false\n"
    )
    config = parse_config(DEFAULTS, ["--config", str(file), "--lora_r", "4"])
    assert (config.lora_r, config.learning_rate, config.gradient_checkpointing) == (4, 1e-3, False)
    assert config.lora_target_modules == ["k_proj", "fc1"]
    assert config.dataset_text_field == "quote" and config.max_steps == 200


def test_a_resolved_config_is_taken_back_unchanged(tmp_path):
    config = parse_config(DEFAULTS, ["--num_train_epochs", "2.5", "--lora_target_modules", "all-linear", "--seed", "7"])
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(dataclasses.asdict(config)))
    assert parse_config(DEFAULTS, ["--config", str(file)]) == config


@pytest.mark.parametrize(
    "file, flags, expected",
    [
        ("", [], (200, None)),
        ("", ["--num_train_epochs", "3"], (None, 3.0)),  # the recipe's default steps give way
        ("num_train_epochs: 3", [], (None, 3.0)),
        ("num_train_epochs: 3", ["--max_steps", "9"], (9, None)),
        ("max_steps: 9", ["--num_train_epochs", "3"], (None, 3.0)),
    ],
)
def test_the_newest_of_steps_and_epochs_wins(tmp_path, file, flags, expected):
    path = tmp_path / "c.yaml"
    path.write_text(file)
    config = parse_config(DEFAULTS, ["--config", str(path), *flags])
    assert (config.max_steps, config.num_train_epochs) == expected


def test_both_in_one_place_exclude_each_other():
    with pytest.raises(UserError, match="exclude each other"):
        parse_config(DEFAULTS, ["--num_train_epochs", "3", "--max_steps", "9"])


@pytest.mark.parametrize("value, expected", [("true", True), ("false", False), ("False", False), ("1", True)])
def test_booleans_are_words(value, expected):
    assert parse_config(DEFAULTS, ["--gradient_checkpointing", value]).gradient_checkpointing is expected


def test_a_file_that_is_no_mapping_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("- lora_r\n")
    with pytest.raises(UserError, match="one `name: value` per line"):
        parse_config(DEFAULTS, ["--config", str(path)])


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--profile_steps", "10"], "--profile_steps 10: must be FIRST:LAST"),
        (["--profile_steps", "5:3"], "--profile_steps 5:3: must be FIRST:LAST"),
        (["--profile_steps", "0:3"], "--profile_steps 0:3: must be FIRST:LAST"),
        (["--profile_steps", "1:2:3"], "--profile_steps 1:2:3: must be FIRST:LAST"),
        (["--num_eval_samples", "-1"], "--num_eval_samples -1: must be 0 or more"),
        (["--wandb_log_adapter", "true", "--report_to", "none"], "has no effect without --report_to wandb"),
        (["--report_to", "wandbb"], "no tracker 'wandbb'; did you mean wandb?"),
    ],
)
def test_what_is_seen_of_a_run_is_asked_for_rightly(flags, words):
    with pytest.raises(UserError, match=re.escape(words)):
        parse_config(DEFAULTS, flags)
    assert parse_config(DEFAULTS, ["--profile_steps", "10:13"]).profile_steps == "10:13"
