"""Properties that hold for every input of a boundary: 50 inputs in the fast tests, 1,000 in the slow ones.

The inputs are the same in every run, and do not depend on how fast the machine is.
"""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from lora_dist.errors import NothingToDo, RunFailed, UserError

MAX_CPU_S, MAX_WALL_S = 5, 60  # of one input
counts = pytest.mark.parametrize("count", [50, pytest.param(1000, marks=pytest.mark.slow)])


def holds(count: int, inputs: st.SearchStrategy, check: Callable, *known: object) -> None:
    """Call `check` with `count` inputs, after the `known` ones, which failed once."""
    for value in known:
        check(value)
    options = settings(
        max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink], report_multiple_bugs=False,
    )  # fmt: skip
    options(given(inputs)(lambda value: check(value)))()


@contextlib.contextmanager
def answered(*folders: Path) -> Iterator[None]:
    """The block ends, or refuses its input in one line, in bounded time, and leaves the folders as they are."""
    before, started = [contents(folder) for folder in folders], time.process_time()
    with _no_longer_than(MAX_WALL_S):
        try:
            yield
        except (UserError, RunFailed) as error:
            line = str(error)
            assert line.isprintable() and 0 < len(line) < 2000, line
            assert [contents(folder) for folder in folders] == before, f"refused, but begun: {line}"
        except NothingToDo:
            pass
    assert time.process_time() - started < MAX_CPU_S


def contents(folder: Path) -> dict[str, bytes | None]:
    """The paths in the folder with the bytes of the files. A run's lock is left out."""
    paths = (path for path in sorted(folder.rglob("*")) if path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@contextlib.contextmanager
def _no_longer_than(seconds: int) -> Iterator[None]:
    def late(*_):
        raise AssertionError(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


ODD_WORDS = [
    *("", " ", "-", "--", "---", "-1", "--help", "--config", "nan", "-inf", "inf", "1e300", "1e8", "1e-320", "0", "1"),
    *("00", "true", "no", "null", "~", "None", "[]", "{}", "a=b", "=", "\0", "\n", "\x1b[2J", "\udce9", "é", "٣", "²"),
    *("../..", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/", ".", "embedded", "$(touch x)", "{{ 1 / 0 }}"),
    *("x" * 5000, "9" * 5000),
]
words = st.one_of(st.sampled_from(ODD_WORDS), st.text(max_size=20), st.integers().map(str), st.floats().map(str))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)


@st.composite
def mutations(draw, valid: bytes) -> bytes:
    """The valid bytes with one to three pieces cut out, repeated, or replaced."""
    content = valid
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(content)))
        stop = draw(st.integers(start, min(len(content), start + 40)))
        odd = st.sampled_from(ODD_WORDS).map(lambda word: word.encode("utf-8", "surrogateescape"))
        new = draw(st.one_of(st.just(b""), st.just(content[start:stop] * 2), st.binary(max_size=8), odd))
        content = content[:start] + new + content[stop:]
    return content
