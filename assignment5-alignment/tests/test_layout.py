"""The layout of the package: imports point one way, and no module or function is too long to read."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "cs336_alignment"
#: From the bottom to the top. A shelf may import from itself and from shelves in lower layers.
LAYERS = [
    {"machine", "run_folder", "command"},
    {"tensors", "prompts", "grading"},
    {"policy", "datasets"},
    {"runs"},
    {"rollouts"},
    {"programs"},
    {"cli"},
    {"__main__"},
]
LAYER = {name: layer for layer, names in enumerate(LAYERS) for name in names}
#: Exceptions that do not make a cycle: the loss of DPO uses a prompt template.
ALLOWED = {("tensors", "prompts")}
MODULES = sorted(PACKAGE.rglob("*.py"))


def shelf_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_shelves(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        modules += [name.name for name in node.names] if isinstance(node, ast.Import) else []
        for module in modules:
            if module == "cs336_alignment" and isinstance(node, ast.ImportFrom):
                yield from (name.name for name in node.names)
            elif module.startswith("cs336_alignment."):
                yield module.split(".")[1]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    if path == PACKAGE / "__init__.py":
        return
    shelf = shelf_of(path)
    for other in imported_shelves(path):
        assert other == shelf or (shelf, other) in ALLOWED or LAYER[other] < LAYER[shelf], f"{shelf} imports {other}"


def test_every_shelf_has_a_layer():
    assert {shelf_of(path) for path in MODULES} - {"__init__"} == LAYER.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_modules_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_folders_hold_about_a_dozen_modules():
    for folder in {path.parent for path in MODULES}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 13, folder


def test_the_map_in_the_readme_names_every_module():
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Map of the package")[1].split("\n## ")[0]
    for path in MODULES:
        if path.stem not in ("__init__", "__main__") and path.parent.name != "configs":
            assert f"`{path.stem}`" in section or f"[{path.name}]" in section, path
