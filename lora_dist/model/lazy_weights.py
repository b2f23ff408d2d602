"""The base's weights on disk, as tensors of which only the rows that are asked for are read.

transformers' loader takes them in place of its own (`state_dict=`) and slices them by the placement of each parameter.
Files are read with pread: what a rank reads is what it asked for, to the byte, and no page of a file is mapped into it.
(safetensors' own pread backend, 0.8, reads a whole tensor to give a slice of it; torch.load maps the whole file.)
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.modeling_utils import _get_resolved_checkpoint_files, str_to_torch_dtype

from lora_dist.embedded import model_path
from lora_dist.errors import UserError
from lora_dist.files import write_whole


@dataclass(frozen=True)
class LazyTensor:
    """A tensor on disk. `read(rows, columns)` reads that block; `columns` cut its second dimension."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[slice, slice], torch.Tensor]

    def get_shape(self) -> list[int]:  # the name the loader asks for, that of safetensors' slices
        return list(self.shape)

    def __getitem__(self, index) -> torch.Tensor:
        index = index if isinstance(index, tuple) else (index,)
        index = () if index == (...,) else index
        return self.read(index[0] if index else slice(None), slice(None))[(slice(None), *index[1:]) if index else ()]

    def as_rows(self, *shape: int) -> "LazyTensor":
        """The same elements in fewer, longer rows."""
        ratio = self.shape[0] // shape[0]

        def read(rows, columns):
            start, stop, _ = rows.indices(shape[0])
            return self.read(slice(start * ratio, stop * ratio), slice(None)).view(stop - start, *shape[1:])[:, columns]

        return LazyTensor(shape, self.dtype, read)

    def viewed(self, dtype: torch.dtype) -> "LazyTensor":
        """The same bytes as another dtype; the last dimension changes with the size of an element."""
        last = self.shape[-1] * self.dtype.itemsize // dtype.itemsize
        return LazyTensor((*self.shape[:-1], last), dtype, lambda rows, columns: self.read(rows, columns).view(dtype))

    def transposed(self) -> "LazyTensor":
        """Of a matrix. Reading rows of it reads columns of the file: 1/N of the bytes, in short pieces."""
        return LazyTensor(self.shape[::-1], self.dtype, lambda rows, columns: self.read(columns, rows).t().contiguous())


def weight_files(name: str) -> list[Path]:
    """The checkpoint files of a model directory or hub name, downloaded if need be: safetensors, else .bin."""
    try:
        files, _ = _get_resolved_checkpoint_files(
            model_path(name), variant=None, gguf_file=None, use_safetensors=None, user_agent={}, is_remote_code=False
        )
    except OSError as error:
        raise UserError(f"--model_name_or_path {name}: {str(error).strip().splitlines()[0]}") from None
    return [Path(file) for file in files]


def open_weights(files: list[Path]) -> dict[str, LazyTensor]:
    """Name to tensor of all the files; nothing but their headers is read. Raises UserError where one is damaged."""
    tensors = {}
    for file in files:
        tensors |= _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)
    return tensors


def _open_safetensors(file: Path) -> dict[str, LazyTensor]:
    size = file.stat().st_size
    try:
        with open(file, "rb") as stream:
            (header_size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(header_size, size)))
        header.pop("__metadata__", None)
        complete = max((e["data_offsets"][1] for e in header.values()), default=0) + 8 + header_size <= size
    except (struct.error, ValueError):
        complete = False
    if not complete:
        raise UserError(f"--model_name_or_path {file}: cut short or damaged; get the file again")
    places = {
        name: (tuple(e["shape"]), str_to_torch_dtype[e["dtype"]], 8 + header_size + e["data_offsets"][0])
        for name, e in header.items()
    }
    return _lazy_tensors(file, places)


