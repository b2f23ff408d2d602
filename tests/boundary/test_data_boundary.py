"""Whatever stands in a data file is trained on, or refused in one line."""

import dataclasses
import json

import pytest
from hypothesis import strategies as st

from lora_dist.data.formats import load_tokenizer
from lora_dist.data.rows import prepare_rows
from tests.helpers.properties import answered, counts, holds, json_values, mutations, words

TEXTS = [{"text": "one"}, {"text": "two\nlines"}, {"text": None}]
PAIRS = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "x", "completion": "y", "id": 7}]
INSTRUCTIONS = [{"instruction": "Add", "input": "1, 1", "output": "2"}]
ANSWERS = [{"prompt": "A", "chosen": "b", "rejected": "c"}]
ANSWERED_CHATS = [{"prompt": [{"role": "user", "content": "Hi"}]} | {
    column: [{"role": "assistant", "content": column}] for column in ("chosen", "rejected")
}]  # fmt: skip
CHATS = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "weight": 1}]}]


def file_of(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


VALID = [TEXTS, PAIRS, INSTRUCTIONS, CHATS, ANSWERS, ANSWERED_CHATS]
COLUMNS = ["text", "prompt", "completion", "instruction", "input", "output", "messages", "conversations", "tools"]
COLUMNS += ["chosen", "rejected"]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"

role = st.sampled_from(["system", "user", "assistant", "tool", "human", "gpt"]) | words
message = st.fixed_dictionaries({"role": role, "content": words | json_values})
column = st.sampled_from(COLUMNS)
row = st.dictionaries(column, words | json_values | st.lists(message, max_size=3), max_size=4)


@st.composite
def changed_rows(draw) -> bytes:
    """A valid file with another value in one column of its last row, or in one key of its last message."""
    rows = json.loads(json.dumps(draw(st.sampled_from(VALID))))
    place = rows[-1]
    lists = [name for name in ("messages", "prompt", "chosen") if isinstance(place.get(name), list)]
    if lists and draw(st.booleans()):
        place = place[draw(st.sampled_from(lists))][-1]
    place[draw(st.sampled_from(sorted(place)))] = draw(json_values)
    return file_of(rows)


data_files = st.one_of(
    changed_rows(),
    st.lists(row | json_values, max_size=4).map(file_of),
    st.sampled_from(VALID).map(file_of).flatmap(mutations),
    st.binary(max_size=100),
)


@pytest.fixture
def base(config):
    return dataclasses.replace(config, dataset_text_field=None, eval_fraction=0.0, max_length=64)


@counts
@pytest.mark.parametrize(
    "suffix, loss_type", [*((s, "nll") for s in ("jsonl", "json", "csv", "txt")), ("jsonl", "ipo")]
)
def test_any_bytes_in_a_data_file(count, suffix, loss_type, tmp_path, base):
    folder = tmp_path / "data"
    folder.mkdir()
    file = folder / f"data.{suffix}"
    config = dataclasses.replace(base, dataset_name=str(file), loss_type=loss_type)
    tokenizer = load_tokenizer(config.model_name_or_path)
    tokenizer.chat_template = TEMPLATE

    def check(content):
        file.write_bytes(content)
        with answered(folder):
            prepare_rows(config, tokenizer)

    holds(count, data_files, check)
