"""Chats as data sets hold them, and the messages that a chat template gets.

Sources: OpenAI's fine-tuning format (messages with role, content, tool_calls and weight; a column tools), ShareGPT's
(conversations with from and value; columns system and tools) and TRL's (messages, tools, chat_template_kwargs).
"""

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lora_dist.boundary import one_line, parse_json
from lora_dist.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")  # that chat templates know
OTHER_NAMES = {
    "human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant",
    "model": "assistant", "ai": "assistant", "chatgpt": "assistant", "bing": "assistant", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip
REASONING = ("reasoning_content", "thinking", "reasoning")  # names that templates and data sets give to one thing
OTHER_COLUMNS = ("system", "tools", "chat_template_kwargs")  # beside the messages, if the data set has them
# Arguments of the call that renders a chat. All but two change what becomes of the text, so no data may set them.
ARGUMENTS = {*inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters, "messages"}
NOT_FOR_DATA = ARGUMENTS - {"tools", "documents", "kwargs"}


@dataclass(frozen=True)
class Chat:
    """One chat, ready for the template."""

    messages: tuple[dict, ...] = ()
    trained: tuple[bool, ...] = ()  # for each message; True only for the assistant's
    num_given: int = 0  # number of messages that are the prompt
    options: dict = field(default_factory=dict)  # of apply_chat_template: tools, and what chat_template_kwargs holds

    @property
    def text(self) -> str:
        return "".join(part for message in self.messages for part in spoken(message))


def spoken(message: dict) -> Iterator[str]:
    """The texts of a message that a template should render: its content, its reasoning and the names of its calls."""
    yield message["content"]
    yield from (message[name] for name in REASONING if isinstance(message.get(name), str))
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]


def read_chat(example: dict, columns: tuple[str, ...], where: str) -> Chat:
    """The chat that a row's columns hold; several columns are joined, and all but the last are the prompt.

    Raises UserError, which begins with `where`, if a part of it cannot be given to a template.
    """
    read = [_messages(example[column], column, where) for column in columns]
    pairs = [pair for pairs in read for pair in pairs]
    num_given = sum(map(len, read[:-1]))
    system = example.get("system")
    if system is not None and not isinstance(system, str):
        raise UserError(f"{where}: column system holds a {type(system).__name__}; it must hold text")
    if system and pairs:
        if pairs[0][0]["role"] == "system" and pairs[0][0]["content"] != system:
            raise UserError(f"{where}: it has a column system and another system message; keep one of them")
        if pairs[0][0]["role"] != "system":
            pairs.insert(0, ({"role": "system", "content": system}, False))
            num_given += bool(num_given)
    options = _options(example, where)
    messages, trained = zip(*pairs, strict=True) if pairs else ((), ())
    return Chat(messages, trained, num_given, options)


def _options(example: dict, where: str) -> dict:
    tools = _decoded(example.get("tools"), list, f"{where}: column tools")
    options = _decoded(example.get("chat_template_kwargs"), dict, f"{where}: column chat_template_kwargs") or {}
    options = _without_nulls(options) | ({"tools": tools} if tools else {})
    if refused := sorted(options.keys() & NOT_FOR_DATA):
        raise UserError(
            f"{where}: column chat_template_kwargs sets {refused[0]}, which is an argument of the call that renders a "
            "chat; only variables of the chat template can be set"
        )
    for name in ("tools", "documents"):
        items = options.get(name, [])
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise UserError(f"{where}: {name} must hold a list of objects")
    return options


def _decoded(value, kind: type, what: str):
    """A value of this kind; also from the JSON text of one. None if there is none. Raises UserError."""
    if isinstance(value, str):
        try:
            value = parse_json(value) if value.strip() else None
        except (json.JSONDecodeError, RecursionError):
            raise UserError(f"{what} holds text that is not JSON; it must hold a {kind.__name__}") from None
        except ValueError as error:
            raise UserError(f"{what} holds JSON text that cannot be used: {one_line(error)}") from None
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{what} holds a {type(value).__name__}; it must hold a {kind.__name__}")
    return value


