"""Local files that `--dataset_name` stands for: a file, several, a pattern, a folder."""

import glob
import hashlib
import os
import re
import shlex
from collections.abc import Collection
from pathlib import Path

from datasets.data_files import FILES_TO_IGNORE, DataFilesPatternsDict, get_data_patterns

from lora_dist.config import TrainConfig
from lora_dist.data.files.readers import (
    COMPRESSED_SUFFIXES,
    KIND_OF_SUFFIX,
    READER_VERSION,
    WHAT_IS_READ,
    kind_of,
    suffix_of,
)
from lora_dist.embedded import dataset_dir
from lora_dist.errors import require


def is_saved(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def find_files(name: str, config: TrainConfig) -> dict[str, list[Path]] | None:
    """The files that `--dataset_name` stands for, by split. None if it is a hub name or a folder that datasets reads.

    Several names stand in one value, quoted as on a command line. Raises UserError if a file is not there.
    """
    if embedded := dataset_dir(name):
        return {split: [embedded / f"{split}.jsonl"] for split in ("train", "test")}
    path = Path(name).expanduser()
    if path.is_dir():
        return None if is_saved(path) or _describes_itself(path, config) else _files_of_directory(path)
    words = [name] if path.exists() else shlex.split(name)
    is_hub_name = len(words) == 1 and not glob.has_magic(name) and not path.exists() and not _looks_like_file(name)
    return None if is_hub_name else {"train": [file for word in words for file in _files_of_word(word)]}


def _looks_like_file(name: str) -> bool:
    return (
        name.startswith(("/", ".", "~"))
        or suffix_of(Path(name)) in KIND_OF_SUFFIX
        or name.endswith(COMPRESSED_SUFFIXES)
    )


def _files_of_word(word: str) -> list[Path]:
    """The file of this name, or else the files that match the pattern."""
    path = Path(word).expanduser()
    if path.exists():
        return [path]
    matching = sorted(glob.glob(str(path), recursive=True))
    require(matching, "dataset_name", word, "no file matches this" if glob.has_magic(word) else "no such file")
    return [Path(match) for match in matching]


def _describes_itself(path: Path, config: TrainConfig) -> bool:
    """True if a folder's README.md names its files or their columns, as on the hub."""
    readme = path / "README.md"
    head = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return bool(config.dataset_config or re.match(r"---\n(.*\n)*?(configs|dataset_info):", head))


def all_files(path: Path) -> list[Path]:
    """Whatever is inside a folder, sorted. Raises UserError if a folder in it is a link, which would be left out."""
    found = sorted(path.rglob("*"))
    link = next((f for f in found if f.is_symlink() and f.is_dir() and not f.name.startswith(".")), None)
    why = "is a link to a folder, which is not followed; name its files, for example with a pattern"
    require(link is None, "dataset_name", link, why)
    return found


def _files_of_directory(path: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split, which their names say as on the hub, e.g. train.jsonl and test.jsonl."""
    relative = (file.relative_to(path) for file in all_files(path))
    shown = [file for file in relative if not any(part.startswith((".", "__")) for part in file.parts)]
    data = [path / f for f in shown if suffix_of(f) in KIND_OF_SUFFIX and f.name not in FILES_TO_IGNORE]
    require(data, "dataset_name", path, f"has no data files; {WHAT_IS_READ}")
    for file in data:
        kind_of(file)  # refuses what is no file; the search for splits would leave it out
    start = os.path.abspath(path)
    why = "datasets cannot search a folder with *, ? or [ in its path; rename it, or name its files"
    require(not glob.has_magic(start), "dataset_name", path, why)
    found = DataFilesPatternsDict.from_patterns(get_data_patterns(str(path))).resolve(str(path))
    files = {str(split): [path / os.path.relpath(file, start) for file in names] for split, names in found.items()}
    files = {split: [file for file in names if file in data] for split, names in files.items()}
    used = {file for names in files.values() for file in names}
    left = [str(file.relative_to(path)) for file in data if file not in used]
    splits = ", ".join(files)
    why = f"its file {', '.join(left)} belongs to none of the splits {splits}; name the files to read"
    require(not left, "dataset_name", path, why)
    return {split: names for split, names in files.items() if names}


def require_same_columns(path: Path, columns: Collection[str], first: Path, of_first: Collection[str]) -> None:
    """Raises UserError, which names file and columns, unless a file has the columns of the first one."""
    for has, lacks, names in ((path, first, {*columns} - {*of_first}), (first, path, {*of_first} - {*columns})):
        why = f"lacks the column {', '.join(sorted(names))}, which {has} has; make the files alike"
        require(not names, "dataset_name", lacks, why)


def one_kind(name: str, files: dict[str, list[Path]] | None) -> str | None:
    """The kind of all files. Raises UserError, which names two of them, if they are of different kinds."""
    example_of = {kind_of(path): path for paths in (files or {}).values() for path in paths}
    several = " and ".join(str(path) for path in example_of.values())
    why = f"holds {several}, which are of different kinds; name files of one kind, for example with a pattern"
    require(len(example_of) < 2, "dataset_name", name, why)
    return next(iter(example_of), None)


def content_of(files: dict[str, list[Path]]) -> str | None:
    """Hash of the names and the bytes of files; None if there are none."""
    digest = hashlib.sha256(str(READER_VERSION).encode())
    for split, paths in files.items():
        for path in paths:
            if path.is_file():
                with open(path, "rb") as opened:
                    digest.update(f"{split} {path.name} {hashlib.file_digest(opened, 'sha256').hexdigest()}".encode())
    return digest.hexdigest() if files else None
