"""Chats as people have them: each part reaches the template, or is named; what must not be trained is not."""

import dataclasses
import json

import pytest
from datasets import Dataset

from lora_dist.data import chat_template
from lora_dist.data.chats import read_chat
from lora_dist.data.encode import MAX_NOTES, Counts, encode
from lora_dist.data.formats import Encoder, load_tokenizer, mark_trained
from lora_dist.data.rows import prepare_rows
from lora_dist.errors import UserError

PLAIN = """\
{%- if tools %}<|tools|>
{% for t in tools %}{{ t.function.name }} {% endfor %}</s>
{% endif -%}
{%- for m in messages %}<|{{ m.role }}|>
{{ '<think>' + m.reasoning_content + '</think>' if m.reasoning_content }}{{ m.content }}
{%- for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}</s>
{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""
MARKED = """\
{%- for m in messages %}<|{{ m.role }}|>
{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>{% endgeneration %}
{%- else %}{{ m.content }}</s>{% endif %}

{% endfor -%}
{%- if add_generation_prompt %}<|assistant|>
{% endif %}"""
BARE = "{% for m in messages %}{{ m.role }}: {{ m.content if m.role != 'system' }}</s>\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CALL = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
QUESTION, ANSWER = {"role": "user", "content": "How warm?"}, {"role": "assistant", "content": "4 C."}


@pytest.fixture
def shown(config):
    def show(example: dict, template: str = PLAIN, **settings) -> tuple[str, list[str]]:
        """(the row with its trained tokens between ⟦ and ⟧, the warnings)."""
        tokenizer = load_tokenizer("embedded")
        tokenizer.chat_template = template
        changed = dataclasses.replace(config, dataset_text_field=None, max_length=1000, **settings)
        encoder, counts = Encoder(tokenizer, changed, list(example)), Counts()
        rows = list(encode(Dataset.from_list([example]), encoder, changed, counts, set()))
        return (mark_trained(tokenizer, *rows[0]) if rows else ""), counts.warnings("train", "truncate", 1000)

    return show


def test_chats_with_tools_train_the_call(shown):
    messages = [QUESTION, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "4", "tool_call_id": "c1"}, ANSWER]  # fmt: skip
    row, warnings = shown({"messages": messages, "tools": [CALL]})
    assert row == (
        "<|tools|>\nget_weather </s>\n<|user|>\nHow warm?</s>\n"
        '<|assistant|>\n⟦<call>get_weather {"city": "Oslo"}</call></s>⟧\n'
        "<|tool|>\n4</s>\n<|assistant|>\n⟦4 C.</s>⟧\n"
    )
    assert warnings == []
    before = {"role": "assistant", "function_call": CALL["function"]}  # OpenAI's older name for it
    assert shown({"messages": [QUESTION, before, *messages[2:]], "tools": [CALL]})[0] == row
    _, warnings = shown({"messages": messages, "tools": json.dumps([CALL])}, BARE)
    left_out = "have a part that the chat template leaves out"
    assert sorted(w.split(" examples ")[1].split(";")[0] for w in warnings) == [
        f"{left_out}: tool_calls", f"{left_out}: tools"
    ]  # fmt: skip


@pytest.mark.parametrize("template", [PLAIN, MARKED])
@pytest.mark.parametrize("untrained", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
def test_chats_turns_of_weight_0_are_not_trained(shown, template, untrained):
    bad = {"role": "assistant", "content": "bad answer"}
    messages = [QUESTION, bad | untrained, QUESTION, ANSWER | {"weight": 1}]
    row, warnings = shown({"messages": messages}, template)
    assert row == (
        "<|user|>\nHow warm?</s>\n<|assistant|>\nbad answer</s>\n<|user|>\nHow warm?</s>\n<|assistant|>\n⟦4 C.</s>⟧\n"
    )
    assert warnings == []


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_chats_that_open_with_the_assistant_give_the_same_tokens_with_and_without_marks(shown, template):
    row, warnings = shown({"messages": [{"role": "assistant", "content": "Hi."}, QUESTION, ANSWER]}, template)
    assert row == "<|assistant|>\nHi.</s>\n<|user|>\nHow warm?</s>\n<|assistant|>\n⟦4 C.</s>⟧\n"
    assert "begin with a message of the assistant, which is not trained" in warnings[0] and len(warnings) == 1


def test_chats_of_sharegpt_with_columns_and_other_role_names(shown):
    turns = [("Human", "q"), ("function_call", '{"name": "look_up", "arguments": {"x": 1}}'), ("observation", "r"),
             ("gpt", "a")]  # fmt: skip
    example = {"system": "Be terse.", "tools": "[]", "conversations": [{"from": f, "value": v} for f, v in turns]}
    row, warnings = shown(example)
    assert row == (
        "<|system|>\nBe terse.</s>\n<|user|>\nq</s>\n"
        '<|assistant|>\n⟦<call>look_up {"x": 1}</call></s>⟧\n<|tool|>\nr</s>\n<|assistant|>\n⟦a</s>⟧\n'
    )
    assert warnings == []
    for name in ("USER", "human", "prompter"):
        assert shown({"messages": [{"role": name, "content": "q"}, {"role": "BOT", "content": "a"}]})[0] == (
            "<|user|>\nq</s>\n<|assistant|>\n⟦a</s>⟧\n"
        )


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_chats_keep_their_reasoning_or_say_that_the_template_drops_it(shown, name):
    messages = [QUESTION, ANSWER | {name: "It is winter."}]
    assert "⟦<think>It is winter.</think>4 C.</s>⟧" in shown({"messages": messages})[0]
    _, warnings = shown({"messages": messages}, MARKED)
    assert f"1 of 1 train examples have a part that the chat template leaves out: {name}; first: example 1" in warnings


def test_chats_name_a_system_message_that_the_template_drops(shown):
    _, warnings = shown({"messages": [{"role": "system", "content": "Be terse."}, QUESTION, ANSWER]}, BARE)
    assert len(warnings) == 1 and "leaves out: the content of the role system; first: example 1" in warnings[0]


def test_chats_name_keys_that_the_template_does_not_read(shown):
    more = ANSWER | {"trainable": False, "mood": "4 C.", "thinking": ["a list"]}
    _, warnings = shown({"messages": [QUESTION, more], "chat_template_kwargs": {"terse": True}}, MARKED)
    named = [
        line.split(": ")[1].split(";")[0] for line in warnings if "key that the chat template does not read" in line
    ]
    assert sorted(named) == ["terse", "thinking", "trainable"]  # the row shows the value of "mood"
    _, warnings = shown({"messages": [QUESTION, ANSWER | {f"key_{i}": "x" for i in range(100)}]})
    assert len(warnings) == MAX_NOTES + 1 and "81 of" not in warnings[-1] and "other parts" in warnings[-1]


def test_chats_as_text_as_lists_and_as_parts_are_the_same(shown):
    expected = shown({"messages": [QUESTION, ANSWER]})
    assert expected == ("<|user|>\nHow warm?</s>\n<|assistant|>\n⟦4 C.</s>⟧\n", [])
    parts = [m | {"content": [{"type": "text", "text": m["content"]}]} for m in (QUESTION, ANSWER)]
    lists = {key: [m[key] for m in (QUESTION, ANSWER)] for key in ("role", "content")}
    nulls = [m | {"tool_calls": None, "weight": None} for m in (QUESTION, ANSWER)]
    for messages in (json.dumps([QUESTION, ANSWER]), parts, lists, nulls):
        assert shown({"messages": messages}) == expected


def test_chats_without_an_answer_say_which_roles_they_have(shown):
    row, warnings = shown({"messages": [QUESTION, {"role": "system", "content": "x"}]})
    assert row == "" and "have no token to train on" in warnings[0]
    assert "have no message of the assistant to train on (they have user, system); first: example 1" in warnings[1]


@pytest.mark.parametrize("example, says", [
    ({"m": "not json"}, "column m holds text that is not JSON; it must hold a list"),
    ({"m": '{"role": "user"}'}, "column m holds a dict; it must hold a list"),
    ({"m": 3}, "column m holds a int; it must hold a list"),
    ({"m": {"role": ["user"], "content": []}}, "column m holds a dict; it must hold a list of messages"),
    ({"m": ["text"]}, "message 1 of m is a str; it must have a role and content"),
    ({"m": [{"content": "x"}]}, "message 1 of m has no role"),
    ({"m": [{"role": "narrator", "content": "x"}]}, "message 1 of m has the role 'narrator', which is not known;"),
    ({"m": [{"role": "user", "content": {"a": 1}}]}, "message 1 of m has a content that is a dict"),
    ({"m": [{"role": "user", "content": [{"type": "image", "url": "u"}]}]}, "has a part of type 'image'"),
    ({"m": [ANSWER | {"weight": 0.5}]}, "message 1 of m has weight 0.5; it must be 0 or 1"),
    ({"m": [ANSWER | {"train": "no"}]}, "message 1 of m has train 'no'; it must be 0 or 1"),
    ({"m": [ANSWER | {"tool_calls": [{"id": 1}]}]}, "a tool call without the name of a function"),
    ({"m": [ANSWER | {"tool_calls": [{"name": "f", "arguments": "{"}]}]}, "arguments of f holds text that is not JSON"),
    ({"m": [{"from": "function_call", "value": "f(x)"}]}, "holds text that is not JSON"),
    ({"m": [ANSWER], "tools": "x"}, "column tools holds text that is not JSON"),
    ({"m": [ANSWER], "tools": ["f"]}, "tools must hold a list of objects"),
    ({"m": [ANSWER], "system": 3}, "column system holds a int; it must hold text"),
    ({"m": [{"role": "system", "content": "a"}], "system": "b"}, "a column system and another system message"),
    ({"m": "[" * 100_000}, "text that is not JSON"),
    ({"m": '[{"role": "user", "content": "a", "content": "b"}]'}, "cannot be used: content is given twice"),
    ({"m": r'[{"role": "user", "content": "\ud83d"}]'}, "JSON text that cannot be used: "),
    ({"m": [ANSWER | {"tool_calls": [{"name": "f", "arguments": r'{"a": "\udc00"}'}]}]}, "of f holds JSON text"),
    ({"m": [ANSWER | {"content": [{"type": "text", "text": None}]}]}, "a part whose text is a NoneType; it must be"),
    ({"m": [ANSWER], "tools": '[{"name": "f", "name": "g"}]'}, "tools holds JSON text that cannot be used: "),
    ({"m": [ANSWER], "chat_template_kwargs": {"padding": True}}, "chat_template_kwargs sets padding, which is"),
    ({"m": [ANSWER], "chat_template_kwargs": {"chat_template": "x"}}, "sets chat_template, which is an argument"),
    ({"m": [ANSWER], "chat_template_kwargs": {"tools": "x"}}, "tools must hold a list of objects"),
    ({"m": [ANSWER], "chat_template_kwargs": {"documents": [1]}}, "documents must hold a list of objects"),
])  # fmt: skip
def test_boundary_of_chats(example, says):
    with pytest.raises(UserError) as raised:
        read_chat(example, ("m",), "--dataset_name d: line 7")
    assert str(raised.value).startswith("--dataset_name d: line 7: ") and says in str(raised.value)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"default": None, "enum": [1, None]}}}
RAW = "{{ tools | tojson }}{% for m in messages %}{{ m | tojson }}{% endfor %}"


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("as_text", [True, False])
def test_chats_of_a_text_file_keep_the_nulls_of_arguments_and_schemas(config, tmp_path, suffix, as_text):
    arguments = {"city": None, "days": [None, 1]}
    call = {"type": "function", "function": {"name": "f", "arguments": json.dumps(arguments) if as_text else arguments}}
    messages = [QUESTION, {"role": "assistant", "content": "", "tool_calls": [call], "refusal": None}]
    (tmp_path / f"a.{suffix}").write_text(json.dumps({"messages": messages, "tools": [TOOL]}) + "\n")
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = RAW
    name = str(tmp_path / f"a.{suffix}")
    changed = dataclasses.replace(
        config, dataset_name=name, dataset_text_field=None, max_length=1000, eval_fraction=0.0
    )
    row = mark_trained(tokenizer, *prepare_rows(changed, tokenizer).train[0].values())
    assert json.dumps(arguments) in row and json.dumps(TOOL) in row and "refusal" not in row


def test_chats_of_arrow_lose_the_nulls_that_it_adds(shown):
    tools = [{"name": "f", "parameters": {"a": 1}}, {"name": "g", "parameters": {"b": 2}}]
    row, _ = shown({"messages": [QUESTION, ANSWER], "tools": tools}, RAW)
    assert json.dumps(tools) in row


@pytest.mark.parametrize("part", ["No.", "4 C", "?", "好的"])
def test_chats_name_a_short_part_that_the_template_drops(shown, part):
    _, warnings = shown({"messages": [{"role": "system", "content": part}, {"role": "user", "content": "a"}, ANSWER]},
                        BARE.replace("4 C", ""))  # fmt: skip
    expected = (
        [] if part in "user: aassistant: 4 C." else ["the chat template leaves out: the content of the role system"]
    )
    assert [line.split("have a part that ")[1].split(";")[0] for line in warnings] == expected


@pytest.mark.parametrize("content", ["[" * 800 + "]" * 800, '{"a":' * 600 + "1" + "}" * 600])
def test_boundary_of_chats_nested_deep(config, tmp_path, content):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a", "x": ' + content + "}]}\n")
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = RAW
    changed = dataclasses.replace(config, dataset_name=str(tmp_path / "a.jsonl"), dataset_text_field=None)
    with pytest.raises(UserError, match="a.jsonl: line 1: "):
        prepare_rows(changed, tokenizer)


def test_chats_and_texts_may_stand_in_one_data_set(config, tmp_path):
    rows = [{"prompt": "Say ", "completion": "hi"}, {"prompt": [QUESTION], "completion": [ANSWER]},
            {"prompt": "Say a", "completion": "b"}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row | {"tools": None}) + "\n" for row in rows))
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = PLAIN
    name = str(tmp_path / "a.jsonl")
    changed = dataclasses.replace(config, dataset_name=name, dataset_text_field=None, eval_fraction=0.0)
    data = prepare_rows(changed, tokenizer)
    shown = [mark_trained(tokenizer, *row.values()) for row in data.train]
    assert "⟦hi</s>⟧" in shown[0] and "<|assistant|>\n⟦4 C.</s>⟧" in shown[1] and "⟦b</s>⟧" in shown[2]
    assert data.unread == () and prepare_rows(changed, tokenizer).unread == ()  # of a chat, `tools` is read


def test_columns_that_are_not_read_are_named(config):
    columns = ["messages", "id", "system", "source", "tools"]
    tokenizer = load_tokenizer("embedded")
    tokenizer.chat_template = PLAIN
    assert Encoder(tokenizer, dataclasses.replace(config, dataset_text_field=None), columns).unread == ["id", "source"]


@pytest.mark.parametrize("template, says", [
    ("{{ 1 / 0 }}", "ZeroDivisionError"),
    ("{{ 'a' * (10 ** 14) }}", "MemoryError"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    ("{% for i in range(10**9) %}a{% endfor %}", "OverflowError"),
    ("{{ raise_exception('no such chat') }}", "no such chat"),
    ("{{ messages.__class__.__mro__ }}", "SecurityError"),
    ("{% for m in messages %}{% generation %}{{ raise_exception('no') }}{% endgeneration %}{% endfor %}", "no"),
])  # fmt: skip
def test_boundary_of_templates(shown, template, says):
    with pytest.raises(UserError, match=f"example 1: the chat template refuses it: .*{says}.*; see the chat template"):
        shown({"messages": [QUESTION, ANSWER]}, template)


MARK = "{% generation %}{{ m.content }}{% endgeneration %}"


@pytest.mark.parametrize("template, says", [
    ("{% if %}", "TemplateSyntaxError"),
    ("{% macro turn(m) %}\n" + MARK + "{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}", "line 2"),
    ("{% for m in messages %}{% set x %}" + MARK + "{% endset %}{{ x }}{% endfor %}", "line 1"),
    ("{% for m in messages %}{% filter trim %}" + MARK + "{% endfilter %}{% endfor %}", "line 1"),
    ("{% for m in messages recursive %}" + MARK + "{% endfor %}", "line 1"),
    ("{% for m in messages %}{% generation %}" + MARK + "{% endgeneration %}{% endfor %}", "line 1"),
])  # fmt: skip
def test_boundary_of_templates_whose_marks_would_be_wrong(shown, template, says):
    with pytest.raises(UserError, match=f"the chat template of embedded: .*{says}"):
        shown({"messages": [QUESTION, ANSWER]}, template)
    if says.startswith("line"):  # all tokens are trained, so no marks are read
        assert shown({"messages": [QUESTION, ANSWER]}, template, train_on_inputs=True)[0]


@pytest.mark.parametrize(
    "comment", ["{# {% generation %} marks nothing here #}", "{% raw %}{% generation %}{% endraw %}"]
)
def test_chats_a_template_that_only_names_the_marks_has_none(shown, comment):
    row, _ = shown({"messages": [QUESTION, ANSWER]}, comment + PLAIN)
    assert row.endswith("<|assistant|>\n⟦4 C.</s>⟧\n")


@pytest.mark.parametrize("template", [
    "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",  # many steps
    "{{ 10 ** (10 ** 9) }}",  # one step, which no signal interrupts
])  # fmt: skip
def test_boundary_of_a_template_that_does_not_end(shown, template, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_TRIAL_S", 2)
    with pytest.raises(UserError, match="the chat template of embedded: it did not end in 2 s"):
        shown({"messages": [QUESTION, ANSWER]}, template)


def test_boundary_of_a_template_that_does_not_end_on_one_chat(shown, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_RENDER_S", 1)
    loop = (
        "{% if messages | length > 2 %}{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}"
    )
    assert shown({"messages": [QUESTION, ANSWER]}, loop + "{% endif %}" + PLAIN)[0]
    with pytest.raises(UserError, match="example 1: the chat template refuses it: it took more than 1 s"):
        shown({"messages": [QUESTION, ANSWER, QUESTION]}, loop + "{% endif %}" + PLAIN)


def test_boundary_of_a_template_file(tmp_path):
    (tmp_path / "t.jinja").write_bytes(b"caf\xe9")
    for path in (tmp_path / "t.jinja", tmp_path, tmp_path / "none", "/dev/zero"):
        with pytest.raises(UserError, match=f"--chat_template {path}: "):
            load_tokenizer("embedded", str(path))
