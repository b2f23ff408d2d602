"""A quantized base on disk is whole or absent, whoever else writes it, and no file of others is lost for it."""

import dataclasses
import fcntl
import json
import multiprocessing
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedTokenizerBase

from lora_dist.embedded import BASE_DIR
from lora_dist.errors import UserError
from lora_dist.files import is_complete, lock_file
from lora_dist.model import quantized_cache
from lora_dist.model.load import BaseOptions, load_with, meta_model, original_name
from lora_dist.model.quantized_cache import check_cache, fingerprint_of, load_cached_base
from lora_dist.parallel.strategies import Placement
from tests.helpers.ranks import PATIENCE_S, ROOT, run_ranks

CPU = torch.device("cpu")
LOCK = ".cache.lora-dist-lock"
LOAD = """
import sys, time, torch
from lora_dist.model import quantized_cache
from lora_dist.model.load import BaseOptions
from lora_dist.model.quantized_cache import load_cached_base
from lora_dist.parallel.strategies import Placement
{before}
print("ready", flush=True)
sys.stdin.readline()
options = BaseOptions("int8", torch.float32, torch.device("cpu"), Placement())
model = load_cached_base("embedded", options, cache=sys.argv[1])
print("loaded", sum(p.double().sum().item() for p in model.parameters()), flush=True)
"""


def options(shard_ranks: int = 1) -> BaseOptions:
    return BaseOptions("int8", torch.float32, CPU, Placement(shard_ranks=shard_ranks))


def started(folder, before="") -> subprocess.Popen:
    """A process that waits for a line before it loads the base with this cache."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", LOAD.format(before=before), str(folder)], cwd=ROOT, **pipes)
    assert process.stdout.readline() == "ready\n"
    return process


def assert_whole_and_alone(parent):
    assert is_complete(parent / "cache")
    assert sorted(path.name for path in parent.iterdir()) == [LOCK, "cache"]


def _checksum_on_rank(rank, cache, num_ranks):
    params = load_cached_base("embedded", options(num_ranks), cache=str(cache)).parameters()
    whole = (param.full_tensor() if isinstance(param, DTensor) else param for param in params)
    return sum(param.double().sum().item() for param in whole)


def _start(cache, num_ranks, answers):
    try:
        answers.put(run_ranks(_checksum_on_rank, num_ranks, cache, num_ranks))
    except BaseException as error:
        answers.put([str(error)])


@pytest.mark.parametrize("num_starts, num_ranks", [(3, 1), (2, 2)])
def test_starts_at_once_write_one_cache(tmp_path, num_starts, num_ranks):
    context = multiprocessing.get_context("fork")
    for number in range(3):
        cache, answers = tmp_path / str(number) / "cache", context.Queue()
        starts = [context.Process(target=_start, args=(cache, num_ranks, answers)) for _ in range(num_starts)]
        for start in starts:
            start.start()
        sums = [value for _ in starts for value in answers.get(timeout=PATIENCE_S)]
        for start in starts:
            start.join()
        assert len(sums) == num_starts * num_ranks and len(set(sums)) == 1, sums
        assert_whole_and_alone(cache.parent)


def test_all_ranks_wait_for_another_start_and_one_of_them_says_so(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("lora_dist.files.QUIET_S", 0.2)
    with lock_file(tmp_path / LOCK) as take:
        assert take()
        release = threading.Timer(1.5, fcntl.flock, (_descriptor_of(tmp_path / LOCK), fcntl.LOCK_UN))
        release.start()
        run_ranks(_checksum_on_rank, 2, tmp_path / "cache", 2)
    assert capfd.readouterr().err.count("waiting for the process that uses this quantized base") == 1
    assert_whole_and_alone(tmp_path)


def _descriptor_of(path) -> int:
    """The descriptor under which this process has the file open."""
    (found,) = [int(fd.name) for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.readlink() == path]
    return found


def test_a_start_after_a_kill_while_writing_makes_it_anew(tmp_path):
    process = started(tmp_path / "cache", before="quantized_cache.write_manifest = lambda *a: time.sleep(600)")
    process.stdin.write("go\n")
    process.stdin.flush()
    new = tmp_path / ".cache.lora-dist-new"
    until = time.monotonic() + PATIENCE_S
    while not (new / "config.json").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (new / "model.safetensors").exists() and not (tmp_path / "cache").exists()
    load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))
    assert_whole_and_alone(tmp_path)


def test_a_kill_while_it_is_replaced_leaves_nothing_that_looks_whole(tmp_path):
    load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))
    (tmp_path / "cache").rename(tmp_path / ".cache.lora-dist-old")
    load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))
    assert_whole_and_alone(tmp_path)


def test_a_cache_of_another_precision_is_made_again(tmp_path, capfd):
    cache = str(tmp_path / "cache")
    load_cached_base("embedded", dataclasses.replace(options(), dtype=torch.bfloat16), cache=cache)
    model = load_cached_base("embedded", options(), cache=cache)
    assert "it was made with another dtype; it is written again" in capfd.readouterr().out
    (expected,), (found,) = ([p for n, p in m.named_parameters() if "embed_tokens" in n] for m in (fresh(), model))
    assert torch.equal(found, expected)


def fresh():
    return load_with("embedded", options())


@pytest.fixture
def read_only_disk(tmp_path):
    """A small disk; calling it makes it read-only, for root too."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield disk, lambda: subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.parametrize("has_lock", [True, False])
