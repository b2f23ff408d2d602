"""FSDP2: several copies, offload to the host, one gather per step, and the order of the gathers."""

import dataclasses
import gc

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from lora_dist.model.adapters import add_adapters
from lora_dist.model.memory import base_bytes
from lora_dist.model.quantization import FrozenLinear
from lora_dist.parallel.fsdp import decoder_layers, gathered_bytes, release, sharded_modules
from tests.helpers.families import make_checkpoint
from tests.helpers.parity import load_sharded, loss_and_gradients, randomize
from tests.helpers.ranks import run_ranks

MICRO_BATCHES = 3


def adapted(config, model):
    model = add_adapters(model, dataclasses.replace(config, lora_target_modules=["q_proj", "fc2"]))
    randomize(model)
    return model


def steps(model):
    return [loss_and_gradients(model) for _ in range(MICRO_BATCHES)]


def assert_same(outcomes, expected):
    for (loss, gradients), (expected_loss, expected_gradients) in zip(outcomes, expected, strict=True):
        assert torch.equal(loss, expected_loss)
        assert gradients.keys() == expected_gradients.keys()
        assert all(torch.equal(gradients[name], value) for name, value in expected_gradients.items())


@pytest.fixture
def alone(config):
    """(bytes of the whole base, bytes of its layers, what one process computes)."""
    model = load_sharded("int8")
    layers = sum(base_bytes(layer).total for layer in decoder_layers(model))
    whole = base_bytes(model).total
    return whole, layers, steps(adapted(config, model))


def _hybrid_on_rank(rank, config):
    assert dist.get_world_size() == 4
    model = load_sharded("int8", shard_ranks=2)
    meshes = {tuple(p.device_mesh.mesh.tolist()) for p in model.parameters() if isinstance(p, DTensor)}
    held = base_bytes(model).held
    model = adapted(config, model)
    return meshes, held, steps(model), gathered_bytes(model)


def test_two_copies_over_two_ranks_each(config, alone):
    whole, layers, expected = alone
    for rank, (meshes, held, outcomes, gathered) in enumerate(run_ranks(_hybrid_on_rank, 4, config)):
        assert meshes == {(0, 1) if rank < 2 else (2, 3)}  # neighbours, so that a copy is inside a node
        assert held == whole / 2
        assert gathered == MICRO_BATCHES * (whole + layers)  # among two ranks, not four
        assert_same(outcomes, expected)


def _offload_on_rank(rank, config):
    model = load_sharded("int8", offload=True)
    assert all(
        state._fsdp_param_group.offload_policy.pin_memory is False for state in map(_state, sharded_modules(model))
    )
    before = {name: p.to_local().clone() for name, p in model.named_parameters()}
    locals_before = {name: p.to_local().data_ptr() for name, p in model.named_parameters()}
    model = adapted(config, model)
    outcomes = steps(model)
    release(model)
    base = model.get_base_model()
    after = {n.replace(".base_layer", ""): p for n, p in base.named_parameters() if "lora_" not in n}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].to_local(), value) for name, value in before.items())
    assert all(after[name].to_local().data_ptr() == address for name, address in locals_before.items())
    return outcomes


def _state(module):
    return module._get_fsdp_state()


def test_offloaded_to_the_host_it_computes_the_same_and_nothing_is_written_back(config, alone):
    """On a CPU the host is the device, so this shows only that the code computes the same. Pinned memory: not run."""
    for outcomes in run_ranks(_offload_on_rank, 2, config):
        assert_same(outcomes, alone[2])


def _gather_once_on_rank(rank, config):
    model = load_sharded("int8", gather_once=True)
    counter = model.all_gather
    model = adapted(config, model)
    outcomes = steps(model)
    whole_layers = sum(
        not any(isinstance(p, DTensor) for p in m.parameters(recurse=False))
        for m in model.modules() if isinstance(m, FrozenLinear)
    )  # fmt: skip
    release(model)
    assert all(isinstance(p, DTensor) for p in model.get_base_model().parameters() if not p.requires_grad)
    return outcomes, counter.num_calls, counter.num_bytes, whole_layers, base_bytes(model).held


def test_gather_once_gathers_each_group_once_until_it_is_released(config, alone):
    whole, layers, expected = alone
    for outcomes, calls, num_bytes, whole_layers, held in run_ranks(_gather_once_on_rank, 2, config):
        assert (calls, num_bytes) == (4 + 1, whole)  # instead of MICRO_BATCHES * (2 * 4 + 1) and more bytes
        assert whole_layers == 24  # before the release all linears are whole
        assert held == whole / 2  # and after it none is
        assert_same(outcomes, expected)


def _order_on_rank(rank, config):
    model = adapted(config, load_sharded("int8"))
    events = []
    counter = model.get_base_model().all_gather
    call = type(counter).__call__

    class Recording(type(counter)):
        def __call__(self, **kwargs):
            events.append("gather")
            return call(self, **kwargs)

    counter.__class__ = Recording
    for number, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, number=number: events.append(("forward", number)))
        layer.fc2.register_full_backward_pre_hook(lambda *_, number=number: events.append(("backward", number)))
    loss_and_gradients(model)
    return events


def test_the_next_layer_is_gathered_before_this_one_computes(config):
    """On a GPU this lets the gather run during the computation. On a CPU only the order can be tested."""
    for events in run_ranks(_order_on_rank, 2, config):
        forward = events[: events.index(("forward", 3)) + 1]
        gathers_before = [forward[: forward.index(("forward", n))].count("gather") for n in range(4)]
        assert gathers_before == [3, 4, 5, 5]  # root, its layer and the next one; the last has no next
        backward = events[len(forward) :]
        gathers_before = [backward[: backward.index(("backward", n))].count("gather") for n in (3, 2, 1, 0)]
        assert gathers_before == [2, 3, 4, 4]


def bytes_alive() -> int:
    gc.collect()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and type(t) is not DTensor]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def _fifty_steps_on_rank(rank, config, path):
    """(highest number of live bytes in a step, live bytes after it), for the second and the fiftieth step."""
    model, seen, done = adapted(config, load_sharded("int8", path=path)), {}, []

    def look(*_):
        if (step := len(done) + 1) in (2, 50):
            seen.setdefault(step, []).append(bytes_alive())

    model.get_base_model().lm_head.register_forward_hook(look)
    for layer in decoder_layers(model):
        layer.register_forward_hook(look)
        layer.fc2.register_full_backward_pre_hook(look)
    while len(done) < 50:
        loss_and_gradients(model)
        look()
        done.append(True)
    assert len(seen[50]) == 2 + 1 + 2 + 1  # forward, head, backward, after
    return [(max(seen[step]), seen[step][-1]) for step in (2, 50)]


@pytest.mark.slow
def test_neither_the_peak_of_a_step_nor_what_it_leaves_grows_over_fifty(config, tmp_path):
    path = make_checkpoint("opt", tmp_path)
    for second, fiftieth in run_ranks(_fifty_steps_on_rank, 2, config, path):
        assert fiftieth == second
