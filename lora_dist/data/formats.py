"""Formats of examples, and how each becomes token ids and labels: texts, completions, instructions, chats, pairs.

An example is one record of the data set. A label is the token's own id if the token is trained, and IGNORE_INDEX if it
is only read. A prompt is tokenized as it will be at inference, where it stands alone.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lora_dist.boundary import boundary, read_text
from lora_dist.config import TrainConfig
from lora_dist.data.chat_template import ChatTemplate, Encoded
from lora_dist.data.chats import OTHER_COLUMNS, Chat, read_chat
from lora_dist.data.preference import pairs
from lora_dist.data.tasks import IGNORE_INDEX
from lora_dist.embedded import model_path
from lora_dist.errors import UserError, require

COLUMNS = {  # that a format needs; "preference" needs those of `pairs.ANSWERS`
    "text": ("text",), "prompt_completion": ("prompt", "completion"), "alpaca": ("instruction", "output"),
    "messages": ("messages",),
}  # fmt: skip


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base, with the chat template in a Jinja file if one is named.

    Raises UserError if tokenizer or file cannot be read, or if the tokenizer has no eos token.
    """
    with boundary(f"--model_name_or_path {name}: its tokenizer cannot be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(model_path(name), trust_remote_code=False)
        with _no_text_of_panics():
            text = tokenizer.decode(tokenizer("A text.").input_ids, skip_special_tokens=True)  # some damage shows here
        if not text:  # without its files, transformers makes one that knows no word
            raise UserError(f"--model_name_or_path {name}: its tokenizer knows no word; its files may be missing")
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"--model_name_or_path {name}: its tokenizer has no eos token; training needs one to end each text"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # any id will do: padding is masked in attention and loss
    if chat_template:
        tokenizer.chat_template = read_text(chat_template, f"--chat_template {chat_template}")
    return tokenizer


@contextlib.contextmanager
def _no_text_of_panics() -> Iterator[None]:
    """A panic of the tokenizers library is written to the file descriptor of stderr before it is raised."""
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


def choose_format(columns: list[str], config: TrainConfig) -> str:
    """`--dataset_format`; if it is "auto", the format that the columns belong to.

    Raises UserError if the data set lacks a column that the format needs.
    """
    has = f"{config.dataset_name} has {', '.join(columns)}"
    field, wanted = config.dataset_text_field, config.dataset_format
    has_answers = all(column in columns for column in pairs.ANSWERS)
    if config.has_pairs:
        why = f"has no effect with --loss_type {config.loss_type}, which needs pairs"
        require(wanted in ("auto", "preference"), "dataset_format", wanted, why)
        require(field is None, "dataset_text_field", field, why)
        why = f"needs columns chosen and rejected, but {has}; use --rename_columns OLD=NEW"
        require(has_answers, "loss_type", config.loss_type, why)
        return "preference"
    why = "needs a loss of pairs; give --loss_type sigmoid, or use recipes/dpo.py"
    require(wanted != "preference", "dataset_format", wanted, why)
    if field is not None:
        require(field in columns, "dataset_text_field", field, f"no such column: {has}")
        why = f"has no effect with --dataset_format {wanted}"
        require(wanted in ("auto", "text"), "dataset_text_field", field, why)
        return "text"
    possible = [name for name, needed in COLUMNS.items() if all(_find_column(c, columns) for c in needed)]
    if wanted == "auto":
        hint = "name a text column with --dataset_text_field, or rename columns with --rename_columns"
        hint = "these are pairs: give --loss_type sigmoid, or use recipes/dpo.py" if has_answers else hint
        known = "; ".join(", ".join(needed) for needed in COLUMNS.values())
        require(possible, "dataset_format", wanted, f"{has}, which is none of: {known}; {hint}")
        return min(possible, key=lambda name: name == "text")  # last: as text, the prompts would be trained too
    needs = " and ".join(COLUMNS[wanted])
    require(wanted in possible, "dataset_format", wanted, f"needs {needs}, but {has}; use --rename_columns OLD=NEW")
    return wanted


def _find_column(name: str, columns: list[str]) -> str | None:
    """The column of this name, or None. In ShareGPT's data, "messages" are called "conversations"."""
    names = (name, "conversations") if name == "messages" else (name,)
    return next((c for c in names if c in columns), None)


@dataclass(frozen=True)
class Document:
    """One example after its columns were read: either `parts` or `chat` is filled.

    Of a pair, this is the prompt with the chosen answer.
    """

    number: str  # where the example is from, for messages: "line 7", "example 7"
    parts: tuple[str, ...] = ()  # one text; or prompt and completion; TOKEN_CLS: words
    chat: Chat | None = None
    labels: object = None  # of a classifier: the class or the classes, as the data set names them
    rejected: "Document | None" = None  # of a pair: the prompt with the rejected answer

    @property
    def text(self) -> str:
        own = "".join(self.parts) or (self.chat.text if self.chat else "")
        return own + (self.rejected.text if self.rejected else "")

    @property
    def is_empty(self) -> bool:
        """True if there is nothing to learn: no text, or a prompt whose completion is empty."""
        lacks_completion = self.labels is None and len(self.parts) == 2 and not self.parts[1].strip()
        return lacks_completion or not self.text.strip() or bool(self.rejected and self.rejected.is_empty)


class Encoder:
    """Reads examples of one format (`read`), and turns them into token ids and labels (`__call__`)."""

    reads_chats = False  # True as soon as a prompt turns out to be messages

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: TrainConfig, columns: list[str]):
        """`columns`: of the data set. Raises UserError if settings, columns and tokenizer do not fit together."""
        self.tokenizer, self.config, self.columns = tokenizer, config, columns
        self.format = choose_format(columns, config)
        if self.format == "messages":
            self._require_template(self.format)
        has_targets = self.format in ("prompt_completion", "alpaca")
        why = "is not supported with --task_type SEQ_2_SEQ_LM, which needs a prompt and a completion"
        require(config.task_type != "SEQ_2_SEQ_LM" or has_targets, "dataset_format", self.format, why)
        unused = config.chat_template and self.format == "text"
        require(not unused, "chat_template", config.chat_template, "has no effect on texts")

    @property
    def unread(self) -> list[str]:
        """Columns of the data set that this format does not read. To be asked after the examples were read."""
        others = OTHER_COLUMNS if self.reads_chats else ()
        read = {
            "text": [self.config.dataset_text_field or "text"], "alpaca": ["instruction", "input", "output"],
            "messages": [_find_column("messages", self.columns), *OTHER_COLUMNS],
            "prompt_completion": ["prompt", "completion", *others], "preference": ["prompt", *pairs.ANSWERS, *others],
            "classes": [self.config.dataset_text_field or "text", self.config.dataset_label_field],
        }[self.format]  # fmt: skip
        return [column for column in self.columns if column not in read]

    def read(self, example: dict, number: str) -> Document:
        """`number`: where the example is from. Raises UserError if a column does not hold what the format needs."""
        if self.format == "text":
            return Document(number, (self._text(example, self.config.dataset_text_field or "text", number),))
        if self.format == "messages":
            return self._chat(example, (_find_column("messages", self.columns),), number)
        if self.format == "alpaca":
            return self._instruction(example, number)
        if self.format == "preference":
            return self._pair(example, number)
        if not any(isinstance(example[column], list | dict) for column in COLUMNS["prompt_completion"]):
            return Document(number, (self._text(example, "prompt", number), self._text(example, "completion", number)))
        self._require_template("prompt_completion")
        self.reads_chats = True
        return self._chat(example, ("prompt", "completion"), number)

    def __call__(self, documents: list[Document]) -> list[Encoded]:
        """(token ids, labels) of each document, of any length; of a pair two, the chosen one first.

        Raises UserError if a chat cannot be rendered.
        """
        if self.format == "text":
            return [self._with_eos(ids, ids) for ids in self._tokenize([document.text for document in documents])]
        if self.format == "preference":
            documents = [half for document in documents for half in (document, document.rejected)]
        parts = [document.parts for document in documents if not document.chat]
        chats = [document for document in documents if document.chat]
        encode = self._targets if self.config.task_type == "SEQ_2_SEQ_LM" else self._completions
        encoded_parts, encoded_chats = iter(encode(parts) if parts else []), iter(self._encode_chats(chats))
        return [next(encoded_chats if document.chat else encoded_parts) for document in documents]

    def _encode_chats(self, documents: list[Document]) -> list[Encoded]:
        if not documents:
            return []
        places = [self._where(document.number) for document in documents]
        return self.template.encode([document.chat for document in documents], places)

    def _tokenize(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text. What the tokenizer adds is there once, even if the text begins or ends with it."""
        if not texts:
            return []
        encoded = self.tokenizer(texts, verbose=False, add_special_tokens=add_special_tokens)["input_ids"]
        return [_without_twins(ids, *self._added) for ids in encoded] if add_special_tokens else encoded

    @cached_property
    def _added(self) -> tuple[int | None, int | None]:
        return _added_tokens(self.tokenizer)

    def _with_eos(self, ids: list[int], labels: list[int]) -> Encoded:
        """Add a trained eos token, so that the model learns where a text ends."""
        eos = self.tokenizer.eos_token_id
        if len(ids) > 1 and ids[-1] == eos:  # some tokenizers add it themselves
            return ids, labels
        return [*ids, eos], [*labels, eos]

    def _completions(self, pairs: list[tuple[str, ...]]) -> list[Encoded]:
        """Prompt and completion as one sequence, of which the completion is trained."""
        prompts = self._tokenize([prompt for prompt, _ in pairs])
        joined = self._tokenize([prompt + completion for prompt, completion in pairs])
        if self._added[1] is not None:
            written = [prompt.endswith(self.tokenizer.eos_token) for prompt, _ in pairs]
            prompts = [ids if its_own else ids[:-1] for ids, its_own in zip(prompts, written, strict=True)]
        # If a token would reach from the prompt into the completion, the completion is tokenized by itself.
        apart = [i for i, prompt in enumerate(prompts) if joined[i][: len(prompt)] != prompt]
        completions = self._tokenize([pairs[i][1] for i in apart], add_special_tokens=False)
        for i, completion in zip(apart, completions, strict=True):
            joined[i] = prompts[i] + completion
        encoded = []
        for prompt, ids in zip(prompts, joined, strict=True):
            num_untrained = 0 if self.config.train_on_inputs else len(prompt)
            encoded.append(self._with_eos(ids, [IGNORE_INDEX] * num_untrained + ids[num_untrained:]))
        return encoded

    def _targets(self, pairs: list[tuple[str, ...]]) -> list[Encoded]:
        """SEQ_2_SEQ_LM: the token ids are the prompt's, for the encoder, and the labels are the completion's."""
        prompts, targets = (self._tokenize([pair[side] for pair in pairs]) for side in (0, 1))
        return [(ids, self._with_eos(target, target)[1]) for ids, target in zip(prompts, targets, strict=True)]

    def _pair(self, example: dict, number: str) -> Document:
        where = self._where(number)
        if pairs.has_chats(example, where):
            self._require_template("preference")
            self.reads_chats = True
            chosen, rejected = (Document(number, chat=chat) for chat in pairs.read_chats(example, where))
        else:
            chosen, rejected = (self._text(example, column, number) for column in pairs.ANSWERS)
            if "prompt" in self.columns:
                prompt = self._text(example, "prompt", number)
            else:
                prompt, chosen, rejected = pairs.split_texts(chosen, rejected)
            chosen, rejected = (Document(number, (prompt, answer)) for answer in (chosen, rejected))
        return dataclasses.replace(chosen, rejected=rejected)

    def _instruction(self, example: dict, number: str) -> Document:
        """An instruction becomes a chat if the tokenizer has a chat template, and text with headings if it has none."""
        instruction, output = (self._text(example, column, number) for column in ("instruction", "output"))
        context = self._text(example, "input", number) if "input" in example else ""
        if self.tokenizer.chat_template:
            question = {"role": "user", "content": f"{instruction}\n\n{context}" if context else instruction}
            chat = Chat((question, {"role": "assistant", "content": output}), (False, True), num_given=1)
            return Document(number, chat=chat)
        section = f"\n\n### Input:\n{context}" if context else ""
        return Document(number, (f"### Instruction:\n{instruction}{section}\n\n### Response:\n", output))

    def _text(self, example: dict, column: str, number: str) -> str:
        value = example[column]
        if value is not None and not isinstance(value, str):
            remedy = f': write "{value}" in quotes' if isinstance(value, int | float) else ""
            raise self._malformed(number, f"column {column} holds a {type(value).__name__}; it must hold text{remedy}")
        return value or ""

    def _require_template(self, format: str) -> None:
        name, tokenizer = self.config.model_name_or_path, self.tokenizer
        require(tokenizer.chat_template, "dataset_format", format, f"{name} has no chat template; give --chat_template")
        require(tokenizer.is_fast, "dataset_format", format, f"{name} has no fast tokenizer, which chats need")

    def _chat(self, example: dict, columns: tuple[str, ...], number: str) -> Document:
        return Document(number, chat=read_chat(example, columns, self._where(number)))

    @cached_property
    def template(self) -> ChatTemplate:
        """Raises UserError if the template does not end."""
        file, config = self.config.chat_template, self.config
        setting = f"--chat_template {file}" if file else f"the chat template of {config.model_name_or_path}"
        return ChatTemplate(self.tokenizer, train_on_inputs=config.train_on_inputs, setting=setting)

    def take_left_out(self) -> list[tuple[str, str]]:
        """(what, where) for what chats held and their rows do not show or train, since the last call."""
        if "template" not in vars(self):
            return []
        found, self.template.left_out = self.template.left_out, []
        return found

    def _where(self, number: str) -> str:
        return f"--dataset_name {self.config.dataset_name}: {number}"

    def _malformed(self, number: str, what: str) -> UserError:
        return UserError(f"{self._where(number)}: {what}")


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Token ids of a prompt to complete, without the spaces at its end: they belong to the token of the next word."""
    return _without_twins(tokenizer(prompt.rstrip(), verbose=False)["input_ids"], *_added_tokens(tokenizer))


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, int | None]:
    """The bos that a tokenizer puts before each text, and the eos that it puts after it; None for what it does not."""
    ids = tokenizer("a", verbose=False)["input_ids"]
    bos, eos = (tokenizer.bos_token_id, ids[0]), (tokenizer.eos_token_id, ids[-1])
    return tuple(token if token == found and len(ids) > 1 else None for token, found in (bos, eos))


def _without_twins(ids: list[int], bos: int | None, eos: int | None) -> list[int]:
    """Without the bos or eos that was added to a text which has one already."""
    ids = ids[1:] if bos is not None and ids[:2] == [bos] * 2 else ids
    return ids[:-1] if eos is not None and ids[-2:] == [eos] * 2 else ids


def mark_trained(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], labels: Sequence[int]) -> str:
    """The text of a row, with ⟦ and ⟧ around the trained tokens."""
    parts = []
    for trained, tokens in groupby(zip(ids, labels, strict=True), lambda pair: bool(pair[1] != IGNORE_INDEX)):
        text = tokenizer.decode([token for token, _ in tokens])
        parts.append(f"⟦{text}⟧" if trained else text)
    return "".join(parts)
