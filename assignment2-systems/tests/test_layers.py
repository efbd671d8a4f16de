"""Imports point one way: kernels, theory <- parallel <- training <- instruments <- cli."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cs336_systems"
#: A layer -> the layers that it may import from, besides itself.
BELOW = {
    "kernels": set(),
    "theory": set(),
    "parallel": {"kernels", "theory"},
    "training": {"kernels", "theory", "parallel"},
    "instruments": {"kernels", "theory", "parallel", "training"},
    "cli": {"kernels", "theory", "parallel", "training", "instruments"},
    "__main__": {"cli"},
}


def layer_of(module):
    return module.split(".")[1] if "." in module else None


def imported(path):
    """The modules of the package that a file imports anywhere, or names in a table of "module:attribute"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from (f"{base}.{alias.name}" if base == "cs336_systems" else base for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and ":" in node.value:
            yield node.value.partition(":")[0]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_from_a_layer_above(path):
    own = layer_of(".".join(["cs336_systems", *path.relative_to(PACKAGE).with_suffix("").parts]))
    used = {layer_of(name) for name in imported(path) if name.startswith("cs336_systems.")}
    if own != "__init__":
        assert used <= BELOW[own] | {own}


def test_every_layer_is_there():
    assert {path.stem for path in PACKAGE.iterdir()} - {"__init__", "__pycache__"} == set(BELOW)