def _without_nulls(value: dict) -> dict:
    """Without the keys that are null, which here mean that there is nothing. What a value holds stays as it is."""
    return {key: item for key, item in value.items() if item is not None}


def _messages(value, column: str, where: str) -> list[tuple[dict, bool]]:
    """(message, whether it is trained) for each message of a column."""
    if isinstance(value, dict):  # the feature Sequence({...}) of datasets: a list for each key
        lengths = {len(items) if isinstance(items, list) else -1 for items in value.values()}
        if len(lengths) != 1 or -1 in lengths:
            raise UserError(f"{where}: column {column} holds a {type(value).__name__}; it must hold a list of messages")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    messages = _decoded(value, list, f"{where}: column {column}") or []
    return [_message(message, f"{where}: message {i} of {column}") for i, message in enumerate(messages, 1)]


def _message(message, where: str) -> tuple[dict, bool]:
    if not isinstance(message, dict):
        raise UserError(f"{where} is a {type(message).__name__}; it must have a role and content (or from and value)")
    rest = _without_nulls(message)
    name = rest.pop("role", None) or rest.pop("from", None)
    if not isinstance(name, str):
        raise UserError(f"{where} has no role; it must have a role and content (or from and value)")
    role = OTHER_NAMES.get(name.strip().lower(), name.strip().lower())
    if role not in ROLES:
        known = ", ".join((*ROLES, *OTHER_NAMES))
        raise UserError(f"{where} has the role {name!r}, which is not known; rename it to one of {known}")
    content = rest.pop("content", None)
    content = rest.pop("value", None) if content is None else content
    content = _content(content, where)
    weight, train = rest.pop("weight", None), rest.pop("train", None)
    for key, value in (("weight", weight), ("train", train)):
        if value not in (None, 0, 1):
            raise UserError(f"{where} has {key} {value!r}; it must be 0 or 1: a message is trained or not")
    calls, call = rest.pop("tool_calls", None), rest.pop("function_call", None)  # the latter: OpenAI's, before tools
    calls = _calls([call] if call and not calls else calls, where)
    if name.strip().lower() == "function_call":
        calls, content = _calls([_decoded(content, dict, f"{where} (function_call)")], where), ""
    read = {"role": role, "content": content, **rest} | ({"tool_calls": calls} if calls else {})
    return read, role == "assistant" and weight != 0 and train != 0


def _content(content, where: str) -> str:
    """The text of a message's content, which may be a list of parts as OpenAI has them."""
    if isinstance(content, list):
        texts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, dict) else "text"
            text = part.get("text") if isinstance(part, dict) else part
            if kind != "text":
                raise UserError(f"{where} has a part of type {kind!r}; only parts of type text are supported")
            if not isinstance(text, str):
                raise UserError(f"{where} has a part whose text is a {type(text).__name__}; it must be text")
            texts.append(text)
        return "".join(texts)
    if content is not None and not isinstance(content, str):
        raise UserError(f"{where} has a content that is a {type(content).__name__}; it must be text")
    return content or ""


def _calls(calls, where: str) -> list[dict]:
    """Calls of tools as templates expect them: {"type": "function", "function": {"name", "arguments"}}.

    Arguments that are JSON text become an object: most templates write them with `tojson`, which would quote the text.
    """
    calls, found = _decoded(calls, list, f"{where}: tool_calls") or [], []
    for call in calls:
        call = _without_nulls(call) if isinstance(call, dict) else {}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where} has a tool call without the name of a function")
        function = _without_nulls(function)
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _decoded(arguments, dict, f"{where}: the arguments of {function['name']}") or {}
        found.append({"type": "function", **call, "function": function | {"arguments": arguments}})
    return found
