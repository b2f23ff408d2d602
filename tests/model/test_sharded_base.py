"""The base sharded over 2 and 3 gloo ranks has the bits of bitsandbytes + PEFT on one process."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.tensor import DTensor

from lora_dist.data.formats import load_tokenizer
from lora_dist.model.adapters import add_adapters, save_adapter, verify_adapter
from lora_dist.model.memory import base_bytes
from lora_dist.model.quantization import FORMATS, FrozenLinear, as_floats, quantized_weights
from lora_dist.parallel.fsdp import decoder_layers, gathered_bytes, release, sharded_modules
from tests.helpers.families import make_checkpoint
from tests.helpers.parity import batch_of, load_sharded, load_unsharded, loss_and_gradients, randomize
from tests.helpers.ranks import run_ranks

QUANTIZATIONS = [*FORMATS, "none"]


def _step_on_rank(rank, config, quantization, dtype):
    model = load_sharded(quantization, dtype)
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    assert len(sharded) == len(list(model.parameters()))  # every parameter is sharded
    norms = {name: p.dtype for name, p in model.named_parameters() if "norm" in name}
    assert len(norms) == 4 * 4 + 2 and set(norms.values()) == {torch.float32}
    assert model.get_input_embeddings().weight.dtype == dtype
    model = add_adapters(model, config)
    randomize(model)
    return loss_and_gradients(model)


@pytest.mark.parametrize(
    "dtype, num_ranks",
    [(torch.float32, 2), (torch.float32, 3), (torch.bfloat16, 2), (torch.bfloat16, 3), (torch.float16, 2)],
    ids=str,
)
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_loss_and_adapter_gradients_equal_bitsandbytes_and_peft(config, quantization, dtype, num_ranks):
    config = dataclasses.replace(config, lora_target_modules=["q_proj", "v_proj", "fc1"])
    reference = add_adapters(load_unsharded(quantization, dtype), config)
    randomize(reference)
    loss, gradients = loss_and_gradients(reference)
    assert loss > 0 and len(gradients) == 24 and all(g.any() for g in gradients.values())
    for rank_loss, rank_gradients in run_ranks(_step_on_rank, num_ranks, config, quantization, dtype):
        assert torch.equal(rank_loss, loss)
        assert rank_gradients.keys() == gradients.keys()
        assert [n for n, g in rank_gradients.items() if not torch.equal(g, gradients[n])] == []


def _gathered_parts_on_rank(rank, quantization, path):
    model = load_sharded(quantization, path=path)
    frozen = {name: module for name, module in model.named_modules() if isinstance(module, FrozenLinear)}
    parts = {name: quantized_weights(module)["weight"].parts(module) for name, module in frozen.items()}
    own_rows = [len(p.to_local()) if isinstance(p, DTensor) else len(p) for p, *_ in parts.values()]
    return {name: [as_floats(whole(part)) for part in named] for name, named in parts.items()}, own_rows


def whole(part):
    assert isinstance(part, DTensor) == (dist.get_world_size() > 1)
    return part.full_tensor() if isinstance(part, DTensor) else part


def bitsandbytes_parts(quantization, weight):
    if quantization == "int8":
        return [weight.CB, weight.SCB]
    state = weight.quant_state
    rows = state.shape[0]
    parts = [weight.data.view(rows, -1), state.absmax.view(rows, -1)]
    return [*parts, torch.cat([state.offset.view(1), state.state2.absmax])] if quantization == "nf4" else parts


@pytest.mark.parametrize("num_ranks, uneven", [(1, False), (2, False), (3, True), (4, False), (5, True)])
@pytest.mark.parametrize("quantization", FORMATS)
def test_gathered_codes_and_scales_equal_bitsandbytes(quantization, num_ranks, uneven, tmp_path):
    """The weights of this Llama have 64, 32 or 192 rows: with 3 and 5 ranks, some hold fewer rows than others."""
    path = make_checkpoint("llama", tmp_path)
    expected = {
        name: bitsandbytes_parts(quantization, module.weight)
        for name, module in load_unsharded(quantization, torch.float32, path).named_modules()
        if hasattr(module, "weight") and type(module.weight).__name__ in ("Int8Params", "Params4bit")
    }
    assert len(expected) == 14  # 2 layers of q, k, v, o, gate, up, down
    ranks = run_ranks(_gathered_parts_on_rank, num_ranks, quantization, path)
    assert (ranks[0][1] != ranks[-1][1]) == uneven
    for parts, _ in ranks:
        assert parts.keys() == expected.keys()
        for name, own in parts.items():
            assert [torch.equal(a, b) for a, b in zip(own, expected[name], strict=True)] == [True] * len(own), name


def _probe_logits(model):
    """In training mode, because bitsandbytes computes in another way in eval mode on a CPU; with every dropout at 0."""
    model.train()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    with torch.no_grad():
        return model(input_ids=torch.tensor([[2, 40, 41, 42, 43]]), use_cache=False).logits


def _save_on_rank(rank, config, quantization, folder):
    model = load_sharded(quantization)
    model = add_adapters(model, config)
    randomize(model)
    if rank == 0:
        save_adapter(model, load_tokenizer("embedded"), folder)
    dist.barrier()
    verify_adapter(model, folder, batch_of([[2, 5, 6, 7]]))  # on a sharded base
    return _probe_logits(model)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_plain_peft_on_a_plain_base_computes_the_same_logits(config, quantization, tmp_path):
    config, folder = dataclasses.replace(config, lora_dropout=0.0), tmp_path / "adapter"
    logits = run_ranks(_save_on_rank, 2, config, quantization, folder)
    plain = load_unsharded(quantization, torch.float32)
    before = _probe_logits(plain)
    plain = PeftModel.from_pretrained(plain, folder)
    after = _probe_logits(plain)
    assert not torch.equal(after, before)  # the adapter has an effect
    assert torch.equal(logits[0], after) and torch.equal(logits[1], after)


def gathered_layers(model) -> int:
    """Number of decoder layers with a parameter that is whole on this rank, in FSDP's buffers or in the module."""
    count = 0
    for layer in decoder_layers(model):
        params = layer._get_fsdp_state()._fsdp_param_group.fsdp_params
        buffers = [p._unsharded_param for p in params if hasattr(p, "_unsharded_param")]
        alive = any(b.untyped_storage().size() for b in buffers)
        count += alive or any(not isinstance(getattr(m, "weight", None), DTensor) for m in frozen_of(layer))
    return count


