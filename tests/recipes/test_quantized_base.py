"""`lora-dist quantize` and `--quantized_cache`, through their launchers: other starts, the same adapter."""

import json

import pytest

from tests.helpers.ranks import launch, launch_recipe

FLAGS = (
    "--quantization",
    "nf4",
    "--max_steps",
    "2",
    "--warmup_steps",
    "0",
    "--report_to",
    "none",
    "--max_length",
    "48",
)
FLAGS += ("--gradient_accumulation_steps", "1", "--sample_prompt", "", "--eval_fraction", "0")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.slow
def test_quantize_then_train_on_it(tmp_path):
    quantize = ("-m", "lora_dist.cli", "quantize", "embedded", "--quantization", "nf4", "--output_dir")
    for command, name in ((("torchrun", "--nproc_per_node", "2"), "by two"), (("python",), "by one")):
        done = launch(*command, *quantize, str(tmp_path / name))
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"{tmp_path / name}: embedded in nf4\n"
    assert contents(tmp_path / "by two") == contents(tmp_path / "by one")
    runs = {
        "quantized": ("--model_name_or_path", str(tmp_path / "by one")),
        "writes": ("--model_name_or_path", "embedded", "--quantized_cache", str(tmp_path / "cache")),
    }
    adapters, bases = {}, {}
    for run, base in runs.items():
        launch_recipe("fsdp", *FLAGS, *base, "--output_dir", str(tmp_path / run))
        adapters[run] = (tmp_path / run / "adapter/adapter_model.safetensors").read_bytes()
        config = json.loads((tmp_path / run / "adapter/adapter_config.json").read_text())
        bases[run] = config["base_model_name_or_path"]
    assert len(set(adapters.values())) == 1
    assert contents(tmp_path / "cache") == contents(tmp_path / "by one")
    assert bases["quantized"] == bases["writes"] and bases["writes"].endswith("embedded/opt")  # the original of both


@pytest.mark.parametrize(
    "flags, words",
    [
        (("embedded", "--output_dir", "lora_dist"), "lora_dist: holds files that are not a quantized base"),
        (("./none", "--output_dir", "x"), "--model_name_or_path ./none: no such directory"),
    ],
)
def test_bad_input_of_quantize(flags, words):
    done = launch("lora-dist", "quantize", *flags)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and words in done.stderr
