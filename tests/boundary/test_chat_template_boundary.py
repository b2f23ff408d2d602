"""Whatever a chat template holds, chats are rendered with it, or it is refused in one line."""

import dataclasses
import json

from hypothesis import strategies as st

from lora_dist.data.formats import load_tokenizer
from lora_dist.data.rows import prepare_rows
from tests.helpers.properties import ODD_WORDS, answered, counts, holds, mutations

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
pieces = ["{{ messages }}", "{{ 1 / 0 }}", "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{% if x %}",
          "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{{ raise_exception('no') }}", "{{ 'x' * 10 ** 12 }}",
          "{% for i in range(10 ** 12) %}{% endfor %}", "{{ messages[9].role }}", "{{ x.__class__.__mro__ }}",
          "{% generation %}", "{% endgeneration %}", "{% include 'x' %}", "{{ 2 ** 10 ** 9 }}"]  # fmt: skip
templates = st.one_of(
    mutations(TEMPLATE.encode()),
    st.lists(st.sampled_from(pieces + ODD_WORDS), max_size=5).map(
        lambda p: "".join(p).encode("utf-8", "surrogateescape")
    ),
)


@counts
def test_any_chat_template(count, tmp_path, config):
    file, data = tmp_path / "chat.jinja", tmp_path / "chats.jsonl"
    data.write_text(json.dumps(CHAT) + "\n")
    config = dataclasses.replace(
        config, dataset_text_field=None, eval_fraction=0.0, dataset_name=str(data), chat_template=str(file)
    )

    def check(content):
        file.write_bytes(content)
        with answered(tmp_path):
            prepare_rows(config, load_tokenizer(config.model_name_or_path, str(file)))

    holds(count, templates, check)