def test_a_complete_cache_on_a_read_only_disk_is_read_and_another_one_refused(tmp_path, read_only_disk, has_lock):
    disk, make_read_only = read_only_disk
    load_cached_base("embedded", options(), cache=str(disk / "cache"))
    if not has_lock:
        (disk / LOCK).unlink()
    make_read_only()
    check_cache(meta_model("embedded", "int8", torch.float32), str(disk / "cache"), "--quantized_cache")
    load_cached_base("embedded", options(), cache=str(disk / "cache"))
    with pytest.raises(
        UserError, match=f"^--quantized_cache {disk}/cache: cannot be written: no permission for {disk}, or a"
    ):
        load_cached_base("embedded", dataclasses.replace(options(), quantization="nf4"), cache=str(disk / "cache"))
    with pytest.raises(UserError, match=f"^--output_dir {disk}/new: cannot be written: no permission for {disk}, or a"):
        check_cache(meta_model("embedded", "int8", torch.float32), str(disk / "new"), "--output_dir")


def test_a_mount_point_is_refused_before_anything_is_written(read_only_disk):
    disk, _ = read_only_disk
    with pytest.raises(UserError, match="it is a mount point, .*; give a folder inside it"):
        check_cache(meta_model("embedded", "int8", torch.float32), str(disk), "--quantized_cache")


@pytest.mark.parametrize("users", ["fingerprint.json", "thesis.txt", "model.safetensors.old", "sub/config.json"])
def test_a_folder_with_files_of_others_is_refused_and_kept(tmp_path, users):
    (tmp_path / "sub").mkdir()
    for name in {"fingerprint.json", "thesis.txt", users} if users == "thesis.txt" else {users, "notes.md"}:
        (tmp_path / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=f"--output_dir {tmp_path}: holds files that are not a quantized base"):
        load_cached_base("embedded", options(), cache=str(tmp_path), setting="--output_dir")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_of_others_is_not_ours_for_a_file_named_as_ours(tmp_path):
    for name in ("q", "q.partial"):
        shutil.copytree(BASE_DIR, tmp_path / name)
        (tmp_path / name / "fingerprint.json").write_text("{}")
    for manifest in ("[]", "null", '{"../../x": {}}', '{"fingerprint.json": {}, "../x": {}}', '{"thesis.txt": {}}'):
        (tmp_path / "q/manifest.json").write_text(manifest)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(UserError, match=f"--quantized_cache {tmp_path}/q: holds files that are not"):
            load_cached_base("embedded", options(), cache=str(tmp_path / "q"))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "q").rename(tmp_path / "other")
    load_cached_base("embedded", options(), cache=str(tmp_path / "q"))
    assert (tmp_path / "q.partial/config.json").exists()  # its name is not one of our temporary ones


def test_a_file_that_was_added_to_a_cache_is_kept_though_we_might_write_one_of_its_name(tmp_path):
    load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))
    (tmp_path / "cache/vocab.json").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that are not a quantized base \('vocab.json'\)"):
        load_cached_base("embedded", dataclasses.replace(options(), quantization="nf4"), cache=str(tmp_path / "cache"))
    assert (tmp_path / "cache/vocab.json").read_text() == "mine"


def test_what_uncommon_tokenizers_write_is_ours_as_long_as_it_is_as_we_wrote_it(tmp_path, monkeypatch):
    save = PreTrainedTokenizerBase.save_pretrained

    def save_more(self, folder, **kwargs):
        (folder / "additional_chat_templates").mkdir()
        for name in ("source.spm", "odd[1].model", "additional_chat_templates/rag.jinja"):
            (folder / name).write_text(name)
        return save(self, folder, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save_more)
    for quantization in ("int8", "nf4", "nf4"):  # writes, replaces, reads
        again = dataclasses.replace(options(), quantization=quantization)
        load_cached_base("embedded", again, cache=str(tmp_path / "cache"))
        assert_whole_and_alone(tmp_path)
    (tmp_path / "cache/source.spm").write_text("edited")
    with pytest.raises(UserError, match="holds files that are not a quantized base .'source.spm'"):
        load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))
    assert (tmp_path / "cache/source.spm").read_text() == "edited"


