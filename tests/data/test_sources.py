"""Sources of examples: what is read, and what is refused in one line."""

import dataclasses
import json

import datasets
import pytest

from lora_dist.data.sources import load_examples
from lora_dist.errors import UserError


@pytest.fixture
def load(config, tmp_path, monkeypatch):
    """Call load_examples on files that are written into a folder: {name: text or bytes}. `name`: of the data set."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def load(files: dict[str, str | bytes], name: str | None = None, **settings):
        folder = tmp_path / "data"
        for file, content in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        name = str(folder / (next(iter(files)) if name is None else name))
        return load_examples(dataclasses.replace(config, **{"dataset_name": name, "eval_fraction": 0.0} | settings))

    return load


@pytest.mark.parametrize(
    "renamed, message",
    [
        (["a=text", "b=text"], "--rename_columns a=text: column b would have the name text too"),
        (["a=b"], "--rename_columns a=b: column b would have the name b too"),
        (["a=x", "a=y"], "--rename_columns a=y: a is renamed to x already"),
        (["c=x"], "--rename_columns c=x: no column c: .* has a, b"),
    ],
)
def test_boundary_two_columns_never_get_one_name(load, renamed, message):
    files = {"d.jsonl": json.dumps({"a": "x", "b": "y"})}
    with pytest.raises(UserError, match=message):
        load(files, rename_columns=renamed)
    assert load(files, rename_columns=["a=b", "b=a"]).columns == ["b", "a"]
