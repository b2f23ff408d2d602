"""Each rank reads its part of the weights and no more. The bytes are those that the kernel counts."""

import gc
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from lora_dist.errors import UserError
from lora_dist.model import loader_hooks
from lora_dist.model.files.lazy_weights import open_weights
from lora_dist.model.load import BaseOptions
from lora_dist.model.memory import base_bytes
from lora_dist.model.quantized_cache import load_cached_base
from lora_dist.parallel.fsdp import decoder_layers
from lora_dist.parallel.strategies import Placement
from tests.helpers.families import make_checkpoint
from tests.helpers.parity import CPU, load_placed, load_sharded, zero
from tests.helpers.ranks import run_ranks

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=64,
)  # fmt: skip
SLACK = 400_000  # bytes, for Python's own files, the headers and config.json


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """27 MB in fp16, once in several safetensors files and once as .bin; and the bytes of its weights."""
    folder = tmp_path_factory.mktemp("reading")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).half()
    model.save_pretrained(folder / "safetensors", max_shard_size="8MB")
    (folder / "bin").mkdir()
    shutil.copy(folder / "safetensors" / "config.json", folder / "bin")
    torch.save(model.state_dict(), folder / "bin" / "pytorch_model.bin")
    for source in (folder / "safetensors", folder / "bin"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path("lora_dist/embedded/opt") / file, source)
    return folder, sum(p.numel() * 2 for p in model.parameters())


def read_so_far() -> int:
    """Bytes that this process has read so far with read and pread."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


def _reading_on_rank(rank, path, quantization):
    load_sharded(quantization)  # imports modules, so that they are not counted below
    before = read_so_far()
    load_sharded(quantization, torch.float16, path)
    return read_so_far() - before


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("kind, quantization", [("safetensors", "int8"), ("safetensors", "nf4"), ("bin", "int8")])
def test_each_rank_reads_its_part(checkpoint, kind, quantization, num_ranks):
    folder, total = checkpoint
    for read in run_ranks(_reading_on_rank, num_ranks, folder / kind, quantization):
        assert total / num_ranks <= read <= total / num_ranks + SLACK


def _load_on_rank(rank, placement, path):
    """(bytes read, bytes of the base, bytes of it outside of the layers)."""
    load_placed(placement, "int8", torch.float32)
    before = read_so_far()
    model = load_placed(placement, "int8", torch.float16, path)
    read, base = read_so_far() - before, base_bytes(model)
    outside = base.total - sum(base_bytes(layer).total for layer in decoder_layers(model))
    return read, base, outside


def test_zero3_reads_its_rows_and_the_pipeline_its_layers(checkpoint):
    folder, total = checkpoint
    for read, base, _ in run_ranks(_load_on_rank, 2, Placement(2, deepspeed=zero(3)), folder / "safetensors"):
        assert total / 2 <= read <= total / 2 + SLACK
        assert base.held < 0.52 * base.total
    for num_stages, held in ((2, 2 / 4), (4, 1 / 4), (3, None)):
        ranks = run_ranks(_load_on_rank, num_stages, Placement(stages=num_stages), folder / "safetensors")
        for read, base, outside in ranks:
            layers = base.held - outside
            assert held is None or layers == pytest.approx((base.total - outside) * held, rel=1e-3)
            assert read < 2 * (layers + outside) + SLACK  # in the file they are fp16
        assert sum(base.held - outside for _, base, outside in ranks) == pytest.approx(
            ranks[0][1].total - ranks[0][2], rel=1e-3
        )


def _cache_on_rank(rank, path, cache, quantization):
    load_sharded(quantization)
    before = read_so_far()
    options = BaseOptions(quantization, torch.float16, CPU, Placement(shard_ranks=dist.get_world_size()))
    load_cached_base(str(path), options, cache=str(cache))
    return read_so_far() - before


@pytest.mark.parametrize("quantization, share", [("int8", 0.5), ("nf4", 0.27)])
def test_the_next_start_reads_the_quantized_bytes(checkpoint, tmp_path, quantization, share):
    """Half or a quarter of the layers' bytes. For the checksums, the ranks together read the cache once more."""
    folder, total = checkpoint
    run_ranks(_cache_on_rank, 2, folder / "safetensors", tmp_path / "cache", quantization)
    embeddings = 2 * 512 * 512 * 2
    whole = (total - embeddings) * share + embeddings
    read = run_ranks(_cache_on_rank, 2, folder / "safetensors", tmp_path / "cache", quantization)
    assert 0.97 * whole / 2 <= min(read) <= 1.03 * whole / 2 + SLACK  # there is one file, and the other rank checks it
    assert 0.97 * 2 * whole <= sum(read) <= 1.03 * 2 * whole + 2 * SLACK


def test_a_bin_gives_the_bits_that_safetensors_give(checkpoint):
    folder, _ = checkpoint
    first, second = (
        dict(load_sharded("int8", path=folder / kind).named_parameters()) for kind in ("safetensors", "bin")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _storages_on_rank(rank, path):
    """(highest number of bytes in live tensors while the base loads, bytes held at the end)."""
    highest, convert = 0, loader_hooks.QuantizeRows.convert

    def watched(self, *args, **kwargs):
        nonlocal highest
        converted = convert(self, *args, **kwargs)
        gc.collect()
        tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter) and t.device == CPU]
        alive = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        highest = max(highest, sum(alive.values()))
        return converted

    loader_hooks.QuantizeRows.convert = watched
    model = load_sharded("int8", torch.float16, path)
    return highest, base_bytes(model).held


@pytest.mark.slow
def test_loading_holds_no_more_than_the_shard_and_a_layers_worth(checkpoint):
    folder, _ = checkpoint
    layer = 2 * (512 * 512 * 2 + 512 * 256 * 2 + 3 * 512 * 1536)  # fp16
    for highest, held in run_ranks(_storages_on_rank, 2, folder / "safetensors"):
        assert highest <= held + layer


def test_open_weights_reads_what_safetensors_reads(checkpoint):
    folder, _ = checkpoint
    files = sorted((folder / "safetensors").glob("*.safetensors"))
    lazy = open_weights(files)
    for file in files:
        for name, tensor in load_file(file).items():
            assert lazy[name].get_shape() == list(tensor.shape)
            assert torch.equal(lazy[name][...], tensor)
            assert torch.equal(lazy[name][3:9], tensor[3:9])
            if tensor.dim() == 2:
                assert torch.equal(lazy[name][3:9, 1:5], tensor[3:9, 1:5])
                assert torch.equal(lazy[name].transposed()[3:9], tensor.t()[3:9])


def test_a_file_cut_short_is_refused(checkpoint, tmp_path):
    path = make_checkpoint("llama", tmp_path)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="model.safetensors: the file is truncated or damaged"):
        load_sharded("int8", path=path)
    torch.save({"a": torch.ones(3)}, path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pytorch_model.bin: its tensors are not stored row by row.*; .* save"):
        load_sharded("int8", path=path)
    (path / "pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="--model_name_or_path .*: no file named model.safetensors"):
        load_sharded("int8", path=path)
