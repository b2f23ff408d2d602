"""Files and folders that are either complete or absent.

They are written under a temporary name and renamed at the end. A manifest, written last, declares a folder complete.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from lora_dist.boundary import boundary, read_json
from lora_dist.errors import UserError

MANIFEST = "manifest.json"
LOCK_POLL_S = 0.1  # between two tries to take a lock that another process holds
QUIET_S = 10.0  # a process that waits for a lock no longer than that does not say so


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves either the old file or the new one, never a part of it.

    Raises OSError, also if a link or a pipe has the name under which it is written first.
    """
    partial = path.with_name(path.name + ".partial")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_NONBLOCK
    with open(os.open(partial, flags, 0o666), "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def remove_ours(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Delete the files of a folder that we wrote, then the folders left empty. Returns what was left: files of others.

    This is the only function of the package that deletes a folder. `patterns` match the paths, relative to the folder,
    of what we write there (fnmatch; `*` matches "/" too). A symbolic link is never followed; one that matches is
    removed itself. A `folder` that is a link is left alone. Raises OSError.
    """
    if folder.is_symlink() or not folder.is_dir():
        return [folder] if os.path.lexists(folder) else []
    patterns, left = tuple(patterns), []
    for parent, folders, files in os.walk(folder, topdown=False):
        links = [name for name in folders if Path(parent, name).is_symlink()]
        for path in (Path(parent, name) for name in (*files, *links)):
            if any(fnmatch.fnmatchcase(str(path.relative_to(folder)), pattern) for pattern in patterns):
                path.unlink()
            else:
                left.append(path)
        if not os.listdir(parent):
            os.rmdir(parent)
    return left


@contextlib.contextmanager
def lock_file(path: Path, *, shared: bool = False) -> Iterator[Callable[[], bool]]:
    """Gives a function that tries to take the kernel's lock on the file `path`, which is created, until it has it.

    A `shared` lock keeps out only those who want it for themselves. It ends with the block, and with its process. The
    file stays: another process may wait for it. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)

    def take() -> bool:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise OSError(error.errno, f"its disk has no file locks: {error.strerror}") from None
        return True

    try:
        yield take
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # a forked process may still hold the descriptor
        os.close(descriptor)


def wait_for_lock(take: Callable[[], bool], waiting: str) -> None:
    """Try to take a lock until it is taken. If that lasts, say once on stderr what this is `waiting` for."""
    to_say, quiet_until = waiting, time.monotonic() + QUIET_S
    while not take():
        if to_say and time.monotonic() > quiet_until:
            print(to_say, file=sys.stderr, flush=True)
            to_say = ""
        time.sleep(LOCK_POLL_S)


@contextlib.contextmanager
def locked(path: Path, waiting: str) -> Iterator[None]:
    """Keep other processes out of the block; if one is in it, wait for it, and say so. Raises OSError."""
    with lock_file(path) as take:
        wait_for_lock(take, f"{waiting}: {path}")
        yield


@contextlib.contextmanager
def made_whole(folder: Path, ours: Callable[[Path], Sequence[str]]) -> Iterator[Path]:
    """Write a folder whole or not at all: gives an empty folder beside it, which takes its name when the block ends.

    If the block raises, nothing is left of it. What a killed process left is removed. What stands under the name of the
    folder is replaced and deleted: `ours` gives the patterns of its files for `remove_ours`, or raises if it holds
    files of others. The caller holds a lock. Raises OSError.
    """
    new, old = (folder.with_name(f".{folder.name}.lora-dist-{kind}") for kind in ("new", "old"))
    remove_ours(new, ["*"])  # only we write into a folder of this name
    remove_ours(old, ours(old))
    try:
        new.mkdir(parents=True)
        yield new
        if folder.is_dir() and os.listdir(folder) and ours(folder):
            folder.rename(old)  # at once, so that a reader never sees a part of it
        new.rename(folder)  # over an empty folder, if there is one
        sync(folder.parent)
    finally:
        with contextlib.suppress(OSError):
            remove_ours(new, ["*"])
    remove_ours(old, ours(old))


def free_bytes(path: Path) -> int:
    """Bytes that the disk has free where the folder or file is, or will be."""
    return shutil.disk_usage(next(parent for parent in (path, *path.parents) if parent.is_dir())).free


def remove_files(paths: Iterable[Path]) -> None:
    """Delete files that this process wrote, as far as they exist. Raises OSError."""
    for path in paths:
        path.unlink(missing_ok=True)


def sync_files(folder: Path) -> None:
    """Force all files of a folder to the disk, and give them the mode that the user's umask asks for.

    safetensors 0.8 writes files that only their owner can read.
    """
    (umask,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Umask:")]
    for path in files_of(folder):
        path.chmod(0o666 & ~int(umask.split()[1], 8))
        sync(path)


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def describe_file(path: Path) -> dict:
    """A manifest's entry for the file: its size in bytes and its sha256."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def is_as_described(path: Path, entry: dict) -> bool:
    """True if the file is as its manifest's entry says. A pipe is not opened: reading it could wait for ever."""
    return path.is_file() and describe_file(path) == entry


def files_of(folder: Path) -> list[Path]:
    """All files below the folder except the manifest, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def write_manifest(folder: Path, files: dict[str, dict] | None = None) -> None:
    """Declare a folder complete: write the sizes and checksums of its files. Call this last.

    `files` maps relative paths to entries as `describe_file` makes them; by default all files are read to make them.
    """
    files = files or {str(path.relative_to(folder)): describe_file(path) for path in files_of(folder)}
    write_whole(folder / MANIFEST, json.dumps(files, indent=2, sort_keys=True) + "\n")


def is_complete(folder: Path, checksums_of: slice = slice(None)) -> bool:
    """True if the folder has a manifest and its files match it.

    The sizes of all files are compared. Checksums are compared for the files in this slice of the manifest only, so
    that the ranks can divide the reading.
    """
    files = read_manifest(folder)
    with contextlib.suppress(UserError), boundary(str(folder)):
        if not all((folder / name).is_file() for name in files):  # opening a pipe would wait for ever
            return False
        sizes_fit = bool(files) and all((folder / name).stat().st_size == e["bytes"] for name, e in files.items())
        checked = list(files.items())[checksums_of]
        return sizes_fit and all(describe_file(folder / name) == entry for name, entry in checked)
    return False


def read_manifest(folder: Path) -> dict[str, dict]:
    """The entries of a folder's manifest by relative path; {} if there is none, or none of ours.

    A manifest that names a file outside the folder is not ours.
    """
    try:
        files = read_json(folder / MANIFEST, MANIFEST)
    except UserError:
        return {}
    inside = all(not Path(name).is_absolute() and ".." not in Path(name).parts for name in files)
    ours = all(isinstance(entry, dict) and entry.keys() == {"bytes", "sha256"} for entry in files.values())
    return files if inside and ours else {}
