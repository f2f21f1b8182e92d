"""The package is built in layers: no module imports from a room above its own, and none from one that imports it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import dcp_fast

# From the ground up. A room is a folder, or a module that stands alone.
ROOMS = [
    {"_native", "_torch", "collector", "errors", "names", "switches", "this_load", "unpickling"},
    {"observe"},
    {"values"},
    {"metadata"},
    {"planning"},
    {"transfer"},
    {"readers"},
    {"ranks"},
    {"load", "lookups", "optimizer"},
    {"install"},
    {"tools"},
    {"__init__", "__main__"},
]
MOST_LEVELS = 13
GROUND = {"_native", "_torch"}  # the extension, and torch itself

PACKAGE = Path(dcp_fast.__file__).parent


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


@cache
def imports_of(name: str) -> set[str]:
    """Modules of the package that a module imports, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "dcp_fast":
            found |= {
                alias.name if alias.name in MODULES or alias.name == "_native" else "__init__" for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dcp_fast."):
            module = str(node.module).partition(".")[2]
            inner = {f"{module}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= inner or {module}
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.partition(".")[2] or "__init__" for alias in node.names if alias.name.startswith("dcp_fast")
            }
    return found


def room_of(name: str) -> int:
    room = name.partition(".")[0]
    return next(i for i, rooms in enumerate(ROOMS) if room in rooms)


def levels_of(name: str, above: tuple[str, ...] = ()) -> int:
    assert name not in above, f"a cycle: {' -> '.join([*above, name])}"
    if name in GROUND:
        return 0
    return 1 + max((levels_of(imported, (*above, name)) for imported in imports_of(name)), default=0)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_is_imported_from_above(name: str) -> None:
    too_high = {imported for imported in imports_of(name) if room_of(imported) > room_of(name)}
    assert not too_high


def test_imports_are_no_cycle_and_not_deep() -> None:
    assert max(levels_of(name) for name in MODULES) <= MOST_LEVELS


def test_what_is_private_in_torch_has_one_place() -> None:
    for name, path in MODULES.items():
        if name == "_torch":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
                names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
                assert not any(part.startswith("_") for part in names), f"{name}: from {node.module} import ..."
