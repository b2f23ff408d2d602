"""The quantized base on disk: all ranks write it once, each its own rows, and any number of ranks can read it.

The folder is a checkpoint as transformers and bitsandbytes write it, the same bytes at any number of ranks. Two more
files make it a cache: `fingerprint.json` says what it was made from, and the manifest is written last. A folder without
both is never read.
"""

import contextlib
import dataclasses
import fnmatch
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from lora_dist.boundary import boundary, one_line
from lora_dist.data.formats import load_tokenizer
from lora_dist.errors import UserError, require
from lora_dist.files import (
    MANIFEST,
    describe_file,
    files_of,
    free_bytes,
    is_as_described,
    is_complete,
    lock_file,
    made_whole,
    read_manifest,
    wait_for_lock,
    write_manifest,
    write_whole,
)
from lora_dist.model.bitsandbytes_format import bitsandbytes_config, write_bitsandbytes
from lora_dist.model.files.configs import load_model_config
from lora_dist.model.files.lazy_weights import OwnRows, weight_files, write_safetensors
from lora_dist.model.load import (
    FINGERPRINT,
    BaseOptions,
    hand_to_deepspeed,
    load_with,
    original_name,
    read_base,
    read_fingerprint,
)
from lora_dist.model.memory import base_bytes
from lora_dist.model.quantization import QuantizedWeight, quantized_weights
from lora_dist.parallel.ranks import barrier, gather, num_ranks, this_rank
from lora_dist.parallel.strategies import Placement
from lora_dist.units import size

FORMAT = 2
MAX_FILE_BYTES = 2**29  # small, so that the ranks get nearly equal numbers of bytes to checksum
CACHE_FILES = [  # what we and transformers write into it
    "fingerprint.json*", "config.json*", "generation_config.json", "model.safetensors",
    "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json*", f"{MANIFEST}*", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "additional_chat_templates/*.jinja", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model",
]  # fmt: skip
MAX_NAME_BYTES = 200  # of a folder: a disk allows 255, and we write beside it under longer names
OTHER_FILES, OTHER_FOLDER = "holds files that are not a quantized base", "give an empty folder or a new name"
MISSING = "there is none"


def load_cached_base(
    name: str, options: BaseOptions, *, cache: str | None, setting: str = "--quantized_cache"
) -> PreTrainedModel:
    """Load a base as `load_with` does, from the folder `cache` if it holds this base; otherwise write it there too.

    `cache=None`: no cache. `setting`: the flag that names the folder, for messages. Two starts with one folder take
    turns: the second waits, and reads what the first wrote. Raises UserError if the folder holds something else, or
    cannot be written. Collective.
    """
    if cache is None:
        return load_with(name, options)
    store = Cache(folder_of(cache, setting), setting, fingerprint_of(name, options.quantization, options.dtype))
    with store.lock(shared=True):
        if store.problem() is None:
            return _load_from(store.folder, name, options)
    with store.lock():
        problem = store.problem()
        if problem is None:
            return _load_from(store.folder, name, options)
        if this_rank() == 0 and problem != MISSING:
            print(f"{setting} {store.folder}: {problem}; it is written again", flush=True)
        staged = options.placement.stages > 1  # a stage of a pipeline has no rows of each weight that it could write
        sharded = dataclasses.replace(options, placement=Placement(shard_ranks=num_ranks()))
        model = read_base(name, sharded if staged else options)
        store.write(model, name, options.dtype)
        if not staged:
            hand_to_deepspeed(model, options)
            return model
        del model
        return _load_from(store.folder, name, options)


def _load_from(folder: Path, name: str, options: BaseOptions) -> PreTrainedModel:
    model = load_with(str(folder), options)
    model.config.name_or_path = model.name_or_path = original_name(name)  # a saved adapter names this as its base
    return model


def fingerprint_of(name: str, quantization: str, dtype: torch.dtype) -> dict:
    """What a quantized base depends on: the checkpoint's files and how they are quantized; and its name."""
    files = [path.resolve() for path in weight_files(name)]  # in the hub's cache the name of a file is its checksum
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    config = json.dumps(load_model_config(name).to_diff_dict(), sort_keys=True, default=str)
    return {
        "format": FORMAT,
        "bitsandbytes": version("bitsandbytes"),
        "quantization": quantization,
        "dtype": str(dtype),
        "files": stats,
        "config": hashlib.sha256(config.encode()).hexdigest(),
        "base": original_name(name),
    }


def folder_of(cache: str, setting: str) -> Path:
    """The folder that `setting` names, absolute and without symbolic links. Raises UserError if no folder can be it."""
    with boundary(f"{setting} {ascii(cache)}", "give another folder"):
        folder = Path(cache).resolve()
        is_file = folder.exists() and not folder.is_dir()
        long = len(os.fsencode(folder.name)) > MAX_NAME_BYTES
    name = setting.removeprefix("--")
    require(not is_file, name, folder, f"{OTHER_FILES}: it is a file; {OTHER_FOLDER}")
    require(folder.name and cache.isprintable() and not long, name, ascii(cache), f"no folder's name; {OTHER_FOLDER}")
    return folder


