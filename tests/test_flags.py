"""Settings from flags and files: what wins, and which line answers a mistake."""

import re

import pytest

from lora_dist.cluster.recipe import load_recipe
from lora_dist.config import GROUPS, TrainConfig
from lora_dist.errors import UserError
from lora_dist.flags import SAME_AS, parse_config, parse_recipe_config
from tests.helpers.ranks import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.py"))


def parse(recipe: str, *flags: str, on_gpu: bool = False) -> TrainConfig:
    module = load_recipe(ROOT / f"recipes/{recipe}.py")
    return parse_recipe_config(
        module.CONFIG, list(flags), gpu=module.GPU, embedded=module.EMBEDDED, on_gpu=lambda: on_gpu
    )


def refusal(*flags: str) -> str:
    """The line that answers these flags."""
    with pytest.raises(UserError) as error:
        parse_config(TrainConfig(), list(flags))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("flag", "line"),
    [
        ("--lr", "--lr: no such flag; use --learning_rate"),
        ("--bf16", "--bf16: no such flag; use --mixed_precision bf16"),
        ("--load_in_4bit", "--load_in_4bit: no such flag; use --quantization nf4"),
        ("--load-in-4bit", "--load-in-4bit: no such flag; use --quantization nf4"),
        ("--val_set_size", "--val_set_size: no such flag; use --eval_fraction"),
        ("--lora_rr", "--lora_rr: no such flag; did you mean --lora_r?"),
        ("--zzz", "--zzz: no such flag; --help lists them"),
    ],
)
def test_an_unknown_flag_names_the_likely_one(flag, line):
    assert refusal(flag, "1") == line and refusal(f"{flag}=1") == line.replace(flag, f"{flag}=1", 1)


def test_the_table_of_other_tools_names_real_flags():
    names = set(TrainConfig.__dataclass_fields__)
    assert len(SAME_AS) > 70 and not names & SAME_AS.keys()  # a real setting needs no entry
    named = {
        flag for here in SAME_AS.values() if "lora-dist train" not in here for flag in re.findall(r"--(\w+)", here)
    }
    assert len(named) > 20 and named <= names


def test_an_unknown_key_of_a_file_is_named_with_the_file(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("lora_r: 4\nlr: 1e-4\n")
    assert refusal("--config", str(file)) == f"--config {file}: lr: no such setting; use --learning_rate"


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("lora_r: many", "--lora_r many: must be a whole number"),
        ("learning_rate: fast", "--learning_rate fast: must be a number"),
        ("packing: perhaps", "--packing perhaps: must be true or false"),
        ("- lora_r", "it must hold one `name: value` per line, not a list"),
    ],
)
def test_a_wrong_type_in_a_file_names_the_file(tmp_path, text, end):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert refusal("--config", str(file)) == f"--config {file}: {end}"


def test_a_config_that_ships_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_path = parse_config(TrainConfig(), ["--config", str(ROOT / "recipes/configs/llama3_8b.yaml")])
    assert parse_config(TrainConfig(), ["--config", "llama3_8b"]) == by_path != TrainConfig()


def test_help_shows_each_flag_once_and_in_groups(capsys):
    with pytest.raises(SystemExit, match="0"):
        parse_config(TrainConfig(), ["--help"], description="line one\n    line two", prog="lora-dist train x")
    text = capsys.readouterr().out
    assert text.startswith("usage: lora-dist train x [--config FILE.yaml]") and "line one\n    line two\n" in text
    shown = re.findall(r"^  --([\w-]+)", text, re.MULTILINE)
    assert sorted(shown) == sorted(["config", *TrainConfig.__dataclass_fields__])
    titles = [text.index(f"\n{group.__doc__}:\n") for group in GROUPS]
    assert titles == sorted(titles)
    for group, start, end in zip(GROUPS, titles, [*titles[1:], len(text)], strict=True):
        assert set(re.findall(r"^  --(\w+)", text[start:end], re.MULTILINE)) == set(group.__dataclass_fields__)


def test_a_flag_wins_over_the_embedded_settings_even_if_it_equals_the_recipes_default():
    embedded = ["--model_name_or_path", "embedded"]
    assert parse("bloomz_complaints", *embedded).learning_rate == 3e-3
    assert parse("bloomz_complaints", *embedded, "--learning_rate", "2e-4").learning_rate == 2e-4
    flags = ["--lora_target_modules", "query_key_value"]
    assert parse("bloomz_complaints", *embedded, *flags).lora_target_modules == ["query_key_value"]


def test_the_embedded_settings_hold_if_flags_name_the_embedded_base_and_data():
    flags = ["--model_name_or_path", "embedded", "--dataset_name", "embedded/complaints"]
    for on_gpu in (False, True):
        config = parse("bloomz_complaints", *flags, on_gpu=on_gpu)
        assert (config.lora_target_modules, config.dataset_config) == (["q_proj", "v_proj"], None)
        assert config == parse("bloomz_complaints", *([] if not on_gpu else flags), on_gpu=on_gpu)


@pytest.mark.parametrize("flag", ["--num_train_epochs", "--num-train-epochs"])
def test_epochs_replace_the_recipes_steps(tmp_path, flag):
    for words in ([flag, "2"], [f"{flag}=2"]):
        config = parse("opt_quotes", *words)
        assert (config.num_train_epochs, config.max_steps) == (2.0, None)
    file = tmp_path / "a.yaml"
    file.write_text("num_train_epochs: 3")
    assert parse("opt_quotes", "--config", str(file)).max_steps is None
    assert parse("opt_quotes", "--config", str(file), "--max_steps=5").num_train_epochs is None
