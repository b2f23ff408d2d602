"""Each further recipe on 2 ranks, sharded, few steps; opt_quotes.py has its own tests."""

import json

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

from lora_dist.data.tasks import PAIR_MEASURES
from lora_dist.run.folder import STEP
from lora_dist.tracking.metric_names import METRICS
from tests.helpers.ranks import fork_ranks, launch, launch_recipe

# recipe: (flags, what it prints, metrics of its own)
RECIPES = {
    "sft": (["--max_steps", "6"], ["= 8 sequences a step", "held-out perplexity: 15.0"], []),
    "bloomz_complaints": (
        ["--max_steps", "40"],
        ["embedded/complaints (prompt_completion)", "accuracy: 0.00 base"],
        ["accuracy"],
    ),
    "quotes_tags": (
        ["--max_steps", "8"],
        ["classes: hope, kindness, love", "held-out micro f1: "],
        ["micro_f1", "macro_f1"],
    ),
    "dpo": (["--max_steps", "8"], ["= 8 pairs a step", "reference: computing it for 240 rows"], []),
}


KNOWN = {metric.name.replace("{i}", str(rank)) for metric in METRICS for rank in (0, 1)} | {STEP, "time"}
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}  # as accelerate_configs/ say


@pytest.fixture(scope="module", params=RECIPES)
def run(request, tmp_path_factory):
    """(recipe, folder, what it printed)"""
    flags, *_ = RECIPES[request.param]
    folder = tmp_path_factory.mktemp("runs") / request.param
    flags = [*flags, "--warmup_steps", "2", "--report_to", "none", "--output_dir", str(folder)]
    (code, out, err), (other, *_) = fork_ranks(*flags, recipe=request.param, strategy="fsdp", env=BF16)
    assert (code, other) == (0, 0), err
    return request.param, folder, out


def test_it_trains_sharded_and_scores(run):
    recipe, folder, printed = run
    _, expected, scores = RECIPES[recipe]
    state = json.loads((folder / "state.json").read_text())
    summary = state["summary"]
    assert state["status"] == "completed" and summary["world_size"] == 2 and summary["strategy"] == "fsdp"
    assert summary["base_bytes_per_rank"] < 0.51 * summary["base_bytes_total"]
    assert summary["eval_loss"] < summary["eval_loss_base"]
    assert all(words in printed for words in expected), printed
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for score in scores:
        assert 0 <= summary[f"{score}_base"] <= 1 and 0 <= summary[score] <= 1
        assert metrics[-1][f"eval/{score}"] == summary[score]
    padding = [m["perf/padding_fraction"] for m in metrics if "perf/padding_fraction" in m]
    if recipe in ("sft", "quotes_tags"):  # packed, or grouped by length
        assert sum(padding) / len(padding) < 0.12
    if recipe == "bloomz_complaints":
        assert summary["accuracy"] > 0.3  # at the least it writes one of the two labels
    if recipe == "dpo":
        assert (summary["reward_accuracy_base"], metrics[0]["eval/rewards/margins"]) == (0.0, 0.0)
        assert abs(metrics[1]["train/rewards/margins"]) < 1e-3  # no dropout in the base: the embedded one has 0.1
        assert summary["reward_accuracy"] > 0.9 and f"0.00 base, {summary['reward_accuracy']:.2f} base +" in printed
        names = {f"{split}/{name}" for split in ("train", "eval") for name in PAIR_MEASURES}
        assert names <= {name for line in metrics for name in line} <= names | KNOWN
        assert (
            "held-out perplexity" not in printed and "Reward accuracy of pairs" in (folder / "report.html").read_text()
        )


def test_what_it_saves_loads_in_plain_peft(run):
    recipe, folder, _ = run
    if recipe != "quotes_tags":
        prompt = "Tweet text : @SaltRoadPost my lamp came broken and nobody answers Label :"
        done = launch("lora-dist", "generate", "--adapter", str(folder / "adapter"), "--max_new_tokens", "3", prompt)
        assert done.returncode == 0 and done.stdout.startswith(prompt), done.stderr
        return
    names = json.loads((folder / "adapter" / "labels.json").read_text())
    assert names == ["hope", "kindness", "love", "memory", "patience", "pride", "silence", "winter"]
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter", num_labels=len(names))
    assert model.base_model.model.score.modules_to_save["default"].weight.any()
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    with torch.no_grad():
        logits = model(**tokenizer("“Hope keeps the door on the latch.”", return_tensors="pt")).logits
    assert logits.shape == (1, 8) and logits.isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_it_starts_through_accelerate(recipe, tmp_path):
    flags = ("--max_steps", "2", "--warmup_steps", "0", "--report_to", "none", "--output_dir", str(tmp_path / "run"))
    assert "ranks: 2 on cpu, mixed precision " in launch_recipe("fsdp", *flags, recipe=recipe).stdout


@pytest.mark.slow
def test_packing_by_its_flag(tmp_path):
    """The flag: one adapter on 2 ranks, sharded, and on one, from a stream, where one window holds all rows."""
    common = ("--max_steps", "3", "--warmup_steps", "1", "--max_length", "128", "--report_to", "none")
    common += ("--packing", "true")
    starts = {
        "two": ((2, "fsdp"), ("--gradient_accumulation_steps", "2")),
        "stream": ((1, "ddp"), ("--gradient_accumulation_steps", "4", "--streaming", "true")),
    }
    adapters = {}
    for name, ((num_ranks, strategy), flags) in starts.items():
        place = {"num_ranks": num_ranks, "strategy": strategy, "env": BF16, "recipe": "sft"}
        ended = fork_ranks(*common, *flags, "--output_dir", str(tmp_path / name), **place)
        assert [code for code, _, _ in ended] == [0] * num_ranks, ended[0][2]
        adapters[name] = (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
    assert adapters["two"] == adapters["stream"]
