"""A small base model, quotes, complaints and preferences that ship with the package, so that no download is needed.

`build.py` makes them (`python -m lora_dist.embedded.build`); `text.py` is the grammar that generates all their text.
"""

from pathlib import Path

BASE_DIR = Path(__file__).parent / "opt"  # a small OPTForCausalLM with its tokenizer
QUOTES_DIR = Path(__file__).parent / "quotes"  # train.jsonl and test.jsonl: quote, author, tags
COMPLAINTS_DIR = Path(__file__).parent / "complaints"  # train.jsonl and test.jsonl: Tweet text, Label (as RAFT)
PREFERENCES_DIR = Path(__file__).parent / "preferences"  # train.jsonl and test.jsonl: prompt, chosen, rejected (as TRL)
EMBEDDED = "embedded"  # stands for the base in --model_name_or_path, and for the quotes in --dataset_name
EMBEDDED_COMPLAINTS, EMBEDDED_PREFERENCES = "embedded/complaints", "embedded/preferences"


def model_path(name: str) -> str:
    """The directory or hub name that the value of --model_name_or_path stands for.

    A directory is absolute: an adapter records it as its base, and may be loaded from another working directory.
    """
    if name == EMBEDDED:
        return str(BASE_DIR)
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def dataset_dir(name: str) -> Path | None:
    """The directory with train.jsonl and test.jsonl, if this value of --dataset_name is an embedded data set."""
    folders = {EMBEDDED: QUOTES_DIR, EMBEDDED_COMPLAINTS: COMPLAINTS_DIR, EMBEDDED_PREFERENCES: PREFERENCES_DIR}
    return folders.get(name)
