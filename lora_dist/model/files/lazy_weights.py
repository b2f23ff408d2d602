"""Checkpoint files as lazy tensors, which read only the rows that are asked for; and safetensors files written by rows.

transformers' loader gets the lazy tensors as its `state_dict` and slices them by the placement of each parameter. Files
are read with pread, so a rank reads exactly the bytes that it asked for, and maps no page of a file into its memory.
(safetensors 0.8 has a pread backend, but it reads a whole tensor to return a slice; torch.load maps the whole file.)
"""

import json
import math
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import _get_resolved_checkpoint_files, str_to_torch_dtype

from lora_dist.boundary import boundary, read_json, without_repeats
from lora_dist.embedded import model_path
from lora_dist.errors import UserError
from lora_dist.files import write_whole

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")  # a sharded checkpoint has an index of this name instead
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
AGAIN = "download it again, or save the model as safetensors"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk. `read(rows, columns)` reads a block: slices of the first and of the second dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[slice, slice], torch.Tensor]
    file: Path | None = None  # None for a tensor that was made of others

    def get_shape(self) -> list[int]:  # the loader calls it, because safetensors' slices have it
        return list(self.shape)

    def __getitem__(self, index) -> torch.Tensor:
        index = index if isinstance(index, tuple) else (index,)
        index = () if index == (...,) else index
        return self.read(index[0] if index else slice(None), slice(None))[(slice(None), *index[1:]) if index else ()]

    def as_rows(self, *shape: int) -> "LazyTensor":
        """The same elements in another shape, which has fewer and longer rows."""
        ratio = self.shape[0] // shape[0]

        def read(rows, columns):
            start, stop, _ = rows.indices(shape[0])
            return self.read(slice(start * ratio, stop * ratio), slice(None)).view(stop - start, *shape[1:])[:, columns]

        return LazyTensor(shape, self.dtype, read)

    def viewed(self, dtype: torch.dtype) -> "LazyTensor":
        """The same bytes as another dtype. The last dimension changes with the size of an element."""
        last = self.shape[-1] * self.dtype.itemsize // dtype.itemsize
        return LazyTensor((*self.shape[:-1], last), dtype, lambda rows, columns: self.read(rows, columns).view(dtype))

    def watched(self, found: Callable[[], None], largest: float) -> "LazyTensor":
        """The same tensor. It calls `found()` when a block is read that holds NaN, or a number beyond `largest`.

        aminmax gives NaN if there is one. It takes 16 ms for 128 MiB of fp16 on one core, and isfinite 450 ms.
        """

        def read(rows, columns):
            block = self.read(rows, columns)
            if block.dtype.is_floating_point and block.dtype != torch.float4_e2m1fn_x2 and block.numel():
                checked = block.float() if block.dtype.itemsize == 1 else block  # float8 has no aminmax
                if not all(abs(value) <= largest for value in map(float, checked.aminmax())):
                    found()
            return block

        return replace(self, read=read)

    def transposed(self) -> "LazyTensor":
        """The transpose of a matrix. Reading its rows reads columns of the file: only those bytes, in short reads."""
        return LazyTensor(self.shape[::-1], self.dtype, lambda rows, columns: self.read(columns, rows).t().contiguous())


def weight_files(name: str) -> list[Path]:
    """The checkpoint files of a model directory or hub name: safetensors, or .bin if there are none.

    Downloads them if needed. Raises UserError if there are none, or if the index of a sharded checkpoint is damaged.
    """
    folder, what = Path(model_path(name)), f"--model_name_or_path {name}"
    if not folder.is_dir():
        with boundary(what):
            downloaded, _ = _get_resolved_checkpoint_files(
                str(folder), variant=None, gguf_file=None, use_safetensors=None, user_agent={}, is_remote_code=False
            )
        folder = Path(downloaded[0]).parent
    for single in SINGLE_FILES:
        if (folder / single).is_file():
            return [folder / single]
        index = folder / f"{single}.index.json"
        if index.is_file():
            return [folder / file_name for file_name in sorted(set(_read_index(index).values()))]
    raise UserError(f"{what}: no file named {' or '.join(SINGLE_FILES)}, nor an index of several files")


def _read_index(index: Path) -> dict[str, str]:
    """The file name of each tensor of a sharded checkpoint. Raises UserError unless each is a file of its folder."""
    what = f"--model_name_or_path {index}"
    file_of = read_json(index, what).get("weight_map")
    if not isinstance(file_of, dict) or not file_of or not all(isinstance(name, str) for name in file_of.values()):
        raise UserError(f"{what}: its weight_map must give the file name of each tensor; download it again")
    with boundary(what, AGAIN):
        for name in sorted(set(file_of.values())):
            # In the hub's cache each file of a snapshot is a link to ../../blobs.
            folder = index.parent.resolve()
            allowed = folder.parents[1] if folder.parent.name == "snapshots" else folder
            if Path(name).name != name or not (index.parent / name).resolve().is_relative_to(allowed):
                raise UserError(
                    f"{what}: it names {name!r}, which is outside of its folder; put the file into the folder"
                )
            if not (index.parent / name).is_file():
                raise UserError(f"{what}: it names {name!r}, which is not there; download it again")
    return file_of


