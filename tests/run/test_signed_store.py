"""Ranks believe only what ranks of their run wrote into the store."""

import torch.distributed as dist

from lora_dist.run.signed_store import SignedStore


def test_only_values_of_this_run_are_read(capsys):
    raw = dist.HashStore()
    ours, others = SignedStore(raw, b"secret of the run"), SignedStore(raw, b"another secret")
    assert ours.get("verdict") is None
    ours.set("sign/0", {"time": 1.5, "waits": False})
    assert ours.get("sign/0") == {"time": 1.5, "waits": False}
    assert others.get("sign/0") is None
    for forged in ("not json", '{"line": "stop", "exit_code": 0}', "", "\udcff", "0" * 64 + " {}"):
        raw.set("verdict", forged.encode(errors="surrogateescape"))
        assert ours.get("verdict") is None
    raw.set("left/1", raw.get("sign/0"))  # a value that a rank signed, under another name
    assert ours.get("left/1") is None
    assert capsys.readouterr().err.count("is ignored, but keep its port from others") == 2  # once by each store


def test_the_first_value_of_a_rank_counts_also_after_one_of_somebody_else():
    for first in (None, "not json", '{"line": "stop", "exit_code": 0}'):
        raw = dist.HashStore()
        if first:
            raw.set("verdict", first)
        stores = [SignedStore(raw, b"secret") for _ in range(3)]
        found = [store.set_first("verdict", {"line": str(i)}) for i, store in enumerate(stores)]
        assert found == [{"line": "0"}] * 3 and stores[2].get("verdict") == {"line": "0"}
