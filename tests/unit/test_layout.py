"""The shape of the code: modules import only what comes before them, and the table matches the files."""

import ast
from pathlib import Path

import yaml

from lora_dist.strategies import STRATEGIES

ROOT = Path(__file__).parents[2]
ORDER = """__init__ embedded packages preemption config deepspeed_config strategies sources tasks formats labels rows
    packing data context_parallel manifest weights quantization serialization sharding zero freezing flops timing
    reduction pipeline base_model quantized_cache placement adapters run_folder resume watchdog metric_names wandb_run
    metrics scores charts report profiling step progress evaluation checkpoint measures train session oddities preflight
    dashboard slurm submission status cli""".split()


def test_modules_import_only_earlier_ones():
    assert sorted(ORDER[2:]) == sorted(p.stem for p in (ROOT / "lora_dist").glob("*.py") if p.stem != "__init__")
    for position, module in enumerate(ORDER[2:], 2):
        for node in ast.walk(ast.parse((ROOT / f"lora_dist/{module}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_dist"):
                imported = (node.module.split(".") + ["__init__"])[1]
                assert ORDER.index(imported) < position, f"{module} imports {imported}"


def test_config_and_strategies_import_no_torch():
    for module in ("preemption", "config", "deepspeed_config", "strategies", "embedded/__init__", "slurm", "status"):
        names = [
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse((ROOT / f"lora_dist/{module}.py").read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        ]
        assert not [name for name in names if name.startswith(("torch", "peft", "accelerate"))]


def test_each_accelerate_config_is_a_row_of_the_table():
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "accelerate_configs").glob("*.yaml")}
    assert files.keys() == STRATEGIES.keys()
    for name, file in files.items():  # tests/recipes/test_strategies.py launches each
        assert (file["distributed_type"] == "FSDP") == (STRATEGIES[name].engine == "FSDP2")
        assert (file["num_processes"] > 1) == (name != "single")
        assert not file["use_cpu"]  # the recipe decides: the same file serves CPU and GPU
        header = (ROOT / f"accelerate_configs/{name}.yaml").read_text().split("compute_environment")[0]
        assert header.startswith(f"# {name}: ")
        assert all(f"# {part}" in header for part in ("When: ", "Memory per GPU: ", "Traffic per step: "))
