"""The quantized base on disk: all ranks write it once, each its own rows, and any number of ranks can read it.

The folder is a checkpoint as transformers and bitsandbytes write it, the same bytes at any number of ranks. Two more
files make it a cache: `fingerprint.json`, written first, says what it was made from; the manifest is written last. A
folder without both is never read.
"""

import contextlib
import dataclasses
import fnmatch
import json
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from lora_dist.boundary import one_line, read_json
from lora_dist.data.formats import load_tokenizer
from lora_dist.errors import UserError, require
from lora_dist.files import (
    MANIFEST,
    describe_file,
    files_of,
    is_complete,
    locked,
    remove_ours,
    sync,
    write_manifest,
    write_whole,
)  # fmt: skip
from lora_dist.model.bitsandbytes_format import bitsandbytes_config, write_bitsandbytes
from lora_dist.model.lazy_weights import OwnRows, weight_files, write_safetensors
from lora_dist.model.load import BaseOptions, hand_to_deepspeed, load_with, original_name, read_base
from lora_dist.model.memory import base_bytes
from lora_dist.model.quantization import QuantizedWeight, quantized_weights
from lora_dist.parallel.ranks import barrier, gather, num_ranks, this_rank
from lora_dist.parallel.strategies import Placement
from lora_dist.units import size

