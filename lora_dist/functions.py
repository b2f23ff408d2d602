"""What a recipe's function will do, as text: equal for functions that do the same."""

import hashlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType

from datasets.fingerprint import Hasher

INSTALLED = tuple(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib"))


def describe_function(function: Callable) -> str:
    """Hash of a function's code, of the constants and closures that it uses, and of the functions that it calls.

    What is installed is known by its name alone: its versions are not part of a recipe.
    """
    digest = hashlib.sha256()
    for part in _parts(function, set()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _parts(value, seen: set[int]) -> Iterator[str]:
    if id(value) in seen:
        return
    if isinstance(value, FunctionType | ModuleType | type) and _is_installed(value):
        yield f"{getattr(value, '__module__', '')} {getattr(value, '__qualname__', value.__name__)}"
    elif isinstance(value, FunctionType):
        seen.add(id(value))
        yield from _code_parts(value.__code__)
        names = {name: value.__globals__[name] for name in _names(value.__code__) if name in value.__globals__}
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        for used in (*names, *names.values(), *cells, value.__defaults__, value.__kwdefaults__):
            yield from _parts(used, seen)
    elif isinstance(value, ModuleType):
        yield Path(value.__file__).read_text(encoding="utf-8") if getattr(value, "__file__", None) else value.__name__
    else:
        yield Hasher.hash(value)


def _is_installed(value) -> bool:
    """True for what is part of Python or of an installed package."""
    module = value.__name__ if isinstance(value, ModuleType) else value.__module__
    file = getattr(sys.modules.get(module), "__file__", None)
    return module != "__main__" and (file is None or any(Path(file).is_relative_to(folder) for folder in INSTALLED))


def _code_parts(code: CodeType) -> Iterator[str]:
    """The instructions and constants, also of functions inside, but not where they stand in the file."""
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames, code.co_freevars))
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code_parts(constant)
        else:
            yield Hasher.hash(constant)


def _names(code: CodeType) -> list[str]:
    """The names that the code may look up, sorted; those of functions inside it too."""
    inner = (name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant))
    return sorted({*code.co_names, *inner})
