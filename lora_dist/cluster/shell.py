"""Bash text for job files, in which no value is left unquoted.

A job file is made of `Bash`. Bash is either a literal in our source or the result of a function below, all of which
quote each `str` they get. So a value reaches a shell only as one quoted word; tests/cluster holds that no other code
makes Bash out of a value.
"""

import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Bash:
    """Text that bash runs as it is."""

    text: str

    def __add__(self, other: "Bash") -> "Bash":
        return Bash(self.text + other.text)


def quote(value: "str | int | Bash") -> Bash:
    """The value as one word of bash; Bash stays as it is."""
    return value if isinstance(value, Bash) else Bash(shlex.quote(str(value)))


def words(*values: str | int | Bash) -> Bash:
    return Bash(" ".join(quote(value).text for value in values))


def assign(**variables: str | int | Bash | tuple) -> Bash:
    """Assignments on one line, for example `run='/a b'`. A tuple becomes an array."""
    texts = []
    for name, value in variables.items():
        assert name.isidentifier(), name
        text = f"({words(*value).text})" if isinstance(value, tuple) else quote(value).text
        texts.append(f"{name}={text}")
    return Bash(" ".join(texts))


def comment(text: str) -> Bash:
    """A comment of one line: the second line of a prompt with a line break would be run."""
    return Bash("# " + " ".join("".join(c if c.isprintable() else " " for c in text).split()))


def directive(option: str, value: str | int | None = None) -> Bash:
    """A line that sbatch reads and bash does not run.

    sbatch splits the line at spaces, takes quotes away, and reads a backslash as an escape, also inside quotes.
    """
    if value is None:
        return Bash(f"#SBATCH --{option}")
    text = str(value)
    assert text.isprintable(), text  # a line break would begin a line of bash
    if re.search(r"[^\w@%+=:,./-]", text, re.ASCII):
        text = '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
    return Bash(f"#SBATCH --{option}={text}")


def code_of_user(command: str) -> Bash:
    """A command that the user gave as bash, with `--setup`."""
    return Bash(command)


def text_of(lines: Iterable[Bash]) -> str:
    return "\n".join(line.text for line in lines) + "\n"
