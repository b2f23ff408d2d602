"""The shape of the code: what may import what, and that the table matches the files."""

import ast
import graphlib
import tomllib
from pathlib import Path

import yaml

from lora_dist.parallel.strategies import STRATEGIES

ROOT = Path(__file__).parents[1]
# A package imports only itself and what stands before it here. Modules of the top level come first, the commands last.
TOP = ["errors", "boundary", "units", "signals", "config", "environment", "flags", "entry", "files", "functions",
       "seeds", "embedded"]  # fmt: skip
PACKAGES = ["data", "parallel", "model", "run", "tracking", "training", "cluster"]
ORDER = [*TOP, *PACKAGES, "library", "commands", "cli"]
WITHOUT_TORCH = ("errors", "boundary", "signals", "config", "flags", "entry", "embedded/__init__",
                 "parallel/deepspeed_config", "parallel/strategies", "cluster/slurm", "cluster/status")  # fmt: skip


def imports(path: Path) -> list[str]:
    """Full names of the modules that a file imports, lazily or not."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def files_of(name: str) -> list[Path]:
    module = ROOT / f"lora_dist/{name}.py"
    return [module] if module.exists() else sorted((ROOT / "lora_dist" / name).rglob("*.py"))


def test_each_package_imports_only_what_stands_before_it():
    entries = {p.stem for p in (ROOT / "lora_dist").iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()}
    assert entries - {"__init__"} == set(ORDER)
    checked = 0
    for position, name in enumerate(ORDER):
        before = ORDER[: position + 1]
        for path in files_of(name):
            for imported in imports(path):
                parts = imported.split(".")
                if parts[0] == "lora_dist" and len(parts) > 1:
                    checked += 1
                    assert parts[1] in before or parts[1] == "__version__", f"{path} imports {imported}"
    assert checked > 100


def test_modules_of_a_package_do_not_import_each_other_in_a_circle():
    for package in PACKAGES:
        needs = {}
        for path in files_of(package):
            modules = [name.split(".") for name in imports(path)]
            needs[path.stem] = {m[2] for m in modules if m[:2] == ["lora_dist", package] and len(m) > 2}
        order = list(graphlib.TopologicalSorter(needs).static_order())  # raises CycleError
        assert set(order) >= needs.keys() and len(needs) > 1


def test_packages_are_small_and_empty_to_import():
    for package in PACKAGES:
        folders = {path.parent for path in files_of(package)}
        assert all(len(list(folder.glob("*.py"))) <= 11 for folder in folders), package
        assert all((folder / "__init__.py").read_text() == "" for folder in folders if list(folder.glob("*.py"))), (
            package
        )


def test_what_answers_a_mistyped_flag_imports_no_torch():
    for module in WITHOUT_TORCH:
        heavy = [n for n in imports(ROOT / f"lora_dist/{module}.py") if n.startswith(("torch", "peft", "accelerate"))]
        assert not heavy, module


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


def test_a_wheel_holds_every_package_and_what_ships_beside_them():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = [path.parent.relative_to(ROOT) for path in (ROOT / "lora_dist").rglob("__init__.py")]
    code = {str(folder).replace("/", ".") for folder in folders}
    assert set(setup["packages"]) == code | set(setup["package-dir"])
    for package, folder in setup["package-dir"].items():
        assert package == f"lora_dist.{folder.replace('/', '.')}"  # the same path below the package as in the checkout
        patterns = [*setup["package-data"].get(package, ()), "*.py"]
        held = {path for pattern in patterns for path in (ROOT / folder).glob(pattern)}
        files = {p for p in (ROOT / folder).rglob("*") if p.is_file() and p.suffix not in (".md", ".pyc")}
        assert held == files, package
    inside = {path for pattern in setup["package-data"]["lora_dist"] for path in (ROOT / "lora_dist").glob(pattern)}
    assert inside == {p for p in (ROOT / "lora_dist").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}


def test_no_test_module_imports_another():
    """What they share is in tests/helpers."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert len([path for path in files if path.name.startswith("test_")]) > 50
    for path in files:
        found = [name for name in imports(path) if any(part.startswith("test_") for part in name.split("."))]
        assert not found, f"{path} imports {found}"


def test_benchmarks_do_without_the_tests():
    """They may not import them, and have no reason to change sys.path, which would let them."""
    of_tests = {"tests", "conftest", *(path.stem for path in (ROOT / "tests").rglob("*.py"))} - {"__init__"}
    files = sorted((ROOT / "benchmarks").glob("*.py"))
    assert len(files) > 10
    for path in files:
        found = [name for name in imports(path) if name.split(".")[0] in of_tests or name == "sys.path"]
        attributes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)]
        assert not found and "sys.path" not in map(ast.unparse, attributes), f"{path}: {found or 'sys.path'}"