FORMAT = 1
MAX_FILE_BYTES = 2**29  # small, so that the ranks get nearly equal numbers of bytes to checksum
OTHER_FILES, MISSING = "holds files that are not a quantized base", "there is none"
CACHE_FILES = (  # what we and transformers write into it
    "fingerprint.json*", "config.json*", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json*", f"{MANIFEST}*", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates*", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def load_cached_base(
    name: str, options: BaseOptions, *, cache: str | None, setting: str = "--quantized_cache"
) -> PreTrainedModel:
    """Load a base as `load_base` does, from the folder `cache` if it holds this base; otherwise write it there too.

    `cache=None`: no cache. `setting`: the flag that names the folder, for messages. Two starts with one folder take
    turns: the second waits, and reads what the first wrote. Raises UserError if the folder holds something else, or
    cannot be written. Collective.
    """
    if cache is None:
        return load_with(name, options)
    store = Cache(Path(cache).resolve(), setting, fingerprint_of(name, options.quantization, options.dtype))
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
    return {
        "format": FORMAT,
        "bitsandbytes": version("bitsandbytes"),
        "quantization": quantization,
        "dtype": str(dtype),
        "files": stats,
        "base": original_name(name),
    }


class Cache:
    """The folder of a quantized base, on a disk that all ranks share. All methods are collective."""

    def __init__(self, folder: Path, setting: str, fingerprint: dict):
        """`folder` without symbolic links; `setting`: the flag that names it."""
        self.folder, self.setting, self.fingerprint = folder, setting, fingerprint
        self.partial = folder.with_name(f"{folder.name}.partial")

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Rank 0 keeps other starts out, and waits for one that is writing. Raises UserError."""
        held, problem = contextlib.ExitStack(), None
        with held:
            if this_rank() == 0:
                try:
                    lock = self.folder.with_name(f".{self.folder.name}.lock")
                    held.enter_context(locked(lock, "waiting for the process that writes this quantized base"))
                except OSError as error:
                    problem = error.strerror
            self._raise_any(problem)
            yield

    def problem(self) -> str | None:
        """Why the folder cannot be used as this cache; None if it can.

        Rank 0 compares the fingerprint; the ranks divide the checksums among them. Raises UserError if the folder holds
        files that no quantized base has.
        """
        problem = None
        if this_rank() == 0:
            problem = self._files_of_others() or self._compare_fingerprint()
        problem = gather(problem)[0]
        if problem and problem.startswith(OTHER_FILES):
            raise UserError(f"{self.setting} {self.folder}: {problem}; give an empty folder or a new name")
        if problem is None and not all(gather(is_complete(self.folder, slice(this_rank(), None, num_ranks())))):
            problem = "it is incomplete or damaged"
        return problem

    def _files_of_others(self) -> str | None:
        if self.folder.exists() and not self.folder.is_dir():
            return f"{OTHER_FILES}: it is a file"
        names = [str(path.relative_to(self.folder)) for path in sorted(self.folder.rglob("*"))]
        others = [name for name in names if not any(fnmatch.fnmatchcase(name, pattern) for pattern in CACHE_FILES)]
        if names and "fingerprint.json" not in names:
            others = others or names
        return f"{OTHER_FILES} ({ascii(others[0])})" if others else None

    def _compare_fingerprint(self) -> str | None:
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return MISSING
        try:
            found = read_json(self.folder / "fingerprint.json", "fingerprint.json")
        except UserError:
            return "its fingerprint.json is damaged"
        # The same files may be known by another name.
        differing = [key for key, value in self.fingerprint.items() if found.get(key) != value and key != "base"]
        return f"it was made with another {', '.join(differing)}" if differing else None

    def write(self, model: PreTrainedModel, name: str, dtype: torch.dtype) -> None:
        """Write a loaded base and its tokenizer, for `load_base` and transformers to read. Hold the lock meanwhile.

        `model`: from `read_base`, before DeepSpeed gets it. It is written beside the folder and renamed when it is
        whole. Raises UserError on all ranks if one cannot write; then nothing is left of it.
        """
        tokenizer = load_tokenizer(name)
        self._on_rank_0(self._start)
        why = "rank 0 has made this folder, but other ranks do not see it; give a folder on a disk that all ranks share"
        require(all(gather(self.partial.is_dir())), self.setting.removeprefix("--"), self.folder, why)
        error = write_safetensors(
            self.partial, stored_tensors(model, dtype), max_file_bytes=MAX_FILE_BYTES, is_main=this_rank() == 0,
            barrier=barrier,
        )  # fmt: skip
        self._raise_any(error and error.strerror)
        self._on_rank_0(lambda: self._write_small_files(model, tokenizer, dtype))
        files = files_of(self.partial)[this_rank() :: num_ranks()]
        described = gather({str(path.relative_to(self.partial)): describe_file(path) for path in files})
        whole = {name: entry for part in described for name, entry in part.items()}
        self._on_rank_0(lambda: self._put_in_place(whole))

    def _start(self) -> None:
        remove_ours(self.partial, CACHE_FILES)  # of a start that was killed
        self.partial.mkdir(parents=True)
        write_whole(self.partial / "fingerprint.json", json.dumps(self.fingerprint, indent=2) + "\n")

    def _write_small_files(self, model: PreTrainedModel, tokenizer, dtype: torch.dtype) -> None:
        tokenizer.save_pretrained(self.partial)
        model.generation_config.save_pretrained(self.partial)
        write_whole(self.partial / "config.json", json.dumps(_stored_config(model, dtype), indent=2) + "\n")

    def _put_in_place(self, files: dict[str, dict]) -> None:
        write_manifest(self.partial, files)
        remove_ours(self.folder, CACHE_FILES)
        self.partial.rename(self.folder)  # over an empty folder, if there is one
        sync(self.folder.parent)

    def _on_rank_0(self, work: Callable[[], None]) -> None:
        """Let rank 0 write. Raises UserError on all ranks if it cannot."""
        problem = None
        if this_rank() == 0:
            try:
                work()
            except (OSError, SafetensorError) as error:
                problem = getattr(error, "strerror", None) or one_line(error)
        self._raise_any(problem)

    def _raise_any(self, problem: str | None) -> None:
        """Raise the first rank's problem on all ranks, after the half-written folder is removed."""
        problems = [found for found in gather(problem) if found]
        if problems:
            if this_rank() == 0:
                with contextlib.suppress(OSError):
                    remove_ours(self.partial, CACHE_FILES)
            barrier()
            raise UserError(f"{self.setting} {self.folder}: cannot be written: {problems[0]}; give another folder")


def check_space(model: PreTrainedModel, folder: str, setting: str) -> None:
    """Raises UserError if the disk of a cache that is not there yet has no room for it. `model`: on meta."""
    path = Path(folder).resolve()
    if (path / MANIFEST).is_file():
        return
    parent = next(parent for parent in path.parents if parent.is_dir())
    needed, free = base_bytes(model).total, shutil.disk_usage(parent).free
    why = f"the quantized base needs {size(needed)}, and its disk has {size(free)} free; give another folder"
    require(needed <= free, setting.removeprefix("--"), folder, why)


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
