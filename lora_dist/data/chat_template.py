"""A tokenizer's chat template: chats as token ids, of which the assistant's are trained.

A template is a program from outside. It runs in transformers' sandbox, which allows no access to files; here it also
gets bounds in time and memory.
"""

import contextlib
import html
import json
import re
import resource
import signal
import threading
from bisect import bisect_right
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from jinja2 import nodes
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import _compile_jinja_template

from lora_dist.boundary import boundary, ends_within, one_line
from lora_dist.data.chats import REASONING, Chat, spoken
from lora_dist.data.tasks import IGNORE_INDEX
from lora_dist.errors import UserError, in_one_line

MAX_RENDER_S = 30  # of one chat
MAX_RENDER_BYTES = 4 * 2**30  # of new memory; a rendering of 4 million tokens needs less than 1 % of it
MAX_TRIAL_S = 10  # of one chat with two short messages
# Keys of a message whose values are looked for in its rendering; and one that only repeats which call is answered.
SHOWN = ("role", "content", "tool_calls", "tool_call_id")
Encoded = tuple[list[int], list[int]]  # token ids, labels
Tokenized = tuple[list[int], list[tuple[int, int]]]  # token ids, first character and end of each in the text


class ChatTemplate:
    """Renders chats and finds the assistant's tokens.

    `left_out` collects (what, where) for whatever a chat holds and its row does not show or train. The caller empties
    it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, train_on_inputs: bool, setting: str):
        """`setting`: where the template is from, for messages, e.g. "--chat_template t.jinja". Raises UserError."""
        self.tokenizer, self.train_on_inputs, self.setting = tokenizer, train_on_inputs, setting
        self.source = str(tokenizer.chat_template)
        self.left_out: list[tuple[str, str]] = []
        check_that_it_ends(tokenizer, setting)
        with boundary(setting):
            self.reads_marks = not train_on_inputs and marks_assistant(tokenizer)

    def encode(self, chats: list[Chat], places: list[str]) -> list[Encoded]:
        """(token ids, labels) of each chat. `places`: where each is from; the error for one that cannot be rendered
        begins with it. Raises UserError.
        """
        chats = [self._with_known_reasoning(chat) for chat in chats]
        texts = [self._render(chat, where) for chat, where in zip(chats, places, strict=True)]
        for chat, text, where in zip(chats, texts, places, strict=True):
            self._note_what_is_missing(chat, text, where)
        # The marks come with token ids of their own.
        tokenized = [None] * len(texts) if self.reads_marks else self._tokenize(texts)
        return [self._label(*row) for row in zip(chats, places, texts, tokenized, strict=True)]

    def _tokenize(self, texts: list[str]) -> list[Tokenized]:
        """(token ids, their character spans) of each text. One call, because the tokenizer works on many at once."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _label(self, chat: Chat, where: str, text: str, tokenized: Tokenized | None) -> Encoded:
        if self.train_on_inputs:
            return self._with_eos(tokenized[0], tokenized[0])
        wanted = [flag and i >= max(1, chat.num_given) for i, flag in enumerate(chat.trained)]
        found = None if tokenized else self._trained_by_marks(chat, wanted, where)
        ids, trained = found or self._trained_by_spans(chat, wanted, where, text, tokenized)
        if ids and all(trained):
            raise UserError(f"{where}: the chat template marks every token as the assistant's; see {self.setting}")
        labels = [token if flag else IGNORE_INDEX for token, flag in zip(ids, trained, strict=True)]
        if not any(trained):
            roles = ", ".join(dict.fromkeys(message["role"] for message in chat.messages))
            self.left_out.append((f"have no message of the assistant to train on (they have {roles})", where))
        return self._with_eos(ids, labels)

    def _trained_by_marks(self, chat: Chat, wanted: list[bool], where: str) -> tuple[list[int], list[bool]] | None:
        """(token ids, whether each is trained), told by the template's marks; None if these do not tell.

        Marks name no messages. If one of the assistant's messages is not trained, the marked runs are counted: if there
        is one for each of the assistant's messages, they belong to these in order.
        """
        answers = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
        ids, marks = self._marked(chat, where)
        if all(wanted[i] for i in answers):
            return ids, marks
        runs = [(mark, len(list(run))) for mark, run in groupby(marks)]
        if sum(mark for mark, _ in runs) != len(answers):
            return None
        which, trained = iter(answers), []
        for mark, length in runs:
            trained += [bool(mark) and wanted[next(which)]] * length
        return ids, trained

    def _trained_by_spans(
        self, chat: Chat, wanted: list[bool], where: str, text: str, tokenized: Tokenized | None
    ) -> tuple[list[int], list[bool]]:
        """(token ids, True for each token that lies in a wanted message)."""
        ids, offsets = tokenized or self._tokenize([text])[0]
        spans = list(self._spans(chat, wanted, text, where))  # in order, and none overlaps the next
        begins, ends = ([-1, *(span[side] for span in spans)] for side in (0, 1))
        return ids, [start < end <= ends[bisect_right(begins, start) - 1] for start, end in offsets]

    def _marked(self, chat: Chat, where: str) -> tuple[list[int], list[int]]:
        """(token ids, 1 for each token that the template's {% generation %} blocks mark, else 0)."""
        with self._bounded(where):
            encoded = self.tokenizer.apply_chat_template(
                list(chat.messages), tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
                tokenizer_kwargs={"verbose": False}, **chat.options,
            )  # fmt: skip
        return encoded["input_ids"], encoded["assistant_masks"]

    def _spans(self, chat: Chat, wanted: list[bool], text: str, where: str) -> Iterator[tuple[int, int]]:
        """Character spans of the wanted messages in the rendered `text`: from the assistant's cue to the end of a turn.

        For templates without {% generation %}. The spans follow from the renderings of the first 1, 2, ... messages, so
        each of these must be the beginning of `text`. Raises UserError if one is not.
        """
        special = tuple(token.content for token in self.tokenizer.added_tokens_decoder.values())
        for i in [i for i, flag in enumerate(wanted) if flag]:
            before = self._render(chat, where, first=i, add_cue=True)
            through = self._render(chat, where, first=i + 1)
            if not (through.startswith(before) and text.startswith(through)):
                raise UserError(
                    f"{where}: the chat template changes message {i + 1} when more messages follow, so the assistant's "
                    "tokens cannot be found; give a --chat_template with {% generation %}, or --train_on_inputs true"
                )
            stripped = through.rstrip()
            # Generation stops at the token that ends a turn, so a line feed after it is not trained.
            yield len(before), len(stripped) if stripped.endswith(special) else len(through)

    def _render(self, chat: Chat, where: str, *, first: int | None = None, add_cue: bool = False) -> str:
        """The first messages as text, all by default. `add_cue`: with the words that ask the assistant for more."""
        with self._bounded(where):
            return self.tokenizer.apply_chat_template(
                list(chat.messages[:first]), tokenize=False, add_generation_prompt=add_cue, **chat.options
            )

    @contextlib.contextmanager
    def _bounded(self, where: str) -> Iterator[None]:
        """Turn whatever the template raises into one line, and end it if it takes too long or too much memory."""
        try:
            with bounds(MAX_RENDER_S, MAX_RENDER_BYTES):
                yield
        except Exception as error:
            raise UserError(f"{where}: the chat template refuses it: {one_line(error)}; see {self.setting}") from None

    def _with_known_reasoning(self, chat: Chat) -> Chat:
        """Give reasoning the name that the template reads, if the data has another of the usual names."""
        known = [name for name in REASONING if self._reads(name)]
        if not known or not any(name in message for message in chat.messages for name in REASONING):
            return chat
        messages = []
        for message in chat.messages:
            given = [name for name in REASONING if name in message]
            renamed = {known[0] if key in given and key not in known else key: v for key, v in message.items()}
            messages.append(renamed if len(given) == 1 else message)
        return Chat(tuple(messages), chat.trained, chat.num_given, chat.options)

    def _note_what_is_missing(self, chat: Chat, text: str, where: str) -> None:
        """Note the parts of a chat that the template left out, and answers that are not trained as they seem to be."""
        if chat.num_given == 0 and chat.trained and chat.trained[0]:
            self.left_out.append(("begin with a message of the assistant, which is not trained", where))
        for message in chat.messages:
            names = [name for name in REASONING if isinstance(message.get(name), str)]
            what = [f"the content of the role {message['role']}", *names]
            what += ["tool_calls"] * len(message.get("tool_calls", ()))
            for name, part in zip(what, spoken(message), strict=True):
                if not _is_rendered(part, text):
                    self.left_out.append((f"have a part that the chat template leaves out: {name}", where))
            unread = [key for key in message if key not in (*SHOWN, *names) and not self._reads(key)]
            # A template may also write all keys in a loop. A value of three characters would be found anyhow.
            unread = [k for k in unread if len(str(message[k])) < 4 or not _is_rendered(str(message[k]), text)]
            self._note_unread(unread, where)
            if message["role"] == "assistant" and not "".join(spoken(message)).strip():
                self.left_out.append(("have an empty message of the assistant, which trains only its end", where))
        self._note_unread([key for key in chat.options if key != "tools" and not self._reads(key)], where)
        for tool in chat.options.get("tools", ()):
            function = tool.get("function", tool)
            if isinstance(function, dict) and not _is_rendered(str(function.get("name", "")), text):
                self.left_out.append(("have a part that the chat template leaves out: tools", where))

    def _note_unread(self, keys: list[str], where: str) -> None:
        for key in keys:
            what = f"have a key that the chat template does not read: {in_one_line(key, 60)}"
            self.left_out.append((what, where))

    def _reads(self, key: str) -> bool:
        """True if the template names the key, so that it decides itself what to do with its value."""
        return re.search(rf"\b{re.escape(key)}\b", self.source) is not None

    def _with_eos(self, ids: list[int], labels: list[int]) -> Encoded:
        """Add eos, unless the chat ends with a special token, as most templates end it; white space may follow it."""
        last = next((token for token in reversed(ids) if not self.tokenizer.decode([token]).isspace()), None)
        if last is None or last in self.tokenizer.added_tokens_decoder or labels[-1] == IGNORE_INDEX:
            return ids, labels
        eos = self.tokenizer.eos_token_id
        return [*ids, eos], [*labels, eos]


