"""The examples as they stand, on 2 ranks."""

import json
import re

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_dist.embedded import BASE_DIR
from tests.helpers.ranks import ROOT, launch

PAIRS = [{"prompt": f"Name {i} things:", "chosen": " a lamp", "rejected": " nothing"} for i in range(40)]
TEXTS = [{"text": f"Hope is number {i}."} for i in range(80)]


@pytest.mark.parametrize(
    "example, rows, launcher",
    [
        pytest.param("trl_sft", TEXTS, ("torchrun", "--nproc_per_node", "2"), marks=pytest.mark.slow),
        ("trl_dpo", PAIRS, ("accelerate", "launch", "--config_file", "accelerate_configs/fsdp.yaml")),
        pytest.param("own_loop", TEXTS[:12], ("torchrun", "--nproc_per_node", "2"), marks=pytest.mark.slow),
    ],
)
def test_an_example_trains_on_two_ranks(example, rows, launcher, tmp_path):
    data = tmp_path / ("data.txt" if example == "own_loop" else "data.jsonl")
    data.write_text("".join((row["text"] if example == "own_loop" else json.dumps(row)) + "\n" for row in rows))
    source = (ROOT / f"examples/{example}.py").read_text()
    assert source.count("\n") < 40 and source.count("load_base(") == 1
    done = launch(*launcher, f"examples/{example}.py", str(BASE_DIR), str(data), str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr[-3000:]
    if example == "own_loop":
        assert set(re.findall("rank ([0-9]), step 6: loss", done.stdout)) == {"0", "1"}
    else:  # a step has the rows of two ranks: 72 texts in 9 steps of 8, 36 pairs in 9 steps of 4
        state = json.loads(next((tmp_path / "out").glob("checkpoint-9/trainer_state.json")).read_text())
        losses = [line["loss"] for line in state["log_history"] if "loss" in line]
        assert len(losses) == 9 and (example == "trl_dpo" or losses[-1] < losses[0])
        assert any("eval_loss" in line for line in state["log_history"])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE_DIR), tmp_path / "out")
    assert any(param.abs().max() > 0 for name, param in model.named_parameters() if "lora_B" in name)
