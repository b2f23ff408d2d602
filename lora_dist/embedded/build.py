"""Makes what ships in this package: `python -m lora_dist.embedded.build [OUTPUT_DIR]` (about 10 minutes on 2 cores).

1. Quotes, with the columns of english_quotes: 2,400 to train on and 200 held out, none in both. Complaints, with the
   columns of RAFT's tweet complaints: 400 and 100. Preferences, which are pairs of replies to complaints: 80 and 40.
2. A byte-level BPE tokenizer with OPT's special tokens (`</s>` opens every text, `<pad>` is 1).
3. A 4-layer OPT. It is pretrained on generated prose, and saved as fp16 safetensors, because facebook/opt-* are fp16.

The same seed on the same kind of machine gives the same bytes. Pretraining uses dropout 0; the saved config has OPT's
0.1.
"""

import json
import math
import random
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from lora_dist.embedded.text import complaint, preference, prose, quote

SEED = 20240601
NUM_TRAIN_QUOTES, NUM_TEST_QUOTES = 2400, 200
NUM_TRAIN_COMPLAINTS, NUM_TEST_COMPLAINTS = 400, 100
NUM_TRAIN_PREFERENCES, NUM_TEST_PREFERENCES = 80, 40
NUM_DOCUMENTS, NUM_STEPS, BATCH_SEQUENCES, SEQUENCE_TOKENS = 60_000, 600, 32, 256
LEARNING_RATE, WARMUP_STEPS, WEIGHT_DECAY, LABEL_SMOOTHING = 3e-3, 60, 0.1, 0.05
SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's ids: pad 1, bos and eos 2


def write_quotes(folder: Path) -> None:
    rng, rows = random.Random(SEED), {}
    while len(rows) < NUM_TRAIN_QUOTES + NUM_TEST_QUOTES:
        row = quote(rng)
        rows.setdefault(row["quote"], row)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows.values()]
    rng.shuffle(lines)  # the quotes that were found last are rarer: spread them over both splits
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(lines[:NUM_TRAIN_QUOTES]) + "\n", encoding="utf-8")
    (folder / "test.jsonl").write_text("\n".join(lines[NUM_TRAIN_QUOTES:]) + "\n", encoding="utf-8")


def write_complaints(folder: Path) -> None:
    _write_rows(folder, complaint, SEED + 3, "Tweet text", NUM_TRAIN_COMPLAINTS, NUM_TEST_COMPLAINTS)


def write_preferences(folder: Path) -> None:
    _write_rows(folder, preference, SEED + 4, "prompt", NUM_TRAIN_PREFERENCES, NUM_TEST_PREFERENCES)


def _write_rows(
    folder: Path, make: Callable[[random.Random], dict], seed: int, column: str, num_train: int, num_test: int
) -> None:
    """train.jsonl and test.jsonl of rows that differ in this column."""
    rng, rows = random.Random(seed), {}
    while len(rows) < num_train + num_test:
        row = make(rng)
        rows.setdefault(row[column], row)
    lines = [json.dumps(row) for row in rows.values()]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(lines[:num_train]) + "\n")
    (folder / "test.jsonl").write_text("\n".join(lines[num_train:]) + "\n")


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2048, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        model_max_length=512,
    )


def pretrain(model: OPTForCausalLM, tokens: torch.Tensor) -> None:
    """Train the model in place. `tokens`: int64, all documents one after another, each opened by `</s>`."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    generator = torch.Generator().manual_seed(SEED)
    for step in range(NUM_STEPS):
        decay = 0.5 * (1 + math.cos(math.pi * step / NUM_STEPS))
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / WARMUP_STEPS) * decay
        starts = torch.randint(len(tokens) - SEQUENCE_TOKENS, (BATCH_SEQUENCES,), generator=generator).tolist()
        input_ids = torch.stack([tokens[s : s + SEQUENCE_TOKENS] for s in starts])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=input_ids).logits
        # Label smoothing keeps the base from ruling words out, so that it can still learn another style of text.
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten(), label_smoothing=LABEL_SMOOTHING
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == NUM_STEPS - 1:
            print(f"step {step} loss {loss.item():.3f}", flush=True)


def main(output_dir: Path) -> None:
    torch.set_num_threads(2)
    torch.manual_seed(SEED)
    write_quotes(output_dir / "quotes")
    write_complaints(output_dir / "complaints")
    write_preferences(output_dir / "preferences")
    rng = random.Random(SEED + 1)
    documents = [prose(rng) for _ in range(NUM_DOCUMENTS)]
    # The tokenizer must know the words of quotes, but not from the data set's own: these are other quotes.
    quote_rng = random.Random(SEED + 2)
    tokenizer = train_tokenizer(documents[:10_000] + [quote(quote_rng)["quote"] for _ in range(3_000)])
    tokens = torch.tensor([token for ids in tokenizer(documents)["input_ids"] for token in ids])
    print(f"{len(tokens)} tokens of prose")
    config = OPTConfig(
        vocab_size=len(tokenizer), hidden_size=192, word_embed_proj_dim=192, ffn_dim=768, num_hidden_layers=4,
        num_attention_heads=3, max_position_embeddings=512, dropout=0.0,
    )  # fmt: skip
    model = OPTForCausalLM(config)
    pretrain(model, tokens)
    model.config.dropout = OPTConfig().dropout
    model.half().save_pretrained(output_dir / "opt")
    tokenizer.save_pretrained(output_dir / "opt")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
