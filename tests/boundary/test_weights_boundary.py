"""Whatever stands in the header of a weights file or in its index is read as it says, or refused in one line."""

import json
import struct

import torch
from hypothesis import strategies as st
from safetensors.torch import load, save

from lora_dist.model.files.lazy_weights import open_checkpoint, open_weights
from tests.helpers.properties import answered, counts, holds, json_values, mutations, words

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5, dtype=torch.int8), "c": torch.tensor(1.5)}
INDEX = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
DTYPES = ["F32", "F16", "BF16", "I8", "U8", "I64", "BOOL", "F8_E4M3", "F4", "x"]

entry = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(DTYPES) | json_values,
        "shape": st.lists(st.integers(-1, 9) | st.just(2**62), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 60) | st.just(2**63), min_size=2, max_size=2) | json_values,
    }
)
headers = st.dictionaries(st.sampled_from(["a", "b", "__metadata__"]) | words, entry | json_values, max_size=3)


VALID = save(TENSORS)
(HEADER_SIZE,) = struct.unpack("<Q", VALID[:8])
HEADER = json.loads(VALID[8 : 8 + HEADER_SIZE])


def file_of(header: dict, data: bytes = bytes(60)) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def changed_headers(draw) -> bytes:
    """The valid file with one value of one tensor's entry changed."""
    name, key = draw(st.sampled_from(sorted(HEADER))), draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
    header = HEADER | {name: HEADER[name] | {key: draw(entry)[key]}}
    return file_of(header, VALID[8 + HEADER_SIZE :])


@counts
def test_any_safetensors_header(count, tmp_path):
    file = tmp_path / "model.safetensors"

    def check(content):
        file.write_bytes(content)
        with answered(tmp_path):
            tensors = {name: tensor[...] for name, tensor in open_weights([file]).items()}
            expected = load(content)  # safetensors' own reader agrees
            assert tensors.keys() == expected.keys()
            assert all(tensors[name].numpy().tobytes() == expected[name].numpy().tobytes() for name in expected
                       if expected[name].dtype not in (torch.bfloat16, torch.float8_e4m3fn))  # fmt: skip

    sizes = st.integers(0, 2**64 - 1).map(lambda size: struct.pack("<Q", size) + VALID[8:])
    holds(
        count,
        st.one_of(changed_headers(), mutations(VALID), sizes, headers.map(file_of), st.binary(max_size=64)),
        check,
        file_of(HEADER | {"c": HEADER["c"] | {"shape": {}}}, VALID[8 + HEADER_SIZE :]),
    )


@counts
def test_any_index(count, tmp_path):
    for number, name in ((1, "a"), (2, "b")):
        (tmp_path / f"model-{number}.safetensors").write_bytes(save({name: TENSORS[name]}))
    index = tmp_path / "model.safetensors.index.json"
    names = st.sampled_from(["model-1.safetensors", "model-2.safetensors", "../x", "/etc/passwd", "."]) | words
    maps = st.dictionaries(st.sampled_from(["a", "b"]) | words, names | json_values, max_size=3)
    contents = st.fixed_dictionaries({"weight_map": maps | json_values}).map(lambda c: json.dumps(c).encode())

    def check(content):
        index.write_bytes(content)
        with answered(tmp_path):
            open_checkpoint(str(tmp_path))

    known = b'{"weight_map": {"a": "\\u0000"}}', json.dumps({"weight_map": {"a": "x" * 5000}}).encode()
    holds(count, st.one_of(contents, mutations(json.dumps(INDEX).encode()), st.binary(max_size=50)), check, *known)
