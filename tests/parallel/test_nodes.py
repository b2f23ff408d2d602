"""hsdp on two nodes, which are network namespaces joined by one cable. The bytes that cross it are counted."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from lora_dist.model.memory import base_bytes
from lora_dist.parallel.fsdp import decoder_layers
from tests.helpers.ranks import PATIENCE_S, ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("ip"), reason="needs root and iproute2"),
]
NUM_MICRO_BATCHES = 3

RANK = """
import json, os, sys
import torch, torch.distributed as dist
import tests.conftest
from tests.helpers.parity import load_sharded, loss_and_gradients, randomize
from lora_dist.model.adapters import add_adapters
from lora_dist.config import TrainConfig
from lora_dist.parallel.fsdp import gathered_bytes

rank, shard_ranks, cable = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method="tcp://10.213.7.1:29511", rank=rank, world_size=4)
assert dist.get_world_size() == 4

def crossed():
    dist.barrier()
    return sum(int(open(f"/sys/class/net/{cable}/statistics/{way}_bytes").read()) for way in ("rx", "tx"))

model = load_sharded("int8", shard_ranks=shard_ranks)
model = add_adapters(model, TrainConfig(model_name_or_path="embedded", max_steps=2))
randomize(model)
before = crossed()
for _ in range(NUM_MICRO_BATCHES):
    loss_and_gradients(model)
print(json.dumps({"crossed": crossed() - before, "gathered": gathered_bytes(model.get_base_model())}), flush=True)
dist.barrier()
os._exit(0)
""".replace("NUM_MICRO_BATCHES", str(NUM_MICRO_BATCHES))


def ip(*words):
    subprocess.run(["ip", *words], check=True)


@pytest.fixture
def nodes():
    """[(name of a namespace, name of its end of the cable)] for 10.213.7.1 and 10.213.7.2."""
    names = [f"node{end}-{os.getpid()}" for end in "ab"]
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", "cablea", "netns", names[0], "type", "veth", "peer", "name", "cableb", "netns", names[1])
        for number, (name, end) in enumerate(zip(names, ("cablea", "cableb"), strict=True), 1):
            ip("-n", name, "address", "add", f"10.213.7.{number}/24", "dev", end)
            for device in (end, "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield list(zip(names, ("cablea", "cableb"), strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], stderr=subprocess.DEVNULL)


def run_on(nodes, shard_ranks) -> list[dict]:
    processes = []
    for rank in range(4):
        name, cable = nodes[rank // 2]
        command = ["ip", "netns", "exec", name, sys.executable, "-c", RANK, str(rank), str(shard_ranks), cable]
        env = os.environ | {"GLOO_SOCKET_IFNAME": cable, "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True))
    deadline = time.monotonic() + PATIENCE_S
    outputs = [process.communicate(timeout=max(1, deadline - time.monotonic()))[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    return [json.loads(output) for output in outputs]


def test_the_base_never_crosses_nodes(nodes):
    from tests.helpers.parity import load_sharded

    model = load_sharded("int8")
    whole = base_bytes(model).total
    layers = sum(base_bytes(layer).total for layer in decoder_layers(model))
    gathered = NUM_MICRO_BATCHES * (whole + layers)
    hybrid, flat = run_on(nodes, 2), run_on(nodes, 4)
    assert all(rank["gathered"] == pytest.approx(gathered, rel=1e-3) for rank in hybrid + flat)  # 4 ranks: padding
    assert all(rank["crossed"] < 0.01 * gathered for rank in hybrid), hybrid  # barriers and keep-alives
    assert all(rank["crossed"] > gathered for rank in flat), flat  # each node gets half of it from the other one