def open_checkpoint(name: str) -> dict[str, LazyTensor]:
    """All tensors of a model directory or hub name. Reads only the headers. Raises UserError if a file is damaged."""
    files = weight_files(name)
    tensors = open_weights(files)
    if files[0].name not in SINGLE_FILES:
        (single,) = [single for single in SINGLE_FILES if single.endswith(files[0].suffix)]
        index = files[0].parent / f"{single}.index.json"
        for tensor, file_name in _read_index(index).items():
            if tensor not in tensors or tensors[tensor].file.name != file_name:
                raise UserError(f"--model_name_or_path {index}: {file_name} holds no {tensor}; download it again")
    return tensors


def open_weights(files: list[Path]) -> dict[str, LazyTensor]:
    """All tensors of the files, by name. Reads only the headers. Raises UserError if a file is damaged."""
    tensors = {}
    for file in files:
        with boundary(f"--model_name_or_path {file}", hint=AGAIN):
            found = _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise UserError(f"--model_name_or_path {file}: {twice[0]} is in another file too; {AGAIN}")
        tensors |= found
    return tensors


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    entries, start = read_safetensors_header(file)
    return _lazy_tensors(
        file,
        {
            name: (tuple(entry["shape"]), str_to_torch_dtype[entry["dtype"]], start + entry["data_offsets"][0])
            for name, entry in entries.items()
        },
    )


