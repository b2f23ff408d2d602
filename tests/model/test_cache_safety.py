"""A quantized base on disk is whole or absent, whoever else writes it, and no file of others is lost for it."""

import json
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from lora_dist.embedded import BASE_DIR
from lora_dist.errors import UserError
from lora_dist.files import is_complete
from lora_dist.model.load import BaseOptions, load_with, meta_model, original_name
from lora_dist.model.quantized_cache import Cache, check_space, fingerprint_of, load_cached_base
from lora_dist.parallel.strategies import Placement
from tests.helpers.ranks import PATIENCE_S, ROOT, run_ranks

CPU = torch.device("cpu")
LOAD = """
import os, sys, torch
from lora_dist.model.load import BaseOptions
from lora_dist.model.quantized_cache import load_cached_base
from lora_dist.parallel.strategies import Placement
print("ready", flush=True)
sys.stdin.readline()
options = BaseOptions("int8", torch.float32, torch.device("cpu"), Placement())
model = load_cached_base("embedded", options, cache=sys.argv[1])
print("loaded", sum(p.double().sum().item() for p in model.parameters()), flush=True)
"""


def options(shard_ranks: int = 1) -> BaseOptions:
    return BaseOptions("int8", torch.float32, CPU, Placement(shard_ranks=shard_ranks))


def started(folder) -> subprocess.Popen:
    """A process that waits for a line before it loads the base with this cache."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", LOAD, str(folder)], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def test_three_starts_at_once_write_one_cache(tmp_path):
    processes = [started(tmp_path / "cache") for _ in range(3)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    ended = [process.communicate(timeout=PATIENCE_S) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], ended
    assert len({out for out, _ in ended}) == 1 and ended[0][0].startswith("loaded")
    assert is_complete(tmp_path / "cache") and not (tmp_path / "cache.partial").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.lock", "cache"]


def test_a_start_after_a_kill_while_writing_makes_it_anew(tmp_path):
    partial = tmp_path / "cache.partial"
    partial.mkdir()
    for name in ("fingerprint.json", "model.safetensors", "config.json.partial"):
        (partial / name).write_text("half")
    process = started(tmp_path / "other")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))
    assert is_complete(tmp_path / "cache") and not partial.exists()


def test_a_complete_cache_in_a_folder_that_cannot_be_written_is_read(tmp_path, monkeypatch):
    load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))
    monkeypatch.setattr(Cache, "lock", None)  # root writes everywhere, so a mode would prove nothing
    monkeypatch.setattr(Cache, "write", None)
    load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))


@pytest.mark.parametrize("users", ["fingerprint.json", "thesis.txt", "model.safetensors.old", "sub/config.json"])
def test_a_folder_with_files_of_others_is_refused_and_kept(tmp_path, users):
    (tmp_path / "sub").mkdir()
    for name in {"fingerprint.json", "thesis.txt", users} if users == "thesis.txt" else {users, "notes.md"}:
        (tmp_path / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}: holds files that are not a quantized base"):
        load_cached_base("embedded", options(), cache=str(tmp_path), setting="--output_dir")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_cache_of_ours_is_made_again_and_a_file_is_refused(tmp_path, capfd):
    for damage in ("[]", "null", "\x00", "[" * 10_000):
        for name in ("manifest.json", "fingerprint.json"):
            load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))
            (tmp_path / "cache" / name).write_text(damage)
            load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))
            assert "it is written again" in capfd.readouterr().out and is_complete(tmp_path / "cache")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="it is a file"):
        load_cached_base("embedded", options(), cache=str(tmp_path / "file"))


def _load_with_little_room(rank, folder, failing_rank):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if rank == failing_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # like a full disk, for one rank
    try:
        load_cached_base("embedded", options(2), cache=str(folder))
    except UserError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_rank_that_cannot_write_ends_all_ranks_with_one_line_and_leaves_nothing(tmp_path, failing_rank):
    for answer in run_ranks(_load_with_little_room, 2, tmp_path / "cache", failing_rank):
        assert answer and answer.startswith(f"--quantized_cache {tmp_path}/cache: cannot be written: File too large;")
    assert [path.name for path in tmp_path.iterdir()] == [".cache.lock"]


def test_a_disk_without_room_is_known_before(tmp_path, monkeypatch):
    model = meta_model("embedded", "int8", torch.float32)
    check_space(model, str(tmp_path / "a/b/cache"), "--quantized_cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 1000))
    with pytest.raises(UserError, match=r"--quantized_cache .*cache: the quantized base needs .*, and its disk has 0"):
        check_space(model, str(tmp_path / "a/b/cache"), "--quantized_cache")


def test_an_adapter_names_the_original_of_a_quantized_folder(tmp_path):
    load_cached_base("embedded", options(), cache=str(tmp_path / "q"), setting="--output_dir")
    assert original_name(str(tmp_path / "q")) == str(BASE_DIR)
    fingerprint = json.loads((tmp_path / "q/fingerprint.json").read_text())
    assert fingerprint == json.loads(json.dumps(fingerprint_of("embedded", "int8", torch.float32)))
    assert load_with(str(tmp_path / "q"), options()).config.name_or_path == str(BASE_DIR)
    assert original_name("facebook/opt-6.7b") == "facebook/opt-6.7b"
