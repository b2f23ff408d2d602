"""README.md: short, its links resolve, its commands exist, and its Python runs."""

import os
import re
import subprocess

import pytest

from lora_dist.cli import build_parser
from tests.helpers.ranks import BIN, PATIENCE_S, ROOT

TEXT = (ROOT / "README.md").read_text()
CODE = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.DOTALL)


def test_it_is_read_in_two_minutes():
    assert len(TEXT.splitlines()) <= 130 and len(TEXT.split()) <= 1000


@pytest.mark.parametrize(
    "page", [p.relative_to(ROOT) for p in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))], ids=str
)
def test_links_resolve(page):
    links = re.findall(r"\]\(([^)#]+)(#[^)]*)?\)", (ROOT / page).read_text())
    missing = [link for link, _ in links if "://" not in link and not (ROOT / page.parent / link).exists()]
    assert not missing
    assert links or page.name in ("upstream.md", "metrics.md")


def test_its_commands_and_their_flags_exist():
    _, commands = build_parser()
    lines = [line.split("#")[0] for language, block in CODE if not language for line in block.splitlines()]
    used = [line.split() for line in lines if line.startswith("lora-dist ")]
    assert len(used) >= 8
    for _, command, *words in used:
        assert command in commands.choices
        known = {flag for action in commands.choices[command]._actions for flag in action.option_strings}
        for flag in (word for word in words if word.startswith("--")):
            is_setting = command in ("train", "doctor", "submit") and flag[2:] in SETTINGS
            assert flag in known or is_setting, f"lora-dist {command} has no {flag}"
        for path in (word for word in words if word.startswith(("recipes/", "accelerate_configs/", "launch/"))):
            assert (ROOT / path).exists()


SETTINGS = {"model_name_or_path", "dataset_name", "output_dir"}


def test_its_python_trains_on_two_ranks(tmp_path):
    (block,) = [block for language, block in CODE if language == "python"]
    (tmp_path / "mine.py").write_text(block)
    command = [BIN / "torchrun", "--nproc_per_node", "2", "mine.py"]
    env = os.environ | {"WANDB_MODE": "disabled", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ranks: 2 on cpu" in done.stdout
    (adapter,) = tmp_path.glob("runs/mine-*/adapter/adapter_model.safetensors")
    assert adapter.stat().st_size > 100_000


LOAD_BASE = """
import os
import torch, torch.distributed as dist
import lora_dist
from peft import LoraConfig, get_peft_model
base = lora_dist.load_base("embedded", quantization="nf4")
held = sum(p.to_local().nbytes for p in base.parameters() if hasattr(p, "to_local"))
whole = sum(p.nbytes for p in base.parameters())
model = get_peft_model(base, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
model.train()
ids = torch.arange(5, 25)[None]
model(input_ids=ids, labels=ids).loss.backward()
grads = [p.grad for p in model.parameters() if p.requires_grad]
found = [None] * dist.get_world_size()
dist.all_gather_object(found, (held < 0.52 * whole, any(g.any().item() for g in grads)))
if dist.get_rank() == 0:  # two ranks' lines may get mixed
    print(found, flush=True)
dist.barrier()
os._exit(0)  # gloo's threads may end a process that shuts down with SIGABRT
"""


def test_load_base_gives_each_rank_half_of_the_base_and_trains(tmp_path):
    (tmp_path / "own_loop.py").write_text(LOAD_BASE)
    command = [BIN / "torchrun", "--nproc_per_node", "2", str(tmp_path / "own_loop.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "[(True, True), (True, True)]\n"
