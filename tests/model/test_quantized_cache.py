"""Checkpoints that are quantized already, and the quantized cache: the same bits on any number of ranks."""

import dataclasses
import json
import os
import re
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lora_dist.embedded import BASE_DIR
from lora_dist.errors import UserError
from lora_dist.model.adapters import add_adapters
from lora_dist.model.load import BaseOptions
from lora_dist.model.quantization import FORMATS
from lora_dist.model.quantized_cache import Cache, fingerprint_of, load_cached_base
from lora_dist.parallel.strategies import Placement
from tests.helpers.families import make_checkpoint
from tests.helpers.parity import CPU, bitsandbytes_config, load_sharded, loss_and_gradients, randomize
from tests.helpers.ranks import run_ranks


def families_and_formats(*families):
    """(family, quantization): the first family with all formats, the others with int8 and nf4."""
    return [(family, q) for family in families for q in FORMATS if family == families[0] or q != "nf4_plain"]


def whole_parameters(model):
    return {n: p.full_tensor() if isinstance(p, DTensor) else p.detach() for n, p in model.named_parameters()}


def _load_on_rank(rank, quantization, path, config):
    model = load_sharded(quantization, path=path)
    if dist.get_world_size() > 1:
        assert all(isinstance(p, DTensor) for p in model.parameters())
    parameters = whole_parameters(model)
    model = add_adapters(model, config)
    randomize(model)
    return parameters, loss_and_gradients(model)[0]


def assert_equal(parameters, expected):
    assert parameters.keys() == expected.keys()
    assert [name for name, value in parameters.items() if not torch.equal(value, expected[name])] == []


@pytest.mark.parametrize("family, quantization", families_and_formats("opt", "gpt2", "llama", "gpt_neox", "mixtral"))
def test_what_bitsandbytes_saved_loads_sharded_to_the_bits_of_our_quantization(config, tmp_path, family, quantization):
    path = make_checkpoint(family, tmp_path)
    config = dataclasses.replace(config, lora_target_modules=["all-linear"])
    ((expected, loss),) = run_ranks(_load_on_rank, 1, quantization, path, config)
    saved = tmp_path / "saved"
    theirs = bitsandbytes_config(quantization, torch.float32)
    AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=theirs).save_pretrained(saved)
    for num_ranks in (1, 3):
        for parameters, rank_loss in run_ranks(_load_on_rank, num_ranks, quantization, saved, config):
            assert_equal(parameters, expected)
            assert torch.equal(rank_loss, loss)


def test_a_quantized_checkpoint_is_refused_for_another_format(tmp_path):
    config = json.loads((BASE_DIR / "config.json").read_text())
    config["quantization_config"] = bitsandbytes_config("nf4", torch.float32).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="--quantization int8: .* is quantized already, as nf4: give that"):
        load_sharded("int8", path=tmp_path)
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="quantized already, by gptq: give the unquantized model"):
        load_sharded("nf4", path=tmp_path)


def _load_cached_on_rank(rank, quantization, path, cache):
    options = BaseOptions(quantization, torch.float32, CPU, Placement(shard_ranks=dist.get_world_size()))
    model = load_cached_base(str(path), options, cache=str(cache))
    assert model.name_or_path == str(path)
    return whole_parameters(model)


def checkpoint_with_tokenizer(family, folder):
    path = make_checkpoint(family, folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE_DIR / file, path)
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    "family, quantization",
    families_and_formats("mixtral", "opt", "gpt2", "llama_tied")
    + [pytest.param(*case, marks=pytest.mark.slow) for case in families_and_formats("gpt_neox", "falcon")],
)
def test_the_cache_has_the_same_bytes_at_any_world_size_and_gives_the_same_bits(
    tmp_path, family, quantization, monkeypatch
):
    monkeypatch.setattr("lora_dist.model.quantized_cache.MAX_FILE_BYTES", 30_000)  # so that there are several files
    path = checkpoint_with_tokenizer(family, tmp_path)
    (expected,) = run_ranks(_load_cached_on_rank, 1, quantization, path, tmp_path / "cache1")
    written = contents(tmp_path / "cache1")
    assert sum(name.endswith(".safetensors") for name in written) > 1
    for num_ranks in (2, 3):
        cache = tmp_path / f"cache{num_ranks}"
        run_ranks(_load_cached_on_rank, num_ranks, quantization, path, cache)
        assert contents(cache) == written
        stamp = os.stat(cache / "manifest.json").st_mtime_ns
        for parameters in run_ranks(_load_cached_on_rank, num_ranks, quantization, path, cache):
            assert_equal(parameters, expected)
        assert os.stat(cache / "manifest.json").st_mtime_ns == stamp  # read, not written again