def marks_assistant(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if a chat template of the tokenizer has {% generation %} blocks, which mark the tokens to train.

    Raises ValueError for a block inside of something whose text is put together before it is written, for example a
    macro: transformers would then mark another place. Raises jinja2's errors for a template with a wrong syntax.
    """
    buffered = (nodes.Macro, nodes.CallBlock, nodes.FilterBlock, nodes.AssignBlock)
    template, found = tokenizer.chat_template, False
    for source in template.values() if isinstance(template, dict) else [template]:
        tree = _compile_jinja_template(source).environment.parse(source)
        blocks = [block for block in tree.find_all(nodes.CallBlock) if _is_generation(block)]
        outer = [*tree.find_all(buffered), *(loop for loop in tree.find_all(nodes.For) if loop.recursive)]
        if inside := {id(block) for block in blocks} & {id(b) for o in outer for b in o.find_all(nodes.CallBlock)}:
            line = next(block.lineno for block in blocks if id(block) in inside)
            raise ValueError(
                f"line {line}: {{% generation %}} is inside a macro, a call, a filter, a set block, a recursive loop "
                "or another {% generation %}, where transformers marks the wrong tokens; move it out"
            )
        found = found or bool(blocks)
    return found


def _is_generation(block: nodes.CallBlock) -> bool:
    called = getattr(block.call, "node", None)
    return isinstance(called, nodes.ExtensionAttribute) and called.name == "_generation_support"


def _is_rendered(part: str, text: str) -> bool:
    """True if the text shows the part: as it is, or written as JSON or HTML writes it."""
    part = part.strip()
    written = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1], html.escape(part))
    words = re.findall(r"\w{4,}", part)[:20]
    return any(form in text for form in written) or bool(words) and all(word in text for word in words)


@contextlib.contextmanager
def bounds(seconds: float, num_bytes: int) -> Iterator[None]:
    """Raise TimeoutError in the block after so much time, and MemoryError for so much more memory.

    Python code between two bytecodes is interrupted, a single long call is not (`check_that_it_ends` is for that). Only
    the main thread has signals; a stream's thread runs without these bounds, after the first rows were read with them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def out_of_time(*_):
        raise TimeoutError(f"it took more than {seconds} s")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + num_bytes
    before = signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft == resource.RLIM_INFINITY else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def check_that_it_ends(tokenizer: PreTrainedTokenizerBase, setting: str) -> None:
    """Raises UserError if the template does not end on a small chat. A real chat may have what this one lacks."""

    def render() -> None:
        with bounds(2 * MAX_TRIAL_S, MAX_RENDER_BYTES):
            chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            tokenizer.apply_chat_template(chat, tokenize=False)

    if not ends_within(MAX_TRIAL_S, render):
        raise UserError(f"{setting}: it did not end in {MAX_TRIAL_S} s for a chat of two words; mend its loops")
