import dataclasses
import re
import typing

import pytest
import yaml

from lora_dist.config import TrainConfig, check_warmup
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


NUMBERS = [f for f in dataclasses.fields(TrainConfig) if {int, float} & {f.type, *typing.get_args(f.type)}]
LISTS = [f.name for f in dataclasses.fields(TrainConfig) if list[str] in {f.type, *typing.get_args(f.type)}]
TEXTS = [
    f.name
    for f in dataclasses.fields(TrainConfig)
    if f.name != "sample_prompt" and {str, list[str]} & {f.type, *typing.get_args(f.type)}
]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_boundary_every_number_has_bounds(field):
    bounds = field.metadata["bounds"]
    whole = int in {field.type, *typing.get_args(field.type)}
    for value in ("nan", "inf", "1e300", "-1", "100000000"):
        if field.name == "seed" and value == "100000000":
            continue
        says = "must be a whole number" if whole and not value.strip("-").isdigit() else f"must be {bounds}"
        with pytest.raises(UserError, match=re.escape(f"--{field.name} ") + ".*" + re.escape(says)):
            parse_config(DEFAULTS, [f"--{field.name}={value}"])


def test_help_shows_the_bounds_of_every_number(capsys):
    with pytest.raises(SystemExit):
        parse_config(DEFAULTS, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for field in NUMBERS:
        assert f"It must be {field.metadata['bounds']}." in text


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("two\nlines", "has the character '\\n'"),
        ("nul\0", "has the character '\\x00'"),
        ("\x1b[31m", "has the character '\\x1b'"),
        ("\udce9", "bytes that are not UTF-8"),
        ("x" * 10_000, "has 10,000 characters; it must have at most 4,096"),
    ],
)
def test_boundary_a_name_is_one_short_line(name, text, says):
    with pytest.raises(UserError, match=f"--{name} .*{re.escape(says)}") as raised:
        TrainConfig(**{name: [text] if name in LISTS else text})
    assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            "--loraplus_lr_ratio 1000 --learning_rate 0.01",
            "--loraplus_lr_ratio 1000.0: times --learning_rate 0.01 is 10",
        ),
        ("--weight_decay 500 --learning_rate 0.01", "--weight_decay 500.0: times --learning_rate 0.01 is 5"),
        ("--learning_rate 1e-300", "--learning_rate 1e-300: must be 1e-30 or more and below 1"),
        ("--loraplus_lr_ratio 1e-300", "--loraplus_lr_ratio 1e-300: must be 1e-06 or more and at most 1,000,000"),
        ("--max_grad_norm 1e-300", "--max_grad_norm 1e-300: must be 0, for no clipping, or 1e-6 or more"),
        (
            "--per_device_train_batch_size 65536 --gradient_accumulation_steps 1000 --max_length 512",
            "--gradient_accumulation_steps 1000 --max_length 512: 33,554,432,000 tokens per rank and step",
        ),
        ("--rename_columns a=text b=text", "--rename_columns a=text b=text: renames to text twice"),
        ("--rename_columns a=text a=label", "--rename_columns a=text a=label: renames from a twice"),
        ("--lora_target_modules=-x", "--lora_target_modules -x: must not start with a dash"),
        ("--resident_layers ²", "--resident_layers ²: must be a number"),
        ("--profile_steps " + "9" * 3000 + ":1", "must be FIRST:LAST"),
        ("--push_to_hub true --hub_model_id a/b/c", "--hub_model_id a/b/c: must be USER/NAME"),
    ],
)
def test_boundary_settings_are_checked_together(flags, says):
    with pytest.raises(UserError, match=re.escape(says)):
        parse_config(DEFAULTS, flags.split())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"lora_r": "8"}, "--lora_r 8: must be a whole number"),
        ({"lora_r": True}, "--lora_r True: must be a whole number"),
        ({"packing": "yes"}, "--packing yes: must be true or false"),
        ({"quantization": "int4"}, "--quantization int4: must be one of int8, nf4, nf4_plain, none"),
        ({"lora_target_modules": "q_proj"}, "--lora_target_modules q_proj: must be a list of words"),
        ({"lora_target_modules": []}, "--lora_target_modules : is empty"),
        ({"output_dir": 7}, "--output_dir 7: must be text"),
    ],
)
def test_boundary_python_gives_settings_of_their_types(settings, says):
    with pytest.raises(UserError, match=re.escape(says)):
        TrainConfig(**settings)


def test_a_warm_up_of_a_run_of_one_step_is_refused():
    with pytest.raises(UserError, match="--max_steps 1: trains nothing with --warmup_steps 100"):
        TrainConfig(max_steps=1)
    config = TrainConfig(num_train_epochs=1)
    with pytest.raises(
        UserError, match="--num_train_epochs 1: is 1 step, which trains nothing with --warmup_steps 100"
    ):
        check_warmup(config, 1)
    check_warmup(config, 2)
    TrainConfig(max_steps=1, lr_scheduler_type="constant")  # which has no warm-up
