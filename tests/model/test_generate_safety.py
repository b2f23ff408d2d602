"""`lora-dist generate` refuses an adapter that does not fit its base, and a base that is damaged, in one line."""

import argparse
import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_dist import commands
from lora_dist.config import TrainConfig
from lora_dist.data.formats import load_tokenizer
from lora_dist.embedded import BASE_DIR
from lora_dist.errors import UserError
from lora_dist.library import load_base
from lora_dist.model import adapters
from lora_dist.model.adapters import add_adapters, save_adapter

NAME = "base_model.model.model.decoder.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """(folder of an adapter, folder of its base)."""
    base = Path(shutil.copytree(BASE_DIR, tmp_path / "base"))
    config = TrainConfig(model_name_or_path=str(base), dataset_name="embedded", max_steps=4)
    model = add_adapters(load_base(str(base), quantization="none"), config)
    save_adapter(model, load_tokenizer(str(base)), tmp_path / "adapter")
    return tmp_path / "adapter", base


def generate(adapter: Path) -> None:
    commands.generate(
        argparse.Namespace(adapter=str(adapter), prompt="Two things", max_new_tokens=2, bare=False, json=True)
    )


def change_tensors(file: Path, change) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def change_json(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


ADAPTER, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FAULTS = {
    "a tensor less": (lambda a, b: change_tensors(a / ADAPTER, lambda t: t.pop(NAME)), "lacks, or has besides"),
    "other names": (
        lambda a, b: change_tensors(a / ADAPTER, lambda t: t.update({f"x.{name}": t.pop(name) for name in list(t)})),
        "lacks, or has besides",
    ),
    "no magnitudes": (lambda a, b: change_json(a / CONFIG, use_dora=True), "lacks, or has besides"),
    "NaN": (lambda a, b: change_tensors(a / ADAPTER, lambda t: t[NAME].fill_(float("nan"))), "holds NaN"),
    "alpha": (lambda a, b: change_json(a / CONFIG, lora_alpha=float("nan")), "lora_alpha nan is no number"),
    "PiSSA": (lambda a, b: change_json(a / CONFIG, init_lora_weights="pissa"), "changed its base model"),
    "a pattern that does not end": (
        lambda a, b: change_json(a / CONFIG, target_modules="(([a-z_.0-9]+)+)+X"), "the pattern .* did not end in 1 s"
    ),
    "a pipe": (lambda a, b: pipe(a / ADAPTER), "is no file"),
    "NaN in the base": (
        lambda a, b: change_tensors(
            b / "model.safetensors", lambda t: t["model.decoder.layers.0.fc1.weight"][0].fill_(float("nan"))
        ),
        "fc1.weight holds NaN",
    ),
    "a weight of the base less": (
        lambda a, b: change_tensors(b / "model.safetensors", lambda t: t.pop("model.decoder.layers.0.fc1.weight")),
        "lacks model.decoder.layers.0.fc1.weight",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_line(folders, fault, monkeypatch):
    monkeypatch.setattr(adapters, "MAX_MATCH_S", 1)
    spoil, says = FAULTS[fault]
    spoil(*folders)
    with pytest.raises(UserError, match=says) as raised:
        generate(folders[0])
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "entries",
    [{"stop_strings": ["x"]}, {"return_dict_in_generate": True}, {"penalty_alpha": 0.6, "top_k": 4},
     {"dola_layers": "low"}, {"cache_implementation": "quantized"}, {"assistant_early_exit": 1}],
)  # fmt: skip
def test_other_ways_to_generate_are_left_out(folders, capsys, entries):
    change_json(folders[1] / "generation_config.json", **entries)
    generate(folders[0])
    assert json.loads(capsys.readouterr().out)["completion"].startswith("Two things")


def test_a_template_that_does_not_end(folders, monkeypatch):
    from lora_dist.data import chat_template

    monkeypatch.setattr(chat_template, "MAX_TRIAL_S", 1)
    loop = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}x"
    (folders[0] / "chat_template.jinja").write_text(loop)
    with pytest.raises(UserError, match="its chat template: it did not end in 1 s"):
        generate(folders[0])