def test_a_file_that_is_added_while_the_cache_is_replaced_is_kept(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    load_cached_base("embedded", options(), cache=str(cache))
    before = {path.name: path.read_bytes() for path in cache.iterdir()}
    write = quantized_cache.write_safetensors
    monkeypatch.setattr(
        quantized_cache, "write_safetensors", lambda *a, **k: (cache / "notes").touch() or write(*a, **k)
    )
    with pytest.raises(UserError, match="holds files that are not a quantized base .'notes'"):
        load_cached_base("embedded", dataclasses.replace(options(), quantization="nf4"), cache=str(cache))
    assert {path.name: path.read_bytes() for path in cache.iterdir()} == before | {"notes": b""}
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOCK, "cache"]


def test_a_reader_keeps_writers_out(tmp_path, monkeypatch):
    load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))

    def load(*args):
        with lock_file(tmp_path / LOCK) as take, lock_file(tmp_path / LOCK, shared=True) as take_shared:
            assert not take() and take_shared()
        return "loaded"

    monkeypatch.setattr(quantized_cache, "_load_from", load)
    assert load_cached_base("embedded", options(), cache=str(tmp_path / "cache")) == "loaded"


BAD_FOLDERS = {
    "/": "no folder's name",
    "a" * 300: "File name too long",
    "b" * 240: "no folder's name",
    "c/" * 2500: "File name too long",
    "line\nbreak": "no folder's name",
    "loop": "Symlink loop",
    "loop/x": "Symlink loop",
    "file": "it is a file",
    "file/x": "is a file",
    "/dev/null/x": "/dev/null is a file",
    "nul\0": "null",
    "/proc/x": "its disk has 0 KiB free",
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_what_can_be_no_folder_is_one_line(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    Path("file").touch()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=f"^--output_dir .*{BAD_FOLDERS[name]}.*; give a") as raised:
        check_cache(meta_model("embedded", "int8", torch.float32), name, "--output_dir")
        load_cached_base("embedded", options(), cache=name, setting="--output_dir")
    assert str(raised.value).isprintable() and sorted(tmp_path.iterdir()) == before


def test_a_link_to_a_folder_is_followed_and_kept(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere/cache")
    for _ in range(2):
        load_cached_base("embedded", options(), cache=str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink() and is_complete(tmp_path / "elsewhere/cache")


def test_whatever_a_tokenizer_raises_while_it_is_saved_is_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise Exception("No space left on device (os error 28)")  # tokenizers raises this type

    monkeypatch.setattr("transformers.PreTrainedTokenizerBase.save_pretrained", full)
    with pytest.raises(UserError, match="^--quantized_cache .*: cannot be written: No space left .* has .* free"):
        load_cached_base("embedded", options(), cache=str(tmp_path / "cache"))
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


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
    assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_disk_without_room_is_known_before(tmp_path, monkeypatch):
    model = meta_model("embedded", "int8", torch.float32)
    check_cache(model, str(tmp_path / "a/b/cache"), "--quantized_cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**20, 2**20, 1000))
    with pytest.raises(UserError, match=r"--quantized_cache .*cache: the quantized base needs .*, and its disk has 0"):
        check_cache(model, str(tmp_path / "a/b/cache"), "--quantized_cache")


def test_an_adapter_names_the_original_of_a_quantized_folder(tmp_path):
    load_cached_base("embedded", options(), cache=str(tmp_path / "q"), setting="--output_dir")
    assert original_name(str(tmp_path / "q")) == str(BASE_DIR)
    fingerprint = json.loads((tmp_path / "q/fingerprint.json").read_text())
    assert fingerprint == json.loads(json.dumps(fingerprint_of("embedded", "int8", torch.float32)))
    assert load_with(str(tmp_path / "q"), options()).config.name_or_path == str(BASE_DIR)
    assert original_name("facebook/opt-6.7b") == "facebook/opt-6.7b"
    for content in ("[]", '{"base": "mine"}', "x"):  # a file of this name that is not ours
        (tmp_path / "q/fingerprint.json").write_text(content)
        assert original_name(str(tmp_path / "q")) == str(tmp_path / "q")
