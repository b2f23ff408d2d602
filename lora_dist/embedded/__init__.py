"""The base model and the quotes that ship with the package, so that training runs with no download.

`build.py` makes them (`python -m lora_dist.embedded.build`); `text.py` is the grammar both are written with.
"""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "opt"  # a small OPTForCausalLM with its tokenizer
QUOTES_DIR = Path(__file__).parent / "quotes"  # train.jsonl and test.jsonl: quote, author, tags
COMPLAINTS_DIR = Path(__file__).parent / "complaints"  # the same of RAFT's tweet complaints: Tweet text, Label
EMBEDDED = "embedded"  # the name that --model_name_or_path and --dataset_name take for them

EMBEDDED_COMPLAINTS = "embedded/complaints"


def model_path(name: str) -> str:
    """The directory or hub name that a --model_name_or_path stands for."""
    return str(BASE_DIR) if name == EMBEDDED else name


def dataset_dir(name: str) -> Path | None:
    """The directory of train.jsonl and test.jsonl that a --dataset_name stands for, if it is an embedded one."""
    return {EMBEDDED: QUOTES_DIR, EMBEDDED_COMPLAINTS: COMPLAINTS_DIR}.get(name)
