"""What a recipe's function will do is part of the key under which its rows are kept."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from lora_dist.functions import describe_function

PREFIX = "a"
TABLE = {"x": [1, 2]}


def helper(text: str) -> str:
    return PREFIX + text


def transform(example: dict) -> dict:
    return {"text": helper(json.dumps([example["x"] for _ in TABLE]))}


def closure(suffix: str, default: str = "d"):
    def transform(example: dict, default=default) -> dict:
        return {"text": example["x"] + suffix + default}

    return transform


@pytest.mark.parametrize(
    "name, value", [("PREFIX", "b"), ("TABLE", {"x": [1, 3]}), ("helper", lambda text: PREFIX + text + "!")]
)
def test_constants_and_helpers_that_a_function_uses_are_part_of_it(monkeypatch, name, value):
    before = describe_function(transform)
    assert describe_function(transform) == before
    monkeypatch.setitem(globals(), name, value)
    assert describe_function(transform) != before


def test_closures_defaults_and_bodies_are_part_of_a_function():
    variants = [closure("a"), closure("b"), closure("a", "e"), lambda e: {"text": e["x"]}, lambda e: {"text": e["y"]}]
    assert len({describe_function(variant) for variant in variants}) == len(variants)
    assert describe_function(closure("a")) == describe_function(closure("a"))
    assert describe_function(SimpleNamespace) != describe_function(dict)


def test_every_process_describes_a_function_alike():
    """The order of sets and the addresses of objects differ from one process to the next."""
    code = (
        "from lora_dist.functions import describe_function\nimport re\n"
        "WORDS = {'a', 'b', 'c'}\nFIND = re.compile('x')\n"
        "class Reader:\n    limit = 3\nreader = Reader()\n"
        "def transform(e):\n    return {'t': [w for w in WORDS if FIND.match(w) and reader.limit and e]}\n"
        "print(describe_function(transform))"
    )
    ran = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in range(2)]
    assert ran[0].stdout == ran[1].stdout != "", ran[0].stderr
