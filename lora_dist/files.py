"""Folders and files that are whole or not there: written under another name, and declared complete by a manifest."""

import hashlib
import json
import os
from pathlib import Path

MANIFEST = "manifest.json"


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def sync_files(folder: Path) -> None:
    """Have all files of a folder on the disk, with the mode that the user's umask gives a file.

    safetensors 0.8 writes files that only their owner can read.
    """
    (umask,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:")]
    for path in files_of(folder):
        path.chmod(0o666 & ~int(umask.split()[1], 8))
        sync(path)


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk, so that they outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_file(path: Path) -> dict:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def files_of(folder: Path) -> list[Path]:
    """Those a manifest names, in one order."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def write_manifest(folder: Path, files: dict[str, dict] | None = None) -> None:
    """Declare a folder complete: sizes and checksums of its files, written last. `files`: where they are known."""
    files = files or {str(path.relative_to(folder)): describe_file(path) for path in files_of(folder)}
    write_whole(folder / MANIFEST, json.dumps(files, indent=2, sort_keys=True) + "\n")


def is_complete(folder: Path, share: slice = slice(None)) -> bool:
    """Whether the manifest is there and the files it names have its sizes and, in this share of them, its checksums."""
    try:
        files = json.loads((folder / MANIFEST).read_text())
        sizes_fit = bool(files) and all(
            (folder / name).stat().st_size == entry["bytes"] for name, entry in files.items()
        )
        return sizes_fit and all(describe_file(folder / name) == entry for name, entry in list(files.items())[share])
    except (OSError, ValueError):
        return False