def read_safetensors_header(file: Path) -> tuple[dict[str, dict], int]:
    """(the entries of a safetensors file by tensor, offset of the first tensor's byte).

    Raises an exception unless the tensors have known dtypes, fill their bytes exactly, and lie one after another to the
    end of the file, as safetensors demands. Otherwise a tensor could be made of the bytes of another one.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        (header_size,) = struct.unpack("<Q", stream.read(8))
        if header_size > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"the file is truncated or damaged: it has {size} bytes, its header {header_size}")
        header = json.loads(stream.read(header_size).decode(), object_pairs_hook=without_repeats)
    if not isinstance(header, dict):
        raise ValueError(f"its header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    end = 0
    for start, stop, name in sorted((*_offsets(name, entry), name) for name, entry in header.items()):
        if start != end:
            raise ValueError(f"the bytes of {name} begin at {start}, but those before it end at {end}")
        end = stop
    if end != size - 8 - header_size:
        found = size - 8 - header_size
        raise ValueError(f"the file is truncated or damaged: it has {found} bytes of tensors, its header says {end}")
    return header, 8 + header_size


def _offsets(name: str, entry: dict) -> tuple[int, int]:
    """First and last byte of a tensor. Raises an exception unless its shape and dtype need just as many."""
    shape, (start, stop) = entry["shape"], entry["data_offsets"]
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"{name} has the shape {shape} and the offsets {start}, {stop}")
    if entry["dtype"] not in str_to_torch_dtype:
        raise ValueError(f"{name} has the unknown dtype {entry['dtype']}")
    needed = math.prod(shape) * str_to_torch_dtype[entry["dtype"]].itemsize
    if needed != stop - start:
        raise ValueError(f"{name} of shape {shape} needs {needed} bytes and has {stop - start}")
    return start, stop


def _lazy_tensors(file: Path, locations: dict[str, tuple[tuple[int, ...], torch.dtype, int]]) -> dict[str, LazyTensor]:
    """The tensors of a file by name. `locations`: (shape, dtype, offset of the first byte) of each."""
    # Opened by the first read, and open until the process ends: a base is loaded once, but its headers are read often.
    descriptor = cache(partial(os.open, file, os.O_RDONLY))
    return {name: _tensor_in_file(file, descriptor, *location) for name, location in locations.items()}


def _tensor_in_file(
    file: Path, descriptor: Callable[[], int], shape: tuple[int, ...], dtype: torch.dtype, start: int
) -> LazyTensor:
    row_numel = torch.Size(shape[1:]).numel()

    def read(rows, columns):
        first, last, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        num_rows = max(0, last - first)
        if columns == slice(None):
            offset = start + first * row_numel * dtype.itemsize
            block = _pread(descriptor(), num_rows * row_numel, dtype, offset).view(num_rows, *shape[1:])
            return block if shape else block[0]
        left, right, _ = columns.indices(shape[1])
        block_rows = [
            _pread(descriptor(), right - left, dtype, start + (row * shape[1] + left) * dtype.itemsize)
            for row in range(first, last)
        ]
        return torch.stack(block_rows)

    return LazyTensor(shape, dtype, read, file)


def _pread(descriptor: int, numel: int, dtype: torch.dtype, offset: int) -> torch.Tensor:
    raw = torch.empty(numel * dtype.itemsize, dtype=torch.uint8)
    view, done = memoryview(raw.numpy()), 0
    while done < len(view):  # one call reads 2 GiB at most
        count = os.preadv(descriptor, [view[done:]], offset + done)
        if not count:
            raise OSError(f"file ended {len(view) - done} bytes early")
        done += count
    return raw.view(dtype)


def _open_bin(file: Path) -> dict[str, LazyTensor]:
    """The tensors of a .bin file. Under FakeTensorMode torch.load reads no data, but records each storage's offset."""
    if zipfile.is_zipfile(file):  # first: torch.load ends with SIGSEGV where it swaps the bytes of a fake tensor
        with zipfile.ZipFile(file) as archive:
            orders = [archive.read(entry) for entry in archive.namelist() if entry.endswith("/byteorder")]
            if any(e.compress_type != zipfile.ZIP_STORED for e in archive.infolist()) or orders not in (
                [],
                [b"little"],
            ):
                raise ValueError("its tensors are not stored as plain little-endian numbers")
    with FakeTensorMode():
        tensors = torch.load(file, weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise ValueError("it holds something else than tensors by name")
    ends = _ends_in_zip(file) if zipfile.is_zipfile(file) else {}
    return _lazy_tensors(file, {name: _location_in_zip(tensor, ends) for name, tensor in tensors.items()})


def _ends_in_zip(file: Path) -> dict[int, int]:
    """{offset of the first byte: offset behind the last} of each entry. Only an entry's own header says where it is."""
    ends = {}
    with zipfile.ZipFile(file) as archive, open(file, "rb", buffering=0) as stream:
        for entry in archive.infolist():
            stream.seek(entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", stream.read(4)))  # of its name and extra field
            ends[start] = start + entry.file_size
    return ends


def _location_in_zip(tensor: torch.Tensor, ends: dict[int, int]) -> tuple[tuple[int, ...], torch.dtype, int]:
    """(shape, dtype, offset of the first byte) of a fake tensor in its file. `ends`: from `_ends_in_zip`."""
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None or not tensor.is_contiguous():
        raise ValueError("its tensors are not stored row by row")
    first = start + tensor.storage_offset() * tensor.element_size()
    if first + tensor.numel() * tensor.element_size() > ends.get(start, 0):
        raise ValueError("the file is damaged: a tensor is larger than its storage")
    return tuple(tensor.shape), tensor.dtype, first


@dataclass(frozen=True)
class OwnRows:
    """A tensor that the ranks write together, with the elements that this rank writes."""

    shape: tuple[int, ...]  # of the whole tensor
    dtype: torch.dtype
    own: torch.Tensor  # what this rank writes; may be empty
    start: int = 0  # index of the first element of `own` in the flattened whole tensor

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    folder: Path, tensors: dict[str, OwnRows], *, max_file_bytes: int, is_main: bool, barrier: Callable[[], None]
) -> OSError | None:
    """Write safetensors files, each rank its own rows, and an index file if there are several. Collective.

    Returns this rank's first error, after which it writes nothing more. It still meets the others at each barrier.

    The files are the same at any number of ranks, and on the disk (fsync) when it returns. Every rank must pass the
    same names in the same order. `is_main` is True on one rank; `barrier()` waits for all ranks.
    """
    groups, size = [{}], 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.num_bytes > max_file_bytes:
            groups, size = [*groups, {}], 0
        groups[-1][name], size = tensor, size + tensor.num_bytes
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    error = None
    for file_name, group in zip(names, groups, strict=True):
        error = _write_rows(folder / file_name, group, barrier, error)
    if len(groups) > 1 and is_main and not error:
        file_of = {name: file_name for file_name, group in zip(names, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(t.num_bytes for t in tensors.values())}, "weight_map": file_of}
        try:
            write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
        except OSError as raised:
            error = raised
    barrier()
    return error


def _write_rows(
    file: Path, tensors: dict[str, OwnRows], barrier: Callable[[], None], error: OSError | None
) -> OSError | None:
    """Write this rank's rows of one file, unless there was an error. Returns the error, or the one that came."""
    dtype_names = {dtype: name for name, dtype in str_to_torch_dtype.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.num_bytes]
        header[name] = {"dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    descriptor = None
    try:
        if not error:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(descriptor, 8 + len(text) + end)  # all ranks set the same size: their order does not matter
    except OSError as raised:
        error = raised
    barrier()
    try:
        if not error:
            os.pwrite(descriptor, struct.pack("<Q", len(text)) + text, 0)
            for name, tensor in tensors.items():
                start = header[name]["data_offsets"][0] + tensor.start * tensor.dtype.itemsize
                _write_at(descriptor, tensor.own, 8 + len(text) + start)
            os.fsync(descriptor)
    except OSError as raised:
        error = raised
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return error


def _write_at(descriptor: int, tensor: torch.Tensor, offset: int) -> None:
    raw = memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    while raw:  # one call writes 2 GiB at most
        count = os.pwrite(descriptor, raw, offset)
        raw, offset = raw[count:], offset + count