def frozen_of(module):
    return [m for m in module.modules() if isinstance(m, FrozenLinear)]


def _bytes_on_rank(rank, config, quantization):
    model = load_sharded(quantization)
    loaded = base_bytes(model)
    assert gathered_layers(model) == 0
    model = add_adapters(model, config)
    seen = []
    for layer in decoder_layers(model):
        layer.register_forward_hook(lambda *_: seen.append(("forward", gathered_layers(model))))
        layer.fc2.register_full_backward_pre_hook(lambda *_: seen.append(("backward", gathered_layers(model))))
    loss_and_gradients(model)
    seen_in_step, after_step = list(seen), gathered_layers(model)
    gathered = gathered_bytes(model)
    with torch.no_grad():
        model(input_ids=torch.tensor([[5, 6, 7]]))
    release(model)
    held = base_bytes(model)
    return dataclasses.astuple(loaded), dataclasses.astuple(held), seen_in_step, after_step, gathered


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_each_rank_holds_half_and_no_gathered_layer_outlives_its_use(config, quantization):
    alone = load_sharded(quantization)
    whole = base_bytes(alone)
    assert whole.held == whole.total and not sharded_modules(alone)
    for loaded, held, seen, after_step, gathered in run_ranks(_bytes_on_rank, 2, config, quantization):
        total, per_rank, quantized_total, quantized_held = loaded
        assert (total, quantized_total) == (whole.total, whole.quantized_total)
        # `nested` of NF4 has an odd number of entries: one int32 of padding per linear
        padding = {"int8": 0, "nf4": 24 * 4}[quantization]
        assert quantized_total / 2 <= quantized_held <= quantized_total / 2 + padding
        assert per_rank <= total / 2 + padding
        assert held == loaded  # after a step and an evaluation
        # While a layer computes, at most it and the one that is gathered next are whole. After the step none is.
        assert [phase for phase, _ in seen] == ["forward"] * 4 + ["backward"] * 4
        assert max(count for phase, count in seen if phase == "forward") <= 1
        assert max(count for phase, count in seen if phase == "backward") <= 2
        assert after_step == 0
        # Each layer is gathered twice and the rest once. Nothing else moves: the formula holds to the byte.
        layers = sum(base_bytes(layer).held for layer in decoder_layers(alone))
        assert gathered == pytest.approx(2 * layers + (whole.total - layers), abs=4 * 2 * 2 * padding)


def _gathered_on_rank(rank, config, resident_layers):
    model = load_sharded("int8", resident_layers=resident_layers)
    assert len(sharded_modules(model)) == 4 - resident_layers + 1
    base = base_bytes(model)
    model = add_adapters(model, config)
    randomize(model)
    steps = [loss_and_gradients(model) for _ in range(3)]  # three micro-batches
    assert base_bytes(model) == base
    return base.held, gathered_bytes(model), steps


@pytest.mark.parametrize("resident_layers", [0, 1, 3])
def test_resident_layers_are_held_whole_and_never_gathered(config, resident_layers):
    alone = load_sharded("int8")
    layer_bytes = [base_bytes(layer).total for layer in decoder_layers(alone)]
    whole, layers = base_bytes(alone).total, sum(layer_bytes)
    sharded = sum(layer_bytes[: 4 - resident_layers])
    alone = add_adapters(alone, config)
    randomize(alone)
    loss, gradients = loss_and_gradients(alone)
    for held, gathered, steps in run_ranks(_gathered_on_rank, 2, config, resident_layers):
        assert held == (whole - layers + sharded) / 2 + (layers - sharded)
        assert gathered == 3 * (whole - layers + 2 * sharded)  # micro-batches x (the rest + 2 x the sharded layers)
        for step_loss, step_gradients in steps:
            assert torch.equal(step_loss, loss)
            assert all(torch.equal(step_gradients[name], value) for name, value in gradients.items())
