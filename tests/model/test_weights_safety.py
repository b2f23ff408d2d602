"""Damaged checkpoint files are refused with one line before any of their tensors is read."""

import json
import shutil
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_dist.errors import UserError
from lora_dist.model.files.lazy_weights import open_checkpoint, open_weights, read_safetensors_header, weight_files

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float16), "c": torch.zeros(0, 5)}


def rewrite_header(file: Path, change) -> None:
    """Replace the header by what `change(header)` returns: bytes, or an object to be written as JSON."""
    content = file.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header = change(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


def changed(name: str, **entry):
    """A change that overwrites keys of a tensor's entry."""
    return lambda header: header[name].update(entry)


def without(name: str, key: str):
    return lambda header: header[name].pop(key) and None


HEADERS = {
    "a list": lambda header: b"[]",
    "a number": lambda header: b"3",
    "not JSON": lambda header: b"{",
    "not UTF-8": lambda header: b'{"\xff": 1}',
    "deep": lambda header: b"[" * 200_000 + b"]" * 200_000,
    "an entry that is a list": lambda header: {**header, "a": [1]},
    "no offsets": without("a", "data_offsets"),
    "no shape": without("a", "shape"),
    "no dtype": without("a", "dtype"),
    "three offsets": changed("a", data_offsets=[0, 12, 24]),
    "unknown dtype": changed("a", dtype="F7"),
    "a dtype that is a list": changed("a", dtype=["F32"]),
    "another dtype of the same size": changed("a", dtype="F16"),
    "another shape": changed("a", shape=[2, 2]),
    "a negative shape": changed("a", shape=[-2, -3]),
    "a float in the shape": changed("a", shape=[2.0, 3]),
    "true in the shape": changed("a", shape=[True, 6]),
    "text as shape": changed("a", shape="23"),
    "a huge shape": changed("a", shape=[2**62, 2**62]),
    "fewer bytes": changed("a", data_offsets=[0, 16]),
    "an overlap": changed("b", data_offsets=[0, 8]),
    "negative offsets": changed("a", data_offsets=[-24, 0]),
    "offsets behind the end": changed("b", data_offsets=[24_000, 24_008]),
    "a hole": lambda header: header.pop("a") and None,
    "unused bytes at the end": lambda header: header.pop("b") and None,
    "a name twice": lambda header: json.dumps(header).encode().replace(b'"b":', b'"a":'),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_a_damaged_header_is_refused(tmp_path, fault):
    file = tmp_path / "model.safetensors"
    save_file({"b": TENSORS["b"], "a": TENSORS["a"], "c": TENSORS["c"]}, file)
    rewrite_header(file, lambda header: None)
    assert open_weights([file])["a"][...].tolist() == TENSORS["a"].tolist()
    rewrite_header(file, HEADERS[fault])
    with pytest.raises(UserError, match="^--model_name_or_path .*model.safetensors: .*download it again") as raised:
        open_checkpoint(str(tmp_path))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 700


@pytest.mark.parametrize(
    "content", [b"", b"1234567", b"\xff" * 64, struct.pack("<Q", 2**40) + b"{}", b"<html>no</html>"]
)
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="^--model_name_or_path .*model.safetensors: "):
        open_checkpoint(str(tmp_path))


def test_the_embedded_base_and_metadata_pass():
    (file,) = weight_files("embedded")
    entries, start = read_safetensors_header(file)
    assert entries.keys() == load_file(file).keys() and start % 8 == 0


@pytest.fixture
def sharded(tmp_path):
    """A folder with two files and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("a", "b"):
        save_file({name: TENSORS[name]}, folder / f"{name}.safetensors")
    write_index(folder, {"a": "a.safetensors", "b": "b.safetensors"})
    return folder


def write_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "weight_map, why",
    [
        ([], "its weight_map must"),
        ({}, "its weight_map must"),
        ({"a": 3}, "its weight_map must"),
        ({"a": "../outside.safetensors"}, "outside of its folder"),
        ({"a": "/etc/passwd"}, "outside of its folder"),
        ({"a": "sub/a.safetensors"}, "outside of its folder"),
        ({"a": ".."}, "outside of its folder"),
        ({"a": ""}, "names .., which is not there"),
        ({"a": "link.safetensors"}, "outside of its folder"),
        ({"a": "none.safetensors"}, "none.safetensors., which is not there"),
        ({"a": "b.safetensors", "b": "b.safetensors"}, "b.safetensors holds no a"),
        ({"a": "a.safetensors", "b": "twice.safetensors"}, "a is in another file too"),
    ],
)
def test_an_index_names_files_of_its_own_folder(sharded, weight_map, why):
    assert open_checkpoint(str(sharded)).keys() == {"a", "b"}
    save_file({"a": TENSORS["a"]}, sharded.parent / "outside.safetensors")
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, sharded / "twice.safetensors")
    (sharded / "link.safetensors").symlink_to(sharded.parent / "outside.safetensors")
    write_index(sharded, weight_map)
    with pytest.raises(UserError, match=f"^--model_name_or_path .*: .*{why}"):
        open_checkpoint(str(sharded))


@pytest.mark.parametrize("content", ["garbage", "[]", "{}", "3", "[" * 100_000, '{"weight_map": null}'])
def test_a_damaged_index_is_refused(sharded, content):
    (sharded / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match="^--model_name_or_path .*index.json: "):
        open_checkpoint(str(sharded))


def test_the_links_of_the_hubs_cache_are_followed(sharded):
    """There a snapshot holds links to ../../blobs."""
    blobs, snapshot = sharded.parent / "models--a--b/blobs", sharded.parent / "models--a--b/snapshots/0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(sharded.iterdir())):
        shutil.move(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert open_checkpoint(str(snapshot)).keys() == {"a", "b"}


class RunsCode:
    def __reduce__(self):
        return print, ("this code ran",)


@pytest.mark.parametrize("content", ["a list", "code", "nested", "compressed", "big-endian", "empty", "large"])
def test_a_bin_that_is_not_plain_tensors_is_refused(tmp_path, capfd, content):
    file = tmp_path / "pytorch_model.bin"
    torch.save(TENSORS, file)
    assert torch.equal(open_checkpoint(str(tmp_path))["a"][...], TENSORS["a"])
    objects = {"a list": [1], "code": {"a": RunsCode()}, "nested": {"model": TENSORS}}
    if content in objects:
        torch.save(objects[content], file)
    elif content == "empty":
        file.write_bytes(b"")
    else:
        entries = {info.filename: zipfile.ZipFile(file).read(info) for info in zipfile.ZipFile(file).infolist()}
        compression = zipfile.ZIP_DEFLATED if content == "compressed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(file, "w", compression) as archive:
            for name, data in entries.items():
                if content == "large" and name.endswith("data.pkl"):  # a tensor that would reach into the next entry
                    assert b"K\x02K\x03\x86" in data  # its shape, (2, 3)
                    data = data.replace(b"K\x02K\x03\x86", b"K\x06K\x03\x86")
                archive.writestr(name, b"big" if name.endswith("byteorder") and content == "big-endian" else data)
    with pytest.raises(UserError, match="^--model_name_or_path .*pytorch_model.bin: "):
        open_checkpoint(str(tmp_path))
    assert "ran" not in capfd.readouterr().out
