"""Settings files as people write them: each value is read with its type of setting, or refused in a line."""

import dataclasses
import json
import os

import pytest

from lora_dist.config import TrainConfig
from lora_dist.errors import RunFailed, UserError
from lora_dist.flags import as_flags, other_batch, parse_config
from lora_dist.run.folder import config_text


def read(folder, content: bytes | str) -> TrainConfig:
    (folder / "c.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    return parse_config(TrainConfig(), ["--config", str(folder / "c.yaml")])


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("mixed_precision: no", "no"),
        ("profile_steps: 10:13", "10:13"),  # 613 in YAML 1.1
        ("learning_rate: 1e-4", 1e-4),  # text in YAML 1.1
        ("packing: on", True),
        ("gradient_checkpointing: No", False),
        ("dataset_name: 2026-01-31", "2026-01-31"),  # a date
        ("output_dir: 007", "007"),
        ("sample_prompt: --help", "--help"),
        ("sample_prompt: 'null'", "null"),
        ("lora_target_modules: q_proj", ["q_proj"]),
        ("rename_columns: [yes=text]", ["yes=text"]),
        ("dataset_text_field: ~", None),
    ],
)
def test_a_value_is_read_as_its_setting_says(tmp_path, line, value):
    assert getattr(read(tmp_path, line), line.partition(":")[0]) == value


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("help: true", "help: no such setting"),
        ("config: other.yaml", "config: no such setting"),
        ("lora_r: 8\nlora_r: 16", "line 2: lora_r is given twice"),
        ("lora_r: [8, 16]", "--lora_r ['8', '16']: must be one value"),
        ("lora_r: {a: 8}", "--lora_r {'a': '8'}: must be one value"),
        ("lora_target_modules: [[a]]", "--lora_target_modules ['a']: must be one value or a list of values"),
        ("lora_r:", "--lora_r : has no value"),
        ("lora_r: 8.0", "--lora_r 8.0: must be a whole number"),
        ("lora_r: true", "--lora_r true: must be a whole number"),
        ("lora_r: " + "9" * 5000, "must be a whole number"),
        ("packing: maybe", "--packing maybe: must be true or false"),
        ("quantization: int4", "--quantization: invalid choice: 'int4'"),
        ("sample_prompt: !!binary aGk=", "must be one value"),
        (b"sample_prompt: caf\xe9", "UnicodeDecodeError"),
        ("a: &x [b]\nc: *x", "aliases"),
    ],
)
def test_a_file_that_is_refused(tmp_path, content, says):
    with pytest.raises(UserError) as raised:
        read(tmp_path, content)
    line = str(raised.value)
    assert line.startswith(f"--config {tmp_path}/c.yaml") and says in line and "\n" not in line and len(line) < 2000


@pytest.mark.parametrize("name", ["", ".", "nul\0", "x" * 10_000, "pipe"])
def test_a_file_that_is_none_is_refused_without_waiting(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    with pytest.raises(UserError, match="^--config "):
        parse_config(TrainConfig(), ["--config", name])


@pytest.mark.parametrize("prompt", ["--help", "--lora_r=4", "-1", "", "no", "a: b", "# c", "two\nlines", " x ", "ü"])
def test_what_a_run_wrote_reads_back(tmp_path, prompt):
    config = TrainConfig(sample_prompt=prompt, dataset_text_field=None, max_steps=7)
    (tmp_path / "config.yaml").write_text(config_text(config), encoding="utf-8")
    defaults = dataclasses.replace(config, dataset_text_field="quote", sample_prompt="other")
    assert parse_config(defaults, ["--config", str(tmp_path / "config.yaml")]) == config
    assert parse_config(config, as_flags({"sample_prompt": prompt})) == config


def test_an_error_is_one_line_of_bounded_length_and_keeps_its_end():
    for error in (UserError, RunFailed):
        line = str(error("--x " + "long\n\x1b[31m" * 10_000 + ": use y"))
        assert line.isprintable() and len(line) <= 1500 and line.startswith("--x long") and line.endswith(": use y")


def test_a_config_of_a_run_with_other_steps_is_warned_of(tmp_path):
    config = TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=4, output_dir="elsewhere")
    file = tmp_path / "config.yaml"
    file.write_text(config_text(config), encoding="utf-8")
    argv = ["--config", str(file)]
    assert other_batch(argv, config, 1) is None  # no run
    facts = {"num_ranks": 2, "micro_batches_per_step": 8, "strategy": "fsdp"}
    (tmp_path / "state.json").write_text(json.dumps({"facts": facts}))
    line = (
        f"warning: --config {file}: that run had 16 sequences a step, on 2 rank(s) under fsdp; "
        "this one has 8, on 1; --gradient_accumulation_steps 8 makes them equal"
    )
    assert other_batch(argv, config, 1) == line
    assert other_batch(argv, config, 3).endswith("on 3; 2 rank(s) makes them equal")
    assert other_batch(argv, config, 2) is None and other_batch([], config, 1) is None
    assert other_batch(argv, dataclasses.replace(config, output_dir=str(tmp_path)), 1) is None  # it is continued
    for broken in ("", "[]", "{}", '{"facts": 3}', '{"facts": {"num_ranks": 1, "micro_batches_per_step": "many"}}'):
        (tmp_path / "state.json").write_text(broken)
        assert other_batch(argv, config, 1) is None
