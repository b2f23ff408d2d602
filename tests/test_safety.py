"""Deleting is done in one place."""

import ast
from pathlib import Path

CODE = Path(__file__).parents[1] / "lora_dist"
DELETES = {"rmtree", "unlink", "rmdir", "remove", "removedirs"}
# These still delete by themselves. preflight deletes the file that it wrote a moment before.
ALLOWED = {
    "files.py",
    "cluster/preflight.py",
    "run/folder.py",
    "cluster/submission.py",
}


def deletions(path: Path) -> list[str]:
    """The calls of a file that delete something on the disk. A function `remove` of our own is called by its name."""
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [ast.unparse(func) for func in calls if isinstance(func, ast.Attribute) and func.attr in DELETES]
    return [name for name in names if not name.endswith("remove") or name in ("os.remove", "shutil.remove")]


def test_safety_only_one_module_deletes():
    found = {str(path.relative_to(CODE)): deletions(path) for path in CODE.rglob("*.py")}
    assert found["files.py"] == ["path.unlink", "os.rmdir", "path.unlink"]
    assert {name for name, calls in found.items() if calls} <= ALLOWED
