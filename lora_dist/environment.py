"""The code that the bits of a run depend on, beside its settings: packages, and the commit of this one."""

import functools
import subprocess
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "lora-dist")
CODE = Path(__file__).parents[1]
COMMIT_FILE = "git_commit"  # beside a copy of the code, which has no repository


@functools.cache  # each is a file to read, and a save must not wait for that
def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def git_commit() -> str | None:
    """Of the checkout that this package is run from, "+changes" where files differ from it; None where it is none."""
    copied = CODE / COMMIT_FILE
    if copied.exists():
        return copied.read_text(encoding="utf-8").strip() or None
    if _git("rev-parse", "--show-toplevel") != str(CODE):  # installed, maybe inside somebody's repository
        return None
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    return commit and commit + ("+changes" if changes else "")


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(CODE), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
