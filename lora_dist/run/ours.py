"""Which files of a run folder are ours: what a run may begin beside, and what we delete again."""

import fnmatch
import glob
import os
import re
import sys
from pathlib import Path

from lora_dist.boundary import boundary
from lora_dist.errors import UserError
from lora_dist.files import MANIFEST, read_manifest, remove_ours

CHECKPOINT_NAME = re.compile(r"step-[0-9]{8}")
LEFTOVER_NAME = re.compile(r"step-[0-9]{8}\.(partial|removed(-[0-9]+)?)")  # of a save or a removal that a kill ended
# What may be in a folder before a run begins in it: the job that `lora-dist submit` wrote, logs of a launcher, stacks
# that the watchdog wrote on a machine with its own disk, and what an earlier start wrote before it was killed.
BEFORE_A_RUN = (".lock", ".starts", "state.json.partial", "job", "job.partial", "job.removed*", "logs", "wandb",
                "stacks-rank-*.txt", "*.log", "*.out", "*.err")  # fmt: skip
# What we write into folders that are replaced or pruned, besides what their manifest names.
ADAPTER_FILES = (
    "adapter_model.safetensors", "adapter_config.json", "README.md", "README.md.partial", "labels.json",
    "labels.json.partial", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "additional_chat_templates/*.jinja", "vocab.json", "vocab.txt", "merges.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "source.spm", "target.spm",
)  # fmt: skip
FILES_OF = {
    "step": (MANIFEST, f"{MANIFEST}.partial", "optimizer.safetensors", "training_state.json",
             "training_state.json.partial", *(f"adapter/{name}" for name in ADAPTER_FILES)),
    "adapter": ADAPTER_FILES,
    "job": (f"{MANIFEST}*", "prepare.sbatch*", "submitted.json*", "code/*/__pycache__/*.pyc"),
    "job.partial": (f"{MANIFEST}*", "job.sbatch*", "config.yaml*", "accelerate.yaml*", "accelerate.env*",
                    "deepspeed.json*", "chat_template.jinja*", "code/*"),
}  # fmt: skip


def refuse_files_of_others(root: Path) -> None:
    """Raises UserError, before anything is written, unless the folder is absent, the folder of a run, or empty.

    A folder in which a run may begin can hold what `BEFORE_A_RUN` lists.
    """
    what = f"--output_dir {root}"
    with boundary(what, "give another folder"):
        if os.path.lexists(root) and not root.is_dir():
            raise UserError(f"{what}: is not a folder; give another name")
        found = os.listdir(root) if root.is_dir() else ["state.json"]
    others = sorted(n for n in found if not any(fnmatch.fnmatchcase(n, p) for p in BEFORE_A_RUN))
    if "job" in found and "job.sbatch" not in read_manifest(root / "job") and any(root.glob("job/*")):
        others.append("job")
    if others and "state.json" not in found:
        names = ", ".join(map(ascii, others[:3]))
        raise UserError(f"{what}: holds files that no run of lora-dist wrote ({names}); give an empty or new folder")


def remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not os.listdir(folder):
        remove_ours(folder, ())


def clear(folder: Path) -> list[Path]:
    """Delete what we wrote in a checkpoint, adapter or job folder. Returns what is left: files of others."""
    kind = folder.name if folder.name in FILES_OF else re.split(r"[-.]", folder.name)[0]
    return remove_ours(folder, [*FILES_OF[kind], *map(glob.escape, read_manifest(folder))])


def remove(folder: Path) -> None:
    """Remove a checkpoint, adapter or job folder; files of others in it are kept, with a warning that says where.

    It is renamed first, so that an interrupted removal never looks like a complete folder.
    """
    aside = _set_aside(folder)
    _warn_of(aside, clear(aside))


def put_in_place(partial: Path, folder: Path) -> None:
    """Rename a partial folder to its final name. From an older folder of that name, files of others move along."""
    aside = _set_aside(folder) if os.path.lexists(folder) else None
    partial.rename(folder)
    if aside is None:
        return
    for path in clear(aside):
        kept = folder / path.relative_to(aside)
        if not os.path.lexists(kept):
            kept.parent.mkdir(parents=True, exist_ok=True)
            path.rename(kept)
    _warn_of(aside, clear(aside))


def _set_aside(folder: Path) -> Path:
    """Rename the folder to NAME.removed, or to NAME.removed-2 if files of others are left in that one, and so on."""
    aside, number = folder.with_suffix(".removed"), 1
    while clear(aside):
        number += 1
        aside = folder.with_suffix(f".removed-{number}")
    folder.rename(aside)
    return aside


def _warn_of(folder: Path, left: list[Path]) -> None:
    if left:
        what = ascii(left[0].name) + (f" and {len(left) - 1} more" if len(left) > 1 else "")
        print(f"warning: {folder}: kept, because no run wrote {what}", file=sys.stderr, flush=True)
