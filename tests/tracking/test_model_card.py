"""The adapter's README.md: a model card that the hub can read, with the run's settings and results."""

import dataclasses

import pytest
from huggingface_hub import ModelCard

from lora_dist.config import TrainConfig
from lora_dist.tracking.model_card import TrainingResult, model_card, write_model_card

RESULT = TrainingResult(
    num_steps=200, sequences_per_step=32, tokens_seen=123456, eval_loss_base=2.7097, eval_loss=1.8148,
    scores={"accuracy_base": 0.25, "accuracy": 0.875},
)  # fmt: skip


@pytest.fixture
def config() -> TrainConfig:
    return TrainConfig(
        model_name_or_path="facebook/opt-6.7b", dataset_name="Abirate/english_quotes", quantization="nf4",
        lora_r=8, lora_alpha=32, mixed_precision="bf16", max_steps=200,
    )  # fmt: skip


def test_the_hub_reads_its_header(config):
    card = ModelCard(model_card(config, RESULT))
    header = card.data.to_dict()
    assert header["base_model"] == "facebook/opt-6.7b" and header["datasets"] == ["Abirate/english_quotes"]
    assert (header["library_name"], header["pipeline_tag"]) == ("peft", "text-generation")
    assert {"lora", "lora-dist", "quantized-base"} <= set(header["tags"])


def test_it_names_method_data_and_results(config):
    text = model_card(config, RESULT)
    rows = [
        "rank r | 8", "alpha | 32", "target modules | q_proj, v_proj", "base | NF4 with double quantization (QLoRA)",
        "steps | 200", "batch | 32 sequences of up to 512 tokens", "tokens seen | 123,456 (padding not counted)",
        "loss | 2.7097 | 1.8148", "perplexity | 15.02 | 6.14", "accuracy | 0.250 | 0.875",
    ]  # fmt: skip
    for row in rows:
        assert f"| {row} |" in text, row
    assert "`facebook/opt-6.7b`, trained on `Abirate/english_quotes`" in text
    assert "peft " in text and "torch " in text and "None" not in text and "More Information Needed" not in text


def test_the_snippet_is_python_that_loads_this_adapter(config):
    pushed = dataclasses.replace(config, push_to_hub=True, hub_model_id="me/quotes")
    for card, adapter in ((model_card(pushed, RESULT), "me/quotes"), (model_card(config, RESULT), "path/to/")):
        code = card.partition("```python\n")[2].partition("```")[0]
        compile(code, "snippet", "exec")
        assert f'AutoPeftModelForCausalLM.from_pretrained("{adapter}' in code


def test_a_classifier_names_its_classes(config):
    config = dataclasses.replace(config, task_type="SEQ_CLS")
    card = model_card(config, dataclasses.replace(RESULT, classes=("good", "bad", "odd")))
    assert "AutoPeftModelForSequenceClassification" in card and "num_labels=3)" in card
    assert "pipeline_tag: text-classification" in card and "good, bad, odd" in card and "perplexity" not in card


def test_a_base_or_data_set_that_is_not_on_the_hub_is_not_in_the_header(config, tmp_path):
    for name in ("embedded", "embedded/complaints", str(tmp_path), "/data/quotes.jsonl"):
        config = dataclasses.replace(config, model_name_or_path=name, dataset_name=name)
        header = ModelCard(model_card(config, RESULT)).data.to_dict()
        assert "base_model" not in header and "datasets" not in header, name


def test_without_held_out_rows_it_has_no_results(config):
    result = dataclasses.replace(RESULT, eval_loss_base=None, eval_loss=None, scores={})
    assert "## Results" not in model_card(config, result) and "## Results" in model_card(config, RESULT)


def test_it_replaces_the_one_of_peft(config, tmp_path):
    (tmp_path / "README.md").write_text("[More Information Needed]")
    write_model_card(tmp_path, config, RESULT)
    assert (tmp_path / "README.md").read_text() == model_card(config, RESULT)
