"""The quantized base on disk: written once by all ranks together, each its own rows, and read on any number of ranks.

The folder is a checkpoint as transformers and bitsandbytes write it, the same bytes whatever the number of ranks. It
holds `fingerprint.json`, written first: what it was made of; and the manifest, written last. Without both it is never
read.
"""

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
from lora_dist.model.load import hand_over, load_base, read_base
from lora_dist.model.quantization import packed_weights
from lora_dist.parallel.ranks import barrier, gather, num_ranks, this_rank
from lora_dist.parallel.strategies import Placement

FORMAT = 1
MAX_FILE_BYTES = 2**29  # small enough that the ranks' shares of checksums are even


def load_cached_base(
    name: str,
    *,
    cache: str | None,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    placement: Placement,
    **how,
) -> PreTrainedModel:
    """`load_base`, from `cache` where that was made of the same files in the same way; else made, and written there.

    Raises UserError where the folder holds something else. Collective.
    """
    how |= {"quantization": quantization, "dtype": dtype, "device": device, "placement": placement}
    if cache is None:
        return load_base(name, **how)
    cache = Path(cache)
    fingerprint = fingerprint_of(name, quantization, dtype)
    why_not = unusable_because(cache, fingerprint)
    if why_not is None:
        return _load_from(cache, name, how)
    if this_rank() == 0 and cache.exists():
        print(f"quantized cache {cache}: {why_not}; it is made anew", flush=True)
    if placement.stages > 1:  # the stages of a pipeline have no rows of each weight to write
        rows = read_base(name, **(how | {"placement": Placement(shard_ranks=num_ranks())}))
        write_cache(rows, name, cache, fingerprint, dtype)
        del rows
        return _load_from(cache, name, how)
    model = read_base(name, **how)
    write_cache(model, name, cache, fingerprint, dtype)
    hand_over(model, placement, device)
    return model


def _load_from(cache: Path, name: str, how: dict) -> PreTrainedModel:
    model = load_base(str(cache), **how)
    model.config.name_or_path = model.name_or_path = model_path(name)  # what the adapter is an adapter of
    return model


def fingerprint_of(name: str, quantization: str, dtype: torch.dtype) -> dict:
    """What a quantized base depends on: the checkpoint's files and how they are quantized."""
    files = [path.resolve() for path in weight_files(name)]  # in the hub's cache a file is named by its content
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    kernels = version("bitsandbytes")
    return {
        "format": FORMAT,
        "bitsandbytes": kernels,
        "quantization": quantization,
        "dtype": str(dtype),
        "files": stats,
    }


def unusable_because(cache: Path, fingerprint: dict) -> str | None:
    """Why a folder cannot be read, None if it can. Rank 0 looks; each rank checks its share of the checksums.

    Raises UserError where it holds files that are no cache. Collective.
    """
    why_not = None
    try:
        found = json.loads((cache / "fingerprint.json").read_text())
        why_not = None if found == fingerprint else "it was made of other files, or in another way"
    except (OSError, ValueError):
        why_not = "holds other files" if cache.is_dir() and any(cache.iterdir()) else "there is none"
    why_not = gather(why_not)[0]
    if why_not == "holds other files":
        raise UserError(f"{cache}: holds files that are no quantized base; give a folder of its own")
    if why_not is None and not all(gather(is_complete(cache, slice(this_rank(), None, num_ranks())))):
        why_not = "it is incomplete or damaged"
    return why_not


def write_cache(model: PreTrainedModel, name: str, cache: Path, fingerprint: dict, dtype: torch.dtype) -> None:
    """Write a loaded base, with its tokenizer, so that `load_base` and transformers can read it. Collective."""
    tokenizer, problem = load_tokenizer(name), None
    if this_rank() == 0:
        try:
            shutil.rmtree(cache, ignore_errors=True)
            cache.mkdir(parents=True)
            write_whole(cache / "fingerprint.json", json.dumps(fingerprint, indent=2) + "\n")
        except OSError as error:
            problem = error.strerror
    problem = gather(problem)[0]
    require(problem is None, "quantized_cache", cache, f"cannot be written: {problem}")
    require(cache.is_dir(), "quantized_cache", cache, "is not there on all ranks; give a disk that they share")
    tensors = stored_tensors(model, dtype)
    write_safetensors(cache, tensors, max_file_bytes=MAX_FILE_BYTES, is_main=this_rank() == 0, barrier=barrier)
    if this_rank() == 0:
        tokenizer.save_pretrained(cache)
        model.generation_config.save_pretrained(cache)
        config = model.config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
        config.pop("_name_or_path", None)  # a path of this machine
        config["quantization_config"] = bitsandbytes_config(model, dtype)
        write_whole(cache / "config.json", json.dumps(config, indent=2) + "\n")
    barrier()
    files = files_of(cache)[this_rank() :: num_ranks()]
    described = gather({str(path.relative_to(cache)): describe_file(path) for path in files})
    if this_rank() == 0:
        write_manifest(cache, {name: entry for part in described for name, entry in part.items()})
    barrier()


def stored_tensors(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, OwnRows]:
    """All tensors of the model as bitsandbytes stores them, and this rank's part of each. Collective."""
    tensors, packed_ids = {}, set()
    for module_name, module in model.named_modules():
        for weight_name, packed in packed_weights(module).items():
            parts = packed.parts(module)
            packed_ids |= set(map(id, parts))
            nested = None
            if len(parts) == 3:
                nested = parts[2].full_tensor() if isinstance(parts[2], DTensor) else parts[2]
                nested = nested.detach().view(torch.float32)
            tensors |= write_bitsandbytes(
                f"{module_name}.{weight_name}",
                packed,
                [own_rows(p) for p in parts[:2]],
                nested,
                dtype,
                this_rank() == 0,
            )
    plain = [(name, param) for name, param in model.named_parameters() if id(param) not in packed_ids]
    persistent = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in persistent]
    return tensors | {name: own_rows(tensor) for name, tensor in plain + buffers}


def own_rows(tensor: torch.Tensor) -> OwnRows:
    """The rows of a parameter that this rank writes: its shard, in the first of the copies; what is whole, rank 0."""
    shape, dtype = tuple(tensor.shape), tensor.dtype
    if not isinstance(tensor, DTensor):
        return OwnRows(shape, dtype, tensor if this_rank() == 0 else tensor.flatten()[:0])
    local = tensor.to_local()
    if this_rank() >= tensor.device_mesh.size():
        local = local[:0]
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return OwnRows(shape, dtype, local, offset[0] * torch.Size(shape[1:]).numel() if len(local) else 0)
