"""Whatever stands on the command line and in a settings file is read exactly, or refused in one line."""

import contextlib
import dataclasses
import io
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import assume
from hypothesis import strategies as st

from lora_dist import cli, commands
from lora_dist.boundary import read_json, read_yaml_settings
from lora_dist.cluster.launcher import read_command
from lora_dist.config import TrainConfig
from lora_dist.errors import UserError
from lora_dist.flags import as_flags, parse_config
from lora_dist.run.folder import config_text
from tests.helpers.properties import answered, counts, holds, json_values, mutations, words

FIELDS = dataclasses.fields(TrainConfig)
names = st.sampled_from([field.name for field in FIELDS])


def parse(argv: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        try:
            parse_config(TrainConfig(), argv)
        except SystemExit as ended:
            assert ended.code == 0 and "usage:" in out.getvalue() and {"-h", "--help"} & set(argv)


flags = st.one_of(
    st.tuples(names, words).map(lambda pair: [f"--{pair[0]}={pair[1]}"]),
    st.tuples(names, st.lists(words, max_size=3)).map(lambda pair: [f"--{pair[0]}", *pair[1]]),
    words.map(lambda word: [word]),
    words.map(lambda word: [f"--{word}"]),
)


@counts
def test_any_words_on_the_command_line(count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def check(argv):
        with answered(tmp_path):
            parse(argv)

    argv = st.lists(flags, max_size=3).map(lambda found: [word for words in found for word in words])
    holds(count, argv, check, ["--sample_prompt=--"])


@counts
def test_any_words_after_a_command(count, tmp_path, monkeypatch):
    """The commands themselves do nothing here, except that `train` reads its words."""
    monkeypatch.chdir(tmp_path)
    _, parsers = cli.build_parser()
    for name in parsers.choices:
        monkeypatch.setattr(commands, name, lambda args: None)
    monkeypatch.setattr(commands, "train", lambda args: read_command(args.words))
    flags_of = {
        name: [f for a in parser._actions for f in a.option_strings] for name, parser in parsers.choices.items()
    }

    def after(name: str) -> st.SearchStrategy:
        flag = st.sampled_from([*flags_of[name], "--num_processes", "--config_file"])
        joined = st.tuples(flag, words).map("=".join)
        return st.lists(flag | joined | words | st.just("sft"), max_size=5).map(lambda found: [name, *found])

    def check(argv):
        with answered(tmp_path), contextlib.redirect_stdout(io.StringIO()) as out:
            try:
                cli.run(argv)
            except SystemExit as ended:
                assert ended.code == 0 and out.getvalue()

    holds(count, st.sampled_from(sorted(parsers.choices)).flatmap(after), check)


@counts
def test_any_bytes_in_a_settings_file(count, tmp_path):
    file = tmp_path / "c.yaml"
    valid = yaml.safe_dump(dataclasses.asdict(TrainConfig(max_steps=5)), sort_keys=False).encode()
    settings = st.dictionaries(names, json_values, max_size=4)
    dumped = st.tuples(settings, st.booleans()).map(lambda pair: yaml.safe_dump(pair[0], default_flow_style=pair[1]))
    contents = st.one_of(
        mutations(valid),
        st.binary(max_size=200),
        st.text("ab:-[]{}&*!|>'\"#%@ \n\t0", max_size=100).map(str.encode),
        dumped.map(lambda text: text.encode("utf-8", "surrogatepass")),
    )

    def check(content):
        file.write_bytes(content)
        with answered(tmp_path):
            parse(["--config", str(file)])
        with answered(tmp_path):
            read_yaml_settings(file, "--config c.yaml")
        with answered(tmp_path):
            read_json(file, "c.json")

    holds(count, contents, check)


@st.composite
def settings_and_values(draw) -> dict:
    """One to three settings with values that are right as such."""
    chosen = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=3, unique_by=lambda field: field.name))
    return {field.name: draw(_values(field)) for field in chosen}


def _values(field: dataclasses.Field) -> st.SearchStrategy:
    kinds, bounds = (field.type, *typing.get_args(field.type)), field.metadata["bounds"]
    if bounds:
        return st.integers(bounds.low, bounds.high) if int in kinds else st.floats(bounds.low, bounds.high)
    if bool in kinds:
        return st.booleans()
    if list[str] in kinds:
        return st.lists(words, min_size=1, max_size=3)
    return words if str in kinds else st.sampled_from(kinds[1:])


@pytest.mark.parametrize("space", ["\x85", "\u2028", "\xa0", "\ufeff", "\t", "\r\n", "\x1f"])
def test_a_prompt_with_an_odd_space_reads_back_exactly(space, tmp_path):
    config = TrainConfig(sample_prompt=f"é{space}b {space}\n")
    (tmp_path / "config.yaml").write_text(config_text(config), encoding="utf-8")
    assert parse_config(TrainConfig(), ["--config", str(tmp_path / "config.yaml")]) == config


@counts
def test_what_a_run_wrote_reads_back_exactly(count, tmp_path):
    file = tmp_path / "config.yaml"

    def check(settings):
        try:
            config = TrainConfig(**settings)
        except UserError:
            assume(False)
        file.write_text(config_text(config), encoding="utf-8")
        assert parse_config(TrainConfig(), ["--config", str(file)]) == config
        assert parse_config(TrainConfig(), as_flags(dataclasses.asdict(config))) == config
        assert read_yaml_settings(Path(file), "config.yaml") == dataclasses.asdict(config)

    holds(count, settings_and_values(), check)
