"""The errors that end a run with one line, and the helpers that raise them."""

import difflib
from collections.abc import Iterable

MAX_LINE_CHARS = 1500  # of an error; it may quote what a user gave
MAX_VALUE_CHARS = 200  # of a setting's value in it


def in_one_line(text: object, max_chars: int = MAX_LINE_CHARS) -> str:
    """The text without line breaks and control characters. If it is longer than `max_chars`, its middle is left out.

    The end stays, because an error says there what would work.
    """
    line = "".join(c if c.isprintable() else " " for c in str(text))
    if len(line) <= max_chars:
        return line
    kept = max_chars - len(" ... ")
    return f"{line[: kept - kept // 3]} ... {line[-(kept // 3) :]}"


class UserError(ValueError):
    """Bad input: one line that names the setting, its value, the rule and what would work. Exit code 2."""

    def __init__(self, line: str):
        super().__init__(in_one_line(line))


class RunFailed(Exception):
    """A run that cannot go on: one line that says why, and what was kept. Exit code 1."""

    def __init__(self, line: str):
        super().__init__(in_one_line(line))


class NothingToDo(Exception):
    """What was asked for is there already: one line that says so. Exit code 0."""


def require(condition, name: str, value, rule: str) -> None:
    """Raise the one-line error for `--name value` unless the condition holds."""
    if not condition:
        raise UserError(f"--{name} {in_one_line(value, MAX_VALUE_CHARS)}: {rule}")


def did_you_mean(word: str, valid: Iterable[str], otherwise: str, *, prefix: str = "") -> str:
    """The hint for a mistyped name: the nearest valid one, or else what the caller says."""
    guess = difflib.get_close_matches(word, valid, 1)
    return f"did you mean {prefix}{guess[0]}?" if guess else otherwise
