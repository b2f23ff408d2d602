"""One example to token ids and labels: plain text, prompt and completion, instructions, chats.

Labels are the token ids where a token is trained and IGNORE_INDEX where it is only read. A prompt is tokenized as it
will be at inference, where it stands alone.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_dist.config import TrainConfig
from lora_dist.data.tasks import IGNORE_INDEX
from lora_dist.embedded import model_path
from lora_dist.errors import UserError, require

COLUMNS = {
    "text": ("text",), "prompt_completion": ("prompt", "completion"), "alpaca": ("instruction", "output"),
    "messages": ("messages",),
}  # fmt: skip
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

Encoded = tuple[list[int], list[int]]  # token ids, labels


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """A base's tokenizer, with the template of a Jinja file. Raises UserError where it cannot be had, or lacks eos."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_name_or_path {name}: its tokenizer cannot be loaded: {str(error).strip().splitlines()[0]}"
        ) from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model_name_or_path {name}: its tokenizer has no eos token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked in attention and loss: any id will do
    if chat_template:
        try:
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"--chat_template {chat_template}: cannot be read: {error.strerror}") from None
    return tokenizer


def choose_format(columns: list[str], config: TrainConfig) -> str:
    """`--dataset_format`, or what the columns' names tell. Raises UserError where a column it needs is missing."""
    has = f"{config.dataset_name} has {', '.join(columns)}"
    field, wanted = config.dataset_text_field, config.dataset_format
    if field is not None:
        require(field in columns, "dataset_text_field", field, f"no such column: {has}")
        require(
            wanted in ("auto", "text"), "dataset_text_field", field, f"has no effect with --dataset_format {wanted}"
        )
        return "text"
    fitting = [name for name, needed in COLUMNS.items() if all(_column(c, columns) for c in needed)]
    if wanted == "auto":
        hint = "name a text column with --dataset_text_field, or rename columns with --rename_columns"
        known = "; ".join(", ".join(needed) for needed in COLUMNS.values())
        require(fitting, "dataset_format", wanted, f"{has}, which is none of: {known}; {hint}")
        return fitting[0]
    needs = " and ".join(COLUMNS[wanted])
    require(wanted in fitting, "dataset_format", wanted, f"needs {needs}, but {has}; use --rename_columns OLD=NEW")
    return wanted


def _column(name: str, columns: list[str]) -> str | None:
    """ShareGPT's data call messages conversations."""
    names = (name, "conversations") if name == "messages" else (name,)
    return next((c for c in names if c in columns), None)


