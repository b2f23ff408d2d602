"""Pairs of a chosen and a rejected answer, in the forms that TRL's data sets have.

The prompt is a column of its own, or the beginning that both answers share. Answers are texts or lists of messages.
"""

import dataclasses

from lora_dist.data.chats import Chat, read_chat
from lora_dist.errors import UserError

ANSWERS = ("chosen", "rejected")


def has_chats(example: dict, where: str) -> bool:
    """True if the answers are messages. Raises UserError if one is a text and the other is not."""
    for column in ("prompt", *ANSWERS):
        value = example.get(column)
        if not isinstance(value, str | list | dict | None):
            kind = type(value).__name__
            raise UserError(f"{where}: column {column} holds a {kind}; it must hold text or a list of messages")
    kinds = {isinstance(example[column], str) for column in ANSWERS if example[column] is not None}
    if len(kinds) > 1:
        raise UserError(f"{where}: one of chosen and rejected is a text and the other is not; make them alike")
    return kinds == {False}


def split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen answer, rejected answer) of two texts that begin with their prompt.

    The prompt is the longest beginning that they share and that ends before white space, which belongs to the answer:
    so no word is cut.
    """
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    while shared and not chosen[shared - 1].isspace():
        shared -= 1
    prompt = chosen[:shared].rstrip()
    return prompt, chosen[len(prompt) :], rejected[len(prompt) :]


def read_chats(example: dict, where: str) -> list[Chat]:
    """The chat of the chosen answer and that of the rejected one. Raises UserError.

    A column "prompt" that is a text repeats what the answers begin with, as in HuggingFaceH4/ultrafeedback_binarized.
    """
    if isinstance(example.get("prompt"), list | dict):
        return [read_chat(example, ("prompt", column), where) for column in ANSWERS]
    chats = [read_chat(example, (column,), where) for column in ANSWERS]
    pairs = zip(*(chat.messages for chat in chats), strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(chat.messages) for chat in chats))
    if not shared and all(chat.messages for chat in chats):
        why = "chosen and rejected share no first message; give the prompt in both, or a column prompt with messages"
        raise UserError(f"{where}: {why}")
    return [dataclasses.replace(chat, num_given=shared) for chat in chats]
