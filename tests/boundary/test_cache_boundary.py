"""Whatever stands in the small files of a quantized base on disk, it is read, written again, or refused in one line."""

import json

import pytest
import torch
from hypothesis import strategies as st

from lora_dist.model.load import BaseOptions, meta_model
from lora_dist.model.quantized_cache import check_cache, load_cached_base
from lora_dist.parallel.strategies import Placement
from tests.helpers.properties import answered, counts, holds, json_values, mutations

OPTIONS = BaseOptions("int8", torch.float32, torch.device("cpu"), Placement())


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    load_cached_base("embedded", OPTIONS, cache=str(folder))
    return folder


@counts
@pytest.mark.parametrize(
    "name",
    ["fingerprint.json",
     *(pytest.param(n, marks=pytest.mark.slow) for n in ("manifest.json", "config.json", "tokenizer_config.json"))],
)  # fmt: skip
def test_any_file_of_a_quantized_base(count, name, cache):
    files = {path: path.read_bytes() for path in cache.iterdir()}
    skeleton, notes = meta_model("embedded", "int8", torch.float32), cache.parent / "notes.txt"
    valid = json.loads(files[cache / name])

    def check(content):
        for path, before in files.items():
            path.write_bytes(before)
        notes.write_text("mine")
        (cache / name).write_bytes(content)
        with answered(cache):
            check_cache(skeleton, str(cache), "--quantized_cache")
            load_cached_base("embedded", OPTIONS, cache=str(cache))
            assert {path: path.read_bytes() for path in cache.iterdir() if path.name != "manifest.json"} == {
                path: content for path, content in files.items() if path.name != "manifest.json"
            }
        assert notes.read_text() == "mine"

    changed = st.tuples(st.sampled_from(sorted(valid)), json_values).map(
        lambda entry: json.dumps(valid | {entry[0]: entry[1]}).encode()
    )
    holds(count, st.one_of(changed, mutations(files[cache / name]), json_values.map(json.dumps).map(str.encode)), check)