@dataclass(frozen=True)
class Document:
    """One example, read: a text, or a prompt and its completion, or a chat."""

    row: int  # from 1, as users count
    parts: tuple[str, ...] = ()  # a text alone, or prompt and completion
    chat: tuple[dict, ...] = ()  # messages with role and content
    num_given: int = 0  # messages that are the prompt's
    labels: object = None  # its class, or classes, as the data name them

    @property
    def text(self) -> str:
        return "".join(self.parts) or "".join(message["content"] for message in self.chat)

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to learn in it: no text, or a prompt that nothing completes."""
        uncompleted = self.labels is None and len(self.parts) == 2 and not self.parts[1].strip()
        return uncompleted or not self.text.strip()


class Encoder:
    """Reads examples of one format, and turns them into token ids and labels."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, columns: list[str]):
        self.tokenizer, self.config, template = tokenizer, config, tokenizer.chat_template
        self.format = choose_format(columns, config)
        self.marks_assistant = bool(template and re.search(r"\{%-?\s*generation\b", str(template)))
        if self.format == "messages":
            self._require_template(self.format)
        target = config.task_type == "SEQ_2_SEQ_LM"
        why = "cannot be had with --task_type SEQ_2_SEQ_LM, which needs a prompt and a completion"
        require(not target or self.format in ("prompt_completion", "alpaca"), "dataset_format", self.format, why)
        unread = config.chat_template and self.format == "text"
        require(not unread, "chat_template", config.chat_template, "has no effect on texts")

    def read(self, example: dict, row: int) -> Document:
        """Raises UserError naming the row where a column does not hold what the format says."""
        if self.format == "text":
            return Document(row, (self._text(example, self.config.dataset_text_field or "text", row),))
        if self.format == "messages":
            column = _column("messages", list(example))
            return Document(row, chat=self._messages(example[column], column, row))
        if self.format == "alpaca":
            return self._instruction(example, row)
        if isinstance(example["prompt"], str | None):
            return Document(row, (self._text(example, "prompt", row), self._text(example, "completion", row)))
        self._require_template("prompt_completion")
        given = self._messages(example["prompt"], "prompt", row)
        return Document(
            row, chat=given + self._messages(example["completion"], "completion", row), num_given=len(given)
        )

    def __call__(self, documents: list[Document]) -> list[Encoded]:
        """(ids, labels) of each, of any length. Raises UserError naming the row where a chat cannot be rendered."""
        if self.format == "text":
            return [self._closed(ids, ids) for ids in self._ids([document.text for document in documents])]
        if all(document.parts for document in documents):
            pairs = [document.parts for document in documents]
            return self._targets(pairs) if self.config.task_type == "SEQ_2_SEQ_LM" else self._pairs(pairs)
        return [self._chat(document) for document in documents]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, verbose=False)["input_ids"] if texts else []

    def _closed(self, ids: list[int], labels: list[int]) -> Encoded:
        """With eos at the end, so that the model learns where a text ends."""
        eos = self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == eos:  # some tokenizers add it
            return ids, labels
        return [*ids, eos], [*labels, eos]

    def _pairs(self, pairs: list[tuple[str, ...]]) -> list[Encoded]:
        prompts = self._ids([prompt for prompt, _ in pairs])
        whole = self._ids([prompt + answer for prompt, answer in pairs])
        rows = []
        for (_, answer), prompt, ids in zip(pairs, prompts, whole, strict=True):
            if len(prompt) > 1 and prompt[-1] == self.tokenizer.eos_token_id:
                prompt = prompt[:-1]
            if ids[: len(prompt)] != prompt:  # a token would reach from the prompt into the completion
                ids = prompt + self.tokenizer(answer, add_special_tokens=False)["input_ids"]
            num_read = 0 if self.config.train_on_inputs else len(prompt)
            rows.append(self._closed(ids, [IGNORE_INDEX] * num_read + ids[num_read:]))
        return rows

    def _targets(self, pairs: list[tuple[str, ...]]) -> list[Encoded]:
        """The prompt for the encoder, the completion as labels."""
        prompts, targets = (self._ids([pair[side] for pair in pairs]) for side in (0, 1))
        return [(ids, self._closed(target, target)[1]) for ids, target in zip(prompts, targets, strict=True)]

    def _chat(self, document: Document) -> Encoded:
        chat, given = list(document.chat), document.chat[: document.num_given]
        if self.config.train_on_inputs:
            ids = self.tokenizer(self._render(chat, document.row), add_special_tokens=False)["input_ids"]
            return self._closed_chat(ids, ids)
        if self.marks_assistant and not any(message["role"] == "assistant" for message in given):
            encoded = self.tokenizer.apply_chat_template(
                chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, trained = encoded["input_ids"], encoded["assistant_masks"]
        else:
            text = self._render(chat, document.row)
            spans = list(self._assistant_spans(document, text))
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids = encoded["input_ids"]
            trained = [any(a <= start < end <= b for a, b in spans) for start, end in encoded["offset_mapping"]]
        if ids and all(trained):
            raise self._malformed(document.row, "the chat template marks every token as the assistant's")
        labels = [token if is_trained else IGNORE_INDEX for token, is_trained in zip(ids, trained, strict=True)]
        return self._closed_chat(ids, labels)

    def _assistant_spans(self, document: Document, text: str) -> Iterator[tuple[int, int]]:
        """Where in the rendered `text` the assistant speaks: from where it is asked to, to the end of its turn.

        A template without {% generation %} tells this only if the rendering of the first turns opens that of all.
        """
        special = tuple(token.content for token in self.tokenizer.added_tokens_decoder.values())
        for i, message in enumerate(document.chat):
            if message["role"] != "assistant" or i < max(1, document.num_given):  # an opening turn answers nothing
                continue
            before = self._render(document.chat[:i], document.row, ask=True)
            through = self._render(document.chat[: i + 1], document.row)
            if not (through.startswith(before) and text.startswith(through)):
                raise self._malformed(
                    document.row,
                    f"the chat template writes turn {i + 1} otherwise when more follows, so the assistant's tokens "
                    "cannot be told; give a --chat_template with {% generation %}, or --train_on_inputs true",
                )
            closed = through.rstrip()
            # No line feed after the token that ends a turn: generation stops before it.
            yield len(before), len(closed) if closed.endswith(special) else len(through)

    def _closed_chat(self, ids: list[int], labels: list[int]) -> Encoded:
        """Most templates end with a special token, perhaps a line feed behind it; after others comes eos."""
        last = next((token for token in reversed(ids) if not self.tokenizer.decode([token]).isspace()), None)
        if last is None or last in self.tokenizer.added_tokens_decoder or labels[-1] == IGNORE_INDEX:
            return ids, labels
        return self._closed(ids, labels)

    def _render(self, chat, row: int, *, ask: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(list(chat), tokenize=False, add_generation_prompt=ask)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise self._malformed(row, f"the chat template refuses it: {error}") from None

    def _instruction(self, example: dict, row: int) -> Document:
        """As a chat where the tokenizer has a template, under headings where it has none."""
        instruction, output = (self._text(example, column, row) for column in ("instruction", "output"))
        more = self._text(example, "input", row) if "input" in example else ""
        if self.tokenizer.chat_template:
            asked = {"role": "user", "content": f"{instruction}\n\n{more}" if more else instruction}
            return Document(row, chat=(asked, {"role": "assistant", "content": output}), num_given=1)
        given = f"\n\n### Input:\n{more}" if more else ""
        return Document(row, (f"### Instruction:\n{instruction}{given}\n\n### Response:\n", output))

    def _text(self, example: dict, column: str, row: int) -> str:
        value = example[column]
        if value is not None and not isinstance(value, str):
            raise self._malformed(row, f"{column} holds a {type(value).__name__}, not text")
        return value or ""

    def _messages(self, value, column: str, row: int) -> tuple[dict, ...]:
        messages = []
        for number, message in enumerate(value if isinstance(value, list) else (), 1):
            message = message if isinstance(message, dict) else {}
            role = message.get("role") or message.get("from")
            content = message.get("content") or message.get("value") or ""
            if not isinstance(role, str) or not isinstance(content, str):
                raise self._malformed(row, f"message {number} of {column} needs a role and content (from and value)")
            messages.append({"role": SHAREGPT_ROLES.get(role, role), "content": content})
        return tuple(messages)

    def _require_template(self, format: str) -> None:
        name, tokenizer = self.config.model_name_or_path, self.tokenizer
        require(tokenizer.chat_template, "dataset_format", format, f"{name} has no chat template; give --chat_template")
        require(tokenizer.is_fast, "dataset_format", format, f"{name} has no fast tokenizer, which chats need")

    def _malformed(self, row: int, what: str) -> UserError:
        return UserError(f"--dataset_name {self.config.dataset_name}: row {row}: {what}")


def marked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> str:
    """A row decoded, with ⟦ and ⟧ around what is trained."""
    parts = []
    for trained, tokens in groupby(zip(ids, labels, strict=True), lambda pair: bool(pair[1] != IGNORE_INDEX)):
        text = tokenizer.decode([token for token, _ in tokens])
        parts.append(f"⟦{text}⟧" if trained else text)
    return "".join(parts)
