"""The packages that the bits of a run depend on, beside its settings."""

import functools
from importlib.metadata import version

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "lora-dist")


@functools.cache  # each is a file to read, and a save must not wait for that
def versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}
