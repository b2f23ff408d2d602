"""How anything from outside is read: one line on bad input, whatever the reader raises.

Outside are flags, YAML, data, templates, model folders, adapters, caches, run folders and Slurm's environment.
"""

import contextlib
import json
import multiprocessing
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

from lora_dist.errors import NothingToDo, RunFailed, UserError, in_one_line

MAX_YAML_DEPTH = 20  # PyYAML's time grows with the square of the depth: 90 s at 100,000
MAX_TEXT_BYTES = 16 * 2**20  # of a settings file, a template, a state file; data and weights are not read through here

HALF_CHARACTER = re.compile(r"\\(u|U0000)[dD][89a-fA-F]")  # perhaps: two of them in a row can be a whole one


@contextlib.contextmanager
def boundary(what: str, hint: str = "") -> Iterator[None]:
    """Turn every exception of the block into the one-line error about `what`, for example "--config runs/a.yaml".

    Put only the reading of one thing from outside into the block: a fault of our own code in it would be reported as a
    fault of that thing. `hint` says what would work. RecursionError and MemoryError count too.
    """
    try:
        yield
    except (UserError, RunFailed, NothingToDo):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of a library in Rust
            raise
        raise UserError(f"{what}: {one_line(error)}" + (f"; {hint}" if hint else "")) from error


def ends_within(seconds: float, work: Callable[[], Any]) -> bool:
    """False if the work does not end in time. A process of its own tries it, because only a process can be killed.

    Errors count as an end. For what is a program from outside: templates, regular expressions.
    """

    def attempt() -> None:
        with contextlib.suppress(Exception):
            work()

    trial = multiprocessing.get_context("fork").Process(target=attempt, daemon=True)
    trial.start()
    trial.join(seconds)
    if not trial.is_alive():
        return True
    trial.kill()
    trial.join()
    return False


def one_line(error: BaseException, max_chars: int = 300) -> str:
    """The error's type and text in one line without control characters, shortened to about `max_chars`."""
    if isinstance(error, OSError) and error.strerror:  # clear without its type and number
        return in_one_line(f"{error.strerror}: {error.filename}" if error.filename else error.strerror, max_chars)
    text = in_one_line(" ".join(str(error).split()), max_chars)
    name = type(error).__name__
    return f"{text} ({name})" if text else name


def read_text(path: Path | str, what: str) -> str:
    """The text of a UTF-8 file. Raises UserError if it is no regular file, too large, unreadable or not UTF-8.

    A FIFO or a device is refused before it is opened: reading one could wait for ever.
    """
    with boundary(what):
        mode = Path(path).stat()
        if not stat.S_ISREG(mode.st_mode):
            raise UserError(f"{what}: this is not a regular file; name a text file")
        if mode.st_size > MAX_TEXT_BYTES:
            raise UserError(f"{what}: {mode.st_size} bytes; a file of this kind has at most {MAX_TEXT_BYTES}")
        return Path(path).read_text(encoding="utf-8-sig")


def read_json(path: Path | str, what: str, kind: type = dict) -> Any:
    """The content of a JSON file, whose top level must be of this type. Raises UserError."""
    text = read_text(path, what)
    with boundary(what):
        content = parse_json(text)
    if not isinstance(content, kind):
        raise UserError(f"{what}: the file holds a {type(content).__name__}; it must hold a {kind.__name__}")
    return content


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises an exception if it is none, or if a text in it cannot be written again."""
    content = json.loads(text, object_pairs_hook=without_repeats)
    if HALF_CHARACTER.search(text):
        check_characters(content)
    return content


def without_repeats(pairs: list[tuple[str, Any]]) -> dict:
    """The object of these pairs. Raises ValueError if it has a key twice, because the later one would win silently."""
    if len(values := dict(pairs)) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is given twice")
    return values


def check_characters(content: Any) -> None:
    """Raises UnicodeEncodeError for half a character, as JSON and YAML can spell it: no file could be made of it.

    It takes longer than to read the content. If the text does not match HALF_CHARACTER, there is none.
    """
    json.dumps(content, ensure_ascii=False, default=str, skipkeys=True).encode()


def read_yaml_settings(path: Path | str, what: str, *, as_text: bool = False) -> dict:
    """The mapping in a YAML file; an empty file is an empty mapping. Raises UserError.

    With `as_text`, every scalar stays the text that the file holds, except that null and nothing are None. The caller
    knows which type it must have; YAML 1.1 would read `no` as false, 10:13 as 613, and 1e-4 as text.

    Refused besides broken YAML: aliases (a few lines of them can stand for billions of values), a key that is given
    twice (the later one would win silently) and a key that is not text.
    """
    text = read_text(path, what)
    with boundary(what):
        _check_events(text)
        content = yaml.load(text, _Texts if as_text else _UniqueKeys)
        if HALF_CHARACTER.search(text):
            check_characters(content)
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise UserError(f"{what}: it must hold one `name: value` per line, not a {type(content).__name__}")
    return content


def _check_events(text: str) -> None:
    """Raises ValueError for an alias or for deep nesting, before any value is built."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError("YAML aliases (*name) are not supported; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"nested more than {MAX_YAML_DEPTH} deep")


class _UniqueKeys(yaml.SafeLoader):
    """A safe loader that refuses a mapping with a key twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value} is given twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


class _Texts(_UniqueKeys):
    """Reads every scalar as text; null, ~ and nothing as None."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
