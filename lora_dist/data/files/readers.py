"""Data files: of which kind each one is, and the records of the kinds that are text (JSON, CSV, lines).

Text is read here and not through `datasets`, which guesses types: a cell "NA" would become nothing, "007" the number 7
and a date a timestamp; a key that one record lacks would be added to it; and pyarrow crashes on deep JSON.
"""

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa

from lora_dist.boundary import HALF_CHARACTER, boundary, check_characters, without_repeats
from lora_dist.errors import UserError, require

READER_VERSION = 1  # raise it if the same file would give other records
KIND_OF_SUFFIX = {
    ".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".txt": "text",
    ".parquet": "parquet", ".arrow": "arrow",
}  # fmt: skip
TEXT_KINDS = ("json", "csv", "text")
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
OPENER_OF_MAGIC = {
    b"\x1f\x8b": gzip.open,
    b"BZh": lambda path: io.BufferedReader(Decompressed(path, bz2.BZ2Decompressor)),
    b"\xfd7zXZ\0": lambda path: io.BufferedReader(Decompressed(path, lzma.LZMADecompressor)),
    b"\x28\xb5\x2f\xfd": lambda path: io.BufferedReader(pa.input_stream(str(path), compression="zstd")),
}
TEXT_SUFFIXES = [suffix for suffix, kind in KIND_OF_SUFFIX.items() if kind in TEXT_KINDS]
WHAT_IS_READ = (
    f"files ending in {' '.join(KIND_OF_SUFFIX)} are read, those in {' '.join(TEXT_SUFFIXES)} also with "
    f"{' '.join(COMPRESSED_SUFFIXES)} added"
)
DECODER = json.JSONDecoder(object_pairs_hook=without_repeats)
WHITE_SPACE = re.compile(r"\s*")

Record = tuple[int, dict]  # the line on which it begins, counting from 1; {column: value}


