"""A small base model, quotes and complaints that ship with the package, so that training needs no download.

`build.py` makes them (`python -m lora_dist.embedded.build`); `text.py` is the grammar that generates all their text.
"""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "opt"  # a small OPTForCausalLM with its tokenizer
QUOTES_DIR = Path(__file__).parent / "quotes"  # train.jsonl and test.jsonl: quote, author, tags
COMPLAINTS_DIR = Path(__file__).parent / "complaints"  # train.jsonl and test.jsonl: Tweet text, Label (as RAFT)
EMBEDDED = "embedded"  # stands for the base in --model_name_or_path, and for the quotes in --dataset_name
EMBEDDED_COMPLAINTS = "embedded/complaints"


def model_path(name: str) -> str:
    """The directory or hub name that the value of --model_name_or_path stands for.

    A directory is absolute: an adapter records it as its base, and may be loaded from another working directory.
    """
    if name == EMBEDDED:
        return str(BASE_DIR)
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def dataset_dir(name: str) -> Path | None:
    """The directory with train.jsonl and test.jsonl, if this value of --dataset_name is an embedded data set."""
    return {EMBEDDED: QUOTES_DIR, EMBEDDED_COMPLAINTS: COMPLAINTS_DIR}.get(name)
