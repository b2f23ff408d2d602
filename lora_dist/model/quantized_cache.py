"""The quantized base on disk: all ranks write it once, each its own rows, and any number of ranks can read it.

The folder is a checkpoint as transformers and bitsandbytes write it, the same bytes at any number of ranks. Two more
files make it a cache: `fingerprint.json`, written first, says what it was made from; the manifest is written last. A
folder without both is never read.
"""

import dataclasses
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import PreTrainedModel

from lora_dist.data.formats import load_tokenizer
from lora_dist.embedded import model_path
from lora_dist.errors import UserError, require
from lora_dist.files import describe_file, files_of, is_complete, write_manifest, write_whole
from lora_dist.model.bitsandbytes_format import bitsandbytes_config, write_bitsandbytes
from lora_dist.model.lazy_weights import OwnRows, weight_files, write_safetensors
from lora_dist.model.load import BaseOptions, hand_to_deepspeed, load_with, read_base
from lora_dist.model.quantization import QuantizedWeight, quantized_weights
from lora_dist.parallel.ranks import barrier, gather, num_ranks, this_rank
from lora_dist.parallel.strategies import Placement

FORMAT = 1
MAX_FILE_BYTES = 2**29  # small, so that the ranks get nearly equal numbers of bytes to checksum
OTHER_FILES = "holds other files"


def load_cached_base(name: str, options: BaseOptions, *, cache: str | None) -> PreTrainedModel:
    """Load a base as `load_base` does, from the folder `cache` if it holds this base; otherwise write it there too.

    `cache=None`: no cache. Raises UserError if the folder holds something else. Collective.
    """
    if cache is None:
        return load_with(name, options)
    folder = Path(cache)
    fingerprint = fingerprint_of(name, options.quantization, options.dtype)
    problem = cache_problem(folder, fingerprint)
    if problem is None:
        return _load_from(folder, name, options)
    if this_rank() == 0 and folder.exists():
        print(f"quantized cache {folder}: {problem}; it is written again", flush=True)
    if options.placement.stages > 1:  # a stage of a pipeline has no rows of each weight that it could write
        sharded = dataclasses.replace(options, placement=Placement(shard_ranks=num_ranks()))
        model = read_base(name, sharded)
        write_cache(model, name, folder, fingerprint, options.dtype)
        del model
        return _load_from(folder, name, options)
    model = read_base(name, options)
    write_cache(model, name, folder, fingerprint, options.dtype)
    hand_to_deepspeed(model, options)
    return model


def _load_from(folder: Path, name: str, options: BaseOptions) -> PreTrainedModel:
    model = load_with(str(folder), options)
    model.config.name_or_path = model.name_or_path = model_path(name)  # a saved adapter names this as its base
    return model


def fingerprint_of(name: str, quantization: str, dtype: torch.dtype) -> dict:
    """What a quantized base depends on: the checkpoint's files and how they are quantized."""
    files = [path.resolve() for path in weight_files(name)]  # in the hub's cache the name of a file is its checksum
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    return {
        "format": FORMAT,
        "bitsandbytes": version("bitsandbytes"),
        "quantization": quantization,
        "dtype": str(dtype),
        "files": stats,
    }


def cache_problem(folder: Path, fingerprint: dict) -> str | None:
    """Why the folder cannot be used as this cache; None if it can. Collective.

    Rank 0 compares the fingerprint; the ranks divide the checksums among them. Raises UserError if the folder holds
    files that are not a cache.
    """
    problem = None
    try:
        found = json.loads((folder / "fingerprint.json").read_text())
        problem = None if found == fingerprint else "it was made from other files, or with other settings"
    except (OSError, ValueError):
        problem = OTHER_FILES if folder.is_dir() and any(folder.iterdir()) else "there is none"
    problem = gather(problem)[0]
    if problem == OTHER_FILES:
        raise UserError(f"{folder}: holds files that are not a quantized base; give an empty folder or a new name")
    if problem is None and not all(gather(is_complete(folder, slice(this_rank(), None, num_ranks())))):
        problem = "it is incomplete or damaged"
    return problem


def write_cache(model: PreTrainedModel, name: str, folder: Path, fingerprint: dict, dtype: torch.dtype) -> None:
    """Write a loaded base and its tokenizer, for `load_base` and transformers to read. Collective.

    `model`: from `read_base`, before DeepSpeed gets it. Raises UserError if the folder cannot be written.
    """
    tokenizer = load_tokenizer(name)
    _start_folder(folder, fingerprint)
    tensors = stored_tensors(model, dtype)
    write_safetensors(folder, tensors, max_file_bytes=MAX_FILE_BYTES, is_main=this_rank() == 0, barrier=barrier)
    if this_rank() == 0:
        tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        write_whole(folder / "config.json", json.dumps(_stored_config(model, dtype), indent=2) + "\n")
    barrier()
    files = files_of(folder)[this_rank() :: num_ranks()]
    described = gather({str(path.relative_to(folder)): describe_file(path) for path in files})
    if this_rank() == 0:
        write_manifest(folder, {name: entry for part in described for name, entry in part.items()})
    barrier()


def _start_folder(folder: Path, fingerprint: dict) -> None:
    """Rank 0 empties the folder and writes the fingerprint. Raises UserError on all ranks if it cannot. Collective."""
    problem = None
    if this_rank() == 0:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_whole(folder / "fingerprint.json", json.dumps(fingerprint, indent=2) + "\n")
        except OSError as error:
            problem = error.strerror
    problem = gather(problem)[0]
    require(problem is None, "quantized_cache", folder, f"cannot be written: {problem}")
    why = "rank 0 has made this folder, but other ranks do not see it; give a folder on a disk that all ranks share"
    require(folder.is_dir(), "quantized_cache", folder, why)


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
