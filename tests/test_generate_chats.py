"""`lora-dist generate` gives an adapter the prompt as it was trained: chats through their template."""

import json

import pytest

from lora_dist.commands import _prompt_tokens
from lora_dist.data.formats import load_tokenizer
from lora_dist.embedded import EMBEDDED, model_path
from lora_dist.errors import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    tokenizer = load_tokenizer(EMBEDDED, None)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("below", ["", "checkpoints/step-00000002"])
@pytest.mark.parametrize(("format", "bare", "as_chat"), [
    ("messages", False, True), ("messages", True, False), ("text", False, False), (None, False, True),
])  # fmt: skip
def test_a_prompt_goes_through_the_template_if_chats_were_trained(tmp_path, tokenizer, below, format, bare, as_chat):
    adapter = tmp_path / below / "adapter"
    adapter.mkdir(parents=True)
    if format:
        (tmp_path / "state.json").write_text(json.dumps({"facts": {"format": format}}))
    tokens, found = _prompt_tokens(tokenizer, "hello", adapter, bare=bare)
    assert found == as_chat
    assert tokenizer.decode(tokens, skip_special_tokens=True) == ("<user>hello<assistant>" if as_chat else "hello")


def test_without_a_template_the_prompt_is_bare(tmp_path, tokenizer):
    tokenizer.chat_template = None
    assert not _prompt_tokens(tokenizer, "hello", tmp_path / "adapter", bare=False)[1]


def test_a_template_that_fails_is_one_line(tmp_path, tokenizer):
    tokenizer.chat_template = "{{ 1 / 0 }}"
    with pytest.raises(UserError, match="give --bare"):
        _prompt_tokens(tokenizer, "hello", tmp_path / "adapter", bare=False)


def test_an_adapter_records_a_base_that_is_found_from_any_directory(tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model_path("base") == model_path("./base") == str(tmp_path / "base")
    assert model_path("facebook/opt-6.7b") == "facebook/opt-6.7b"