def our_files(folder: Path, setting: str) -> list[str]:
    """Patterns of the files in the folder, which are all ours. Raises UserError if one is not of a quantized base.

    A folder is a quantized base if one of the two files is there that only we write; the other one may be damaged. A
    whole manifest lists all that we wrote. A file in it that has an uncommon name, as some tokenizers write them, must
    be as we wrote it.
    """
    with boundary(f"{setting} {folder}", "give another folder"):
        if not folder.is_dir() or not os.listdir(folder):
            return []
        listed = read_manifest(folder)
        if FINGERPRINT in listed:
            written = [n for n, e in listed.items() if _matches(n, CACHE_FILES) or is_as_described(folder / n, e)]
            ours = [*map(glob.escape, written), f"{MANIFEST}*"]
        else:
            ours = CACHE_FILES if read_fingerprint(folder) else []
        our_folders = {str(Path(name).parent) for name in ours}
        for parent, folders, files in os.walk(folder):  # from above: in a large folder of others this ends at once
            where = Path(parent).relative_to(folder)
            others = [name for name in files if not _matches(str(where / name), ours)]
            others += [name for name in folders if str(where / name) not in our_folders]
            if others:
                raise UserError(f"{setting} {folder}: {OTHER_FILES} ({ascii(str(where / others[0]))}); {OTHER_FOLDER}")
        return ours


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def check_cache(model: PreTrainedModel, cache: str, setting: str) -> None:
    """Raises UserError if the folder `cache` can neither be read as a quantized base nor become one.

    For the time before any rank begins. `model`: on meta.
    """
    folder = folder_of(cache, setting)
    our_files(folder, setting)
    if not (folder / MANIFEST).is_file():
        check_room(folder, setting, base_bytes(model).total)


def check_room(folder: Path, setting: str, needed_bytes: int) -> None:
    """Raises UserError if no folder of this name and size can be made. `needed_bytes`: 0 where it is not known yet."""
    name = setting.removeprefix("--")
    why = "it is a mount point, and a mount point cannot be replaced; give a folder inside it"
    require(not folder.is_mount(), name, folder, why)
    parent = next(parent for parent in folder.parents if parent.exists())
    require(parent.is_dir(), name, folder, f"cannot be written: {parent} is a file; give another folder")
    why = f"cannot be written: no permission for {parent}, or a read-only disk; give another folder"
    require(os.access(parent, os.W_OK | os.X_OK), name, folder, why)
    free = free_bytes(folder)
    why = f"the quantized base needs {size(needed_bytes)}, and its disk has {size(free)} free; give another folder"
    require(needed_bytes <= free, name, folder, why)


