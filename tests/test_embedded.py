"""The base and the quotes that ship with the package are what their script makes, and fit for the recipe."""

import json
import random
import statistics

from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_dist.embedded import BASE_DIR, COMPLAINTS_DIR, PREFERENCES_DIR, QUOTES_DIR, build
from lora_dist.embedded.text import prose, quote


def read(split):
    return [json.loads(line) for line in (QUOTES_DIR / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_together_they_are_small():
    files = [*BASE_DIR.iterdir(), *QUOTES_DIR.iterdir()]
    assert sum(file.stat().st_size for file in files) <= 8_000_000


def test_the_quotes_are_what_the_script_writes(tmp_path):
    build.write_quotes(tmp_path)
    for split in ("train", "test"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (QUOTES_DIR / f"{split}.jsonl").read_bytes()


def test_the_tokenizer_is_what_the_script_trains():
    rng, quote_rng = random.Random(build.SEED + 1), random.Random(build.SEED + 2)
    documents = [prose(rng) for _ in range(10_000)]
    trained = build.train_tokenizer(documents + [quote(quote_rng)["quote"] for _ in range(3_000)])
    shipped = AutoTokenizer.from_pretrained(BASE_DIR)
    assert trained.get_vocab() == shipped.get_vocab()
    assert trained(documents[:20])["input_ids"] == shipped(documents[:20])["input_ids"]


def test_the_quotes_are_like_english_quotes():
    train, test = read("train"), read("test")
    assert len(train) >= 2000 and len(test) >= 100
    assert not {row["quote"] for row in train} & {row["quote"] for row in test}
    assert len({row["quote"] for row in train}) == len(train)
    assert all(row.keys() == {"quote", "author", "tags"} and row["tags"] for row in train)
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    lengths = [len(ids) for ids in tokenizer([row["quote"] for row in train])["input_ids"]]
    assert sum(10 <= n <= 60 for n in lengths) > 0.8 * len(lengths)
    assert 10 <= sum(n > 200 for n in lengths) < 0.05 * len(lengths)
    assert 25 < statistics.mean(lengths) < 45


def test_the_base_is_a_real_opt_with_opts_special_tokens():
    model = AutoModelForCausalLM.from_pretrained(BASE_DIR)
    assert type(model).__name__ == "OPTForCausalLM"
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tokenizer = AutoTokenizer.from_pretrained(BASE_DIR)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2, 2)
    assert tokenizer("a")["input_ids"][0] == 2
    assert model.config.vocab_size == len(tokenizer)


def test_the_complaints_are_what_the_script_writes(tmp_path):
    build.write_complaints(tmp_path)
    for split in ("train", "test"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (COMPLAINTS_DIR / f"{split}.jsonl").read_bytes()
        rows = [json.loads(line) for line in (COMPLAINTS_DIR / f"{split}.jsonl").read_text().splitlines()]
        assert 0.4 < statistics.mean(row["Label"] == "complaint" for row in rows) < 0.6


def test_the_preferences_are_what_the_script_writes(tmp_path):
    build.write_preferences(tmp_path)
    rows = {}
    for split in ("train", "test"):
        assert (tmp_path / f"{split}.jsonl").read_bytes() == (PREFERENCES_DIR / f"{split}.jsonl").read_bytes()
        rows[split] = [json.loads(line) for line in (PREFERENCES_DIR / f"{split}.jsonl").read_text().splitlines()]
        assert all(row.keys() == {"prompt", "chosen", "rejected"} for row in rows[split])
    assert (len(rows["train"]), len(rows["test"])) == (80, 40)
    assert not {row["prompt"] for row in rows["train"]} & {row["prompt"] for row in rows["test"]}