def _lazy_tensors(file: Path, places: dict[str, tuple[tuple[int, ...], torch.dtype, int]]) -> dict[str, LazyTensor]:
    """Name to tensor of a file, from the shape, dtype and first byte of each."""
    descriptor = os.open(file, os.O_RDONLY)  # for the process's lifetime: a base is loaded once
    return {name: _in_file(descriptor, *place) for name, place in places.items()}


def _in_file(descriptor: int, shape: tuple[int, ...], dtype: torch.dtype, start: int) -> LazyTensor:
    row_numel = torch.Size(shape[1:]).numel()

    def read(rows, columns):
        first, last, _ = rows.indices(shape[0]) if shape else (0, 1, 1)
        num_rows = max(0, last - first)
        if columns == slice(None):
            offset = start + first * row_numel * dtype.itemsize
            block = _pread(descriptor, num_rows * row_numel, dtype, offset).view(num_rows, *shape[1:])
            return block if shape else block[0]
        left, right, _ = columns.indices(shape[1])
        pieces = [
            _pread(descriptor, right - left, dtype, start + (row * shape[1] + left) * dtype.itemsize)
            for row in range(first, last)
        ]
        return torch.stack(pieces)

    return LazyTensor(shape, dtype, read)


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
    """torch's own reading of its zip, without the data: on fake tensors it leaves where in the file each one lies."""
    try:
        with FakeTensorMode():
            tensors = torch.load(file, weights_only=True)
        return _lazy_tensors(file, {name: _place_in_zip(tensor) for name, tensor in tensors.items()})
    except (RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--model_name_or_path {file}: {reason}; save the model as safetensors") from None


def _place_in_zip(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, int]:
    start = tensor.untyped_storage()._checkpoint_offset
    if start is None or not tensor.is_contiguous():
        raise ValueError("its tensors do not lie in the file row by row")
    return tuple(tensor.shape), tensor.dtype, start + tensor.storage_offset() * tensor.element_size()


@dataclass(frozen=True)
class OwnRows:
    """A tensor to write that all ranks hold together: its shape and dtype, and this rank's part of its elements.

    `own` is empty on a rank that has nothing of it to write; `start` is the index of its first element in the whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    own: torch.Tensor
    start: int = 0

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(
    folder: Path, tensors: dict[str, OwnRows], *, max_file_bytes: int, is_main: bool, barrier: Callable[[], None]
) -> None:
    """Write tensors to safetensors files that do not depend on the number of ranks, each rank its own rows.

    With an index file where there are several. Every rank must name the same tensors in the same order; `is_main` is
    one of them, and `barrier()` waits for all. Files are on disk (fsync) when it returns.
    """
    groups, size = [{}], 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.num_bytes > max_file_bytes:
            groups, size = [*groups, {}], 0
        groups[-1][name], size = tensor, size + tensor.num_bytes
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    for file_name, group in zip(names, groups, strict=True):
        _write_rows(folder / file_name, group, barrier)
    if len(groups) > 1 and is_main:
        where = {name: file_name for file_name, group in zip(names, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": sum(t.num_bytes for t in tensors.values())}, "weight_map": where}
        write_whole(folder / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    barrier()


def _write_rows(file: Path, tensors: dict[str, OwnRows], barrier: Callable[[], None]) -> None:
    dtype_names = {dtype: name for name, dtype in str_to_torch_dtype.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        offsets = [end, end := end + tensor.num_bytes]
        header[name] = {"dtype": dtype_names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    os.ftruncate(descriptor, 8 + len(text) + end)  # the same on all ranks, in any order
    barrier()
    os.pwrite(descriptor, struct.pack("<Q", len(text)) + text, 0)
    for name, tensor in tensors.items():
        raw = memoryview(tensor.own.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        offset = 8 + len(text) + header[name]["data_offsets"][0] + tensor.start * tensor.dtype.itemsize
        while raw:  # one call writes 2 GiB at most
            count = os.pwrite(descriptor, raw, offset)
            raw, offset = raw[count:], offset + count
    os.fsync(descriptor)
    os.close(descriptor)