class Cache:
    """The folder of a quantized base, on a disk that all ranks share. All methods are collective."""

    def __init__(self, folder: Path, setting: str, fingerprint: dict):
        """`folder`: from `folder_of`; `setting`: the flag that names it."""
        self.folder, self.setting, self.fingerprint = folder, setting, fingerprint

    @contextlib.contextmanager
    def lock(self, *, shared: bool = False) -> Iterator[None]:
        """Rank 0 keeps other starts out, and waits for one that is writing. Raises UserError.

        `shared`: only writers are kept out. Then no lock is made, and none is needed where nobody can write.
        """
        path = self.folder.with_name(f".{self.folder.name}.lora-dist-lock")
        with contextlib.ExitStack() as held:
            take = [lambda: True]

            def prepare() -> None:
                if not shared:
                    check_room(self.folder, self.setting, 0)
                if not shared or os.access(path, os.W_OK):
                    take[0] = held.enter_context(lock_file(path, shared=shared))

            self._on_rank_0(prepare)
            waiting = f"waiting for the process that uses this quantized base: {path}" if this_rank() == 0 else ""
            # All ranks wait together, because a collective that one of them does not enter for long times out.
            wait_for_lock(lambda: self._on_rank_0(lambda: take[0]()), waiting)
            yield

    def problem(self) -> str | None:
        """Why the folder cannot be used as this cache; None if it can.

        Rank 0 compares the fingerprint; the ranks divide the checksums among them. Raises UserError if the folder holds
        files that no quantized base has.
        """
        problem = self._on_rank_0(self._compare_fingerprint)
        if problem is None and not all(gather(is_complete(self.folder, slice(this_rank(), None, num_ranks())))):
            problem = "it is incomplete or damaged"
        return problem

    def _compare_fingerprint(self) -> str | None:
        our_files(self.folder, self.setting)
        if not self.folder.is_dir() or not os.listdir(self.folder):
            return MISSING
        found = read_fingerprint(self.folder)
        if not found:
            return f"its {FINGERPRINT} is damaged"
        # The same files may be known by another name.
        differing = [key for key, value in self.fingerprint.items() if found.get(key) != value and key != "base"]
        return f"it was made with another {', '.join(differing)}" if differing else None

    def write(self, model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
        """Write a loaded base and its tokenizer, for `load_base` and transformers to read. Hold the lock meanwhile.

        `model`: from `read_base`, before DeepSpeed gets it. Raises UserError on all ranks if one cannot write; then
        nothing is left of it, and what was there before is still there.
        """
        tensors = stored_tensors(model, dtype)
        needed_bytes = sum(tensor.num_bytes for tensor in tensors.values())
        self._on_rank_0(lambda: check_room(self.folder, self.setting, needed_bytes))
        with contextlib.ExitStack() as making:
            ours = partial(our_files, setting=self.setting)
            new = self._on_rank_0(lambda: making.enter_context(made_whole(self.folder, ours)))
            why = "rank 0 made a folder beside it that other ranks do not see; give one on a disk that all ranks share"
            require(all(gather(new.is_dir())), self.setting.removeprefix("--"), self.folder, why)
            self._on_all_ranks(lambda: _write_weights(new, tensors))
            self._on_rank_0(lambda: self._write_small_files(new, model, name, dtype))
            files = self._on_rank_0(lambda: files_of(new))[this_rank() :: num_ranks()]
            described = self._on_all_ranks(lambda: {str(path.relative_to(new)): describe_file(path) for path in files})
            self._on_rank_0(lambda: write_manifest(new, {name: e for part in described for name, e in part.items()}))
            self._on_rank_0(making.close)

    def _write_small_files(self, folder: Path, model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
        write_whole(folder / FINGERPRINT, json.dumps(self.fingerprint, indent=2) + "\n")
        load_tokenizer(name).save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        write_whole(folder / "config.json", json.dumps(_stored_config(model, dtype), indent=2) + "\n")

    def _on_rank_0(self, work: Callable[[], Any]) -> Any:
        """What rank 0's work gives, on all ranks. Raises UserError on all of them if it fails."""
        return self._on_all_ranks(work if this_rank() == 0 else lambda: None)[0]

    def _on_all_ranks(self, work: Callable[[], Any]) -> list:
        """What the work gives on each rank, on all ranks. Raises UserError on all of them if it fails on one."""
        result = problem = None
        try:
            result = work()
        except UserError as error:
            problem = str(error)
        except Exception as error:  # whatever kind: the other ranks wait for an answer
            why = f"cannot be written: {getattr(error, 'strerror', None) or one_line(error)}"
            why += f"; its disk has {size(free_bytes(self.folder))} free"
            problem = f"{self.setting} {self.folder}: {why}; give another folder"
        answers = gather((result, problem))
        for _, problem in answers:
            if problem:
                raise UserError(problem)
        return [result for result, _ in answers]


def _write_weights(folder: Path, tensors: dict[str, OwnRows]) -> None:
    error = write_safetensors(
        folder, tensors, max_file_bytes=MAX_FILE_BYTES, is_main=this_rank() == 0, barrier=barrier
    )  # fmt: skip
    if error:
        raise error


def _stored_config(model: PreTrainedModel, dtype: torch.dtype) -> dict:
    config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
    config.pop("_name_or_path", None)  # a path of this machine
    config["quantization_config"] = bitsandbytes_config(model, dtype)
    return config


def stored_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, OwnRows]:
    """All tensors of the model as bitsandbytes stores them, with the rows that this rank writes. Collective."""
    tensors, part_ids = {}, set()
    for module_name, module in model.named_modules():
        for weight_name, weight in quantized_weights(module).items():
            part_ids |= {id(part) for part in weight.parts(module)}
            tensors |= _stored_weight(f"{module_name}.{weight_name}", weight, module, dtype)
    unquantized = [(name, param) for name, param in model.named_parameters() if id(param) not in part_ids]
    persistent = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    return tensors | {name: own_rows(tensor) for name, tensor in unquantized + buffers}


def _stored_weight(
    name: str, weight: QuantizedWeight, module: torch.nn.Module, dtype: torch.dtype
) -> dict[str, OwnRows]:
    """The entries for one quantized weight. Collective: the part `nested` is gathered."""
    codes, scales, *nested = weight.parts(module)
    if nested:
        whole = nested[0].full_tensor() if isinstance(nested[0], DTensor) else nested[0]
        nested = [whole.detach().view(torch.float32)]
    return write_bitsandbytes(
        name, weight, [own_rows(codes), own_rows(scales)], nested[0] if nested else None,
        dtype=dtype, writes=this_rank() == 0,
    )  # fmt: skip


def own_rows(tensor: torch.Tensor) -> OwnRows:
    """What this rank writes of a tensor: its shard, if it belongs to the first copy. Rank 0 writes unsharded ones."""
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if not isinstance(tensor, DTensor):
        return OwnRows(shape, dtype, tensor if this_rank() == 0 else tensor.flatten()[:0])
    local = tensor.to_local()
    if this_rank() >= tensor.device_mesh.size():
        local = local[:0]
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return OwnRows(shape, dtype, local, offset[0] * torch.Size(shape[1:]).numel() if len(local) else 0)
