"""The reference's log-probabilities of the rows of pairs, kept beside the tokenized rows: computed once per machine."""

import contextlib
import hashlib
import json
import sys
from pathlib import Path

import datasets
import numpy as np

from lora_dist.boundary import boundary, read_json
from lora_dist.errors import UserError
from lora_dist.files import MANIFEST, is_complete, locked, made_whole, write_manifest, write_whole

FILES = ("train.npy", "held-out.npy")
IDENTITY = "identity.json"
OURS = (*FILES, IDENTITY, f"{MANIFEST}*")


def reference_folder(identity: dict) -> Path:
    """Where the log-probabilities of this identity are kept: everything that they depend on."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    return Path(datasets.config.HF_DATASETS_CACHE) / "lora-dist-reference" / digest


def read_reference(identity: dict, num_rows: tuple[int, int]) -> list[np.ndarray] | None:
    """The log-probabilities of the training rows and of the held-out rows, float32; None if they are not kept.

    What is damaged, or was made for something else, is not read.
    """
    folder = reference_folder(identity)
    with contextlib.suppress(UserError, OSError), boundary(str(folder)):
        if is_complete(folder) and read_json(folder / IDENTITY, IDENTITY) == identity:
            found = [np.load(folder / name) for name in FILES]
            wanted = [(np.dtype(np.float32), (number,)) for number in num_rows]
            return found if [(array.dtype, array.shape) for array in found] == wanted else None
    return None


def keep_reference(identity: dict, logps: list[np.ndarray]) -> None:
    """Write what `read_reference` reads. If that is not possible, a warning says so, and the next start computes it."""
    folder = reference_folder(identity)
    try:
        with locked(folder.with_suffix(".lock"), "waiting for the process that writes this reference"):
            with made_whole(folder, lambda _: OURS) as new:
                for name, array in zip(FILES, logps, strict=True):
                    np.save(new / name, array)
                write_whole(new / IDENTITY, json.dumps(identity, sort_keys=True) + "\n")
                write_manifest(new)
    except OSError as error:
        what = f"the reference cannot be kept in {folder}: {error.strerror or error}"
        print(f"warning: {what}; the next start computes it again", file=sys.stderr, flush=True)