def suffix_of(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: ".jsonl" for X.JSONL.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    return next((suffix for suffix in reversed(suffixes) if suffix not in COMPRESSED_SUFFIXES), "")


def kind_of(path: Path) -> str:
    """The kind of a data file: its suffix says it, or else its content. Raises UserError if no data can be in it.

    A FIFO or a device is refused before it is opened: reading one could wait for ever.
    """
    with boundary(f"--dataset_name {path}"):
        status = path.stat()
        why = "is neither a file nor a directory; data is read several times, so save it to a file first"
        require(stat.S_ISREG(status.st_mode), "dataset_name", path, why)
        require(status.st_size, "dataset_name", path, "is an empty file")
        with open(path, "rb") as file:
            magic = file.read(8)
        if magic.startswith(b"PAR1"):
            return "parquet"
        if kind := KIND_OF_SUFFIX.get(suffix_of(path)):
            compressed = kind not in TEXT_KINDS and any(magic.startswith(start) for start in OPENER_OF_MAGIC)
            require(not compressed, "dataset_name", path, f"is a compressed {kind} file; decompress it: {WHAT_IS_READ}")
            return kind
        with _open(path) as file:
            start = file.read(1000).removeprefix(b"\xef\xbb\xbf").lstrip()
        require(start[:1] in (b"{", b"["), "dataset_name", path, f"cannot tell what this file holds; {WHAT_IS_READ}")
        return "json"


def read_records(path: Path) -> Iterator[Record]:
    """The records of a JSON, CSV or text file, in order. Raises UserError, which names the file and the line."""
    with boundary(f"--dataset_name {path}"):
        yield from {"json": _json_records, "csv": _csv_records, "text": _text_records}[kind_of(path)](path)


def _open(path: Path) -> BinaryIO:
    """The file's bytes, decompressed. Its content decides whether it is compressed."""
    with open(path, "rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in OPENER_OF_MAGIC.items() if start.startswith(magic)), None)
    return opener(path) if opener else open(path, "rb")


class Decompressed(io.RawIOBase):
    """The bytes of a bz2 or xz file, of all its streams.

    Python's own readers take whatever follows the first stream and is none for padding, and leave it out. Raises
    EOFError if the last stream is cut off, and the decompressor's errors for what is no stream.
    """

    def __init__(self, path: Path, decompressor: type):
        self.file, self.new = open(path, "rb"), decompressor
        self.decompressor, self.rest = decompressor(), b""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer) -> int:
        while True:
            decompressor = self.decompressor
            if decompressor.eof:  # zeros may follow a stream of xz, to fill it up to a multiple of four bytes
                self.rest = self.rest.lstrip(b"\0")
                while not self.rest:
                    if not (read := self.file.read(io.DEFAULT_BUFFER_SIZE)):
                        return 0
                    self.rest = read.lstrip(b"\0")
                decompressor = self.decompressor = self.new()
            elif decompressor.needs_input and not self.rest:
                self.rest = self.file.read(io.DEFAULT_BUFFER_SIZE)
                if not self.rest:
                    raise EOFError("the compressed file ends in the middle of a stream")
            data = decompressor.decompress(self.rest, len(buffer))
            self.rest = decompressor.unused_data if decompressor.eof else b""
            if data:
                buffer[: len(data)] = data
                return len(data)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a UTF-8 file with their numbers, from 1, and their ends; without a byte order mark."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise _bad(path, number, f"byte 0x{byte:02x} is not UTF-8; convert the file to UTF-8") from None


def _bad(path: Path, line: int, why: str) -> UserError:
    return UserError(f"--dataset_name {path}: line {line}: {why}")


@contextlib.contextmanager
def _at(path: Path, line: int, *, text_begins: int | None = None) -> Iterator[None]:
    """Turn what a parser of the block raises into the one-line error with the file's line.

    `text_begins`: the line on which the text begins that the parser counts from; default: `line`.
    """
    with boundary(f"--dataset_name {path}: line {line}"):
        try:
            yield
        except json.JSONDecodeError as error:
            raise _bad(
                path, (text_begins or line) + error.lineno - 1, f"{error.msg}, at character {error.colno}"
            ) from None
        except RecursionError:
            raise _bad(path, line, "the JSON is nested too deep") from None


def _text_records(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        yield number, {"text": line.rstrip("\r\n")}


def _csv_records(path: Path) -> Iterator[Record]:
    """Every cell is text as it stands in the file; an empty cell is None. Blank lines are skipped."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if suffix_of(path) == ".tsv" else ","
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header = None
    while True:
        number = reader.line_num + 1  # a record may go over several lines
        with _at(path, number):
            fields = next(reader, None)
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = [name or f"Unnamed: {i}" for i, name in enumerate(fields)]  # pandas writes its index like this
            twice = [name for name in header if header.count(name) > 1]
            require(not twice, "dataset_name", path, f"two columns have the name {twice[0] if twice else ''}")
            continue
        if len(fields) != len(header):
            why = f"has {len(fields)} fields, but the header has {len(header)}; quote text that holds a {delimiter!r}"
            raise _bad(path, number, why)
        yield number, {name: field or None for name, field in zip(header, fields, strict=True)}


def _json_records(path: Path) -> Iterator[Record]:
    """One object per line; or else an array of objects or of texts; or objects that go over several lines."""
    filled = ((number, line) for number, line in _lines(path) if not line.isspace())
    first = next(filled, None)
    if first is None:
        return
    yield from _objects_per_line(path) if _is_object(path, *first) else _values(path)


def _is_object(path: Path, number: int, line: str) -> bool:
    """True if the line is a whole JSON object."""
    with _at(path, number):
        try:
            return isinstance(json.loads(line), dict)
        except json.JSONDecodeError:
            return False


def _objects_per_line(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if not line.isspace():
            with _at(path, number):
                record = _checked(path, number, DECODER.decode(line), bool(HALF_CHARACTER.search(line)))
            yield number, record


def _values(path: Path) -> Iterator[Record]:
    """The values of an array, or values that follow one another, in a file that is parsed as a whole."""
    text = "".join(line for _, line in _lines(path))
    surrogates = bool(HALF_CHARACTER.search(text))
    is_array, line = text.lstrip().startswith("["), 1
    counted = position = text.index("[") + 1 if is_array else 0
    line += text.count("\n", 0, counted)
    while True:
        start = WHITE_SPACE.match(text, position).end()
        if start == len(text) and not is_array:
            return
        if is_array and text.startswith("]", start):
            with _at(path, line, text_begins=1):
                _check_end(text, start + 1)
            return
        line, counted = line + text.count("\n", counted, start), start
        with _at(path, line, text_begins=1):
            value, end = DECODER.raw_decode(text, start)
            position = _after_comma(text, end) if is_array else end
        value = {"text": value} if is_array and isinstance(value, str) else value
        yield line, _checked(path, line, value, surrogates)


def _check_end(text: str, position: int) -> None:
    """Raises JSONDecodeError if something follows the array."""
    position = WHITE_SPACE.match(text, position).end()
    if position < len(text):
        raise json.JSONDecodeError("Extra data after the array; a file holds one array", text, position)


def _after_comma(text: str, position: int) -> int:
    """Where the next value of an array begins, or where the array ends."""
    position = WHITE_SPACE.match(text, position).end()
    if not text.startswith((",", "]"), position):
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    return position + text.startswith(",", position)


def _checked(path: Path, line: int, value, surrogates: bool) -> dict:
    """The value, if it is a record. `surrogates`: it may hold half a character, which no tokenizer takes."""
    if not isinstance(value, dict):
        raise _bad(path, line, f"holds a {type(value).__name__}, not an object whose keys are the columns")
    if surrogates:
        with boundary(f"--dataset_name {path}: line {line}", "half of an escaped character is missing"):
            check_characters(value)
    return value