@pytest.mark.parametrize("family, quantization", families_and_formats("opt", "gpt2", "llama_tied", "gpt_neox"))
def test_plain_transformers_loads_the_cache_to_the_same_logits(tmp_path, family, quantization):
    path, cache = checkpoint_with_tokenizer(family, tmp_path), tmp_path / "cache"
    run_ranks(_load_cached_on_rank, 2, quantization, path, cache)
    theirs = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=bitsandbytes_config(quantization, torch.float32)
    )
    loaded, report = AutoModelForCausalLM.from_pretrained(cache, output_loading_info=True)
    assert not any(report.values()), report
    ids = torch.tensor([[5, 40, 41, 42]])
    logits = [model.train(False)(input_ids=ids, use_cache=False).logits for model in (loaded, theirs)]
    assert torch.equal(*logits) and logits[0].dtype == torch.float32


def _flip_a_byte(cache, path):
    file = cache / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1000] ^= 1
    file.write_bytes(raw)


def _touch_source(cache, path):
    os.utime(path / "model.safetensors", ns=(1, 1))


def _change_config(cache, path):
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))


SPOILERS = {
    "no manifest": (lambda cache, path: (cache / "manifest.json").unlink(), "incomplete"),
    "cut short": (lambda cache, path: os.truncate(cache / "model.safetensors", 5000), "incomplete"),
    "a flipped bit": (_flip_a_byte, "damaged"),
    "another config": (_change_config, "made with another config"),
    "another source": (_touch_source, "made with another files"),
}


def _why_on_rank(rank, cache, fingerprint):
    return Cache(cache, "--quantized_cache", fingerprint).problem()


@pytest.mark.parametrize("spoiler", SPOILERS)
def test_a_stale_or_partial_cache_is_written_again(tmp_path, spoiler, capfd):
    path, cache = checkpoint_with_tokenizer("opt", tmp_path), tmp_path / "cache"
    expected = run_ranks(_load_cached_on_rank, 2, "int8", path, cache)[0]
    spoil, why = SPOILERS[spoiler]
    spoil(cache, path)
    fingerprint = fingerprint_of(str(path), "int8", torch.float32)
    for answer in run_ranks(_why_on_rank, 2, cache, fingerprint):
        assert why in answer
    for parameters in run_ranks(_load_cached_on_rank, 2, "int8", path, cache):
        assert_equal(parameters, expected)
    assert capfd.readouterr().out.count("it is written again") == 1  # rank 0 prints it
    assert run_ranks(_why_on_rank, 2, cache, fingerprint) == [None, None]


def test_a_folder_with_other_files_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not a quantized base"):
        options = BaseOptions("int8", torch.float32, CPU, Placement())
        load_cached_base(str(BASE_DIR), options, cache=str(tmp_path))
    assert (tmp_path / "thesis.tex").read_text() == "mine"


def _cannot_write_on_rank(rank, path, cache):
    with pytest.raises(UserError) as error:
        _load_cached_on_rank(rank, "int8", path, cache)
    return str(error.value)


def test_a_cache_that_cannot_be_written_is_an_error_on_all_ranks(tmp_path):
    (tmp_path / "file").write_text("")
    errors = run_ranks(_cannot_write_on_rank, 2, BASE_DIR, tmp_path / "file" / "cache")
    assert len(errors) == 2
    assert all(re.search("--quantized_cache .*: cannot be written: .*/file is a file;", line) for line in errors), (
        errors
    )
