"""The rule of the house, read off the source: no ready-made layers, losses or optimizers in the library."""

import ast
from pathlib import Path

import pytest

import cs336_basics

LIBRARY = Path(cs336_basics.__file__).parent
ALLOWED = {
    *("torch.nn", "torch.optim", "torch.nn.init"),
    *("torch.nn.Parameter", "torch.nn.Module", "torch.nn.ModuleList", "torch.nn.Sequential", "torch.nn.ModuleDict"),
    *("torch.nn.ParameterList", "torch.nn.ParameterDict", "torch.nn.init.trunc_normal_", "torch.optim.Optimizer"),
}
#: Torch has the course's layers and losses outside torch.nn as well, as functions and as methods of tensors.
READY_MADE = {
    *("softmax", "log_softmax", "rms_norm", "layer_norm", "embedding", "cross_entropy_loss", "nll_loss"),
    *("scaled_dot_product_attention", "clip_grad_norm_", "silu", "silu_"),
}
FOREIGN = {"torch._C._nn", "torch.ops", "torch._nn", "transformers", "tokenizers", "tiktoken", "sentencepiece"}


def violations(source):
    """Uses of torch that the rule forbids, with their lines."""
    tree = ast.parse(source)
    names = {}  # local name -> what it stands for
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                found.append((node.lineno, alias.name))
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                found.append((node.lineno, f"{node.module}.{alias.name}"))

    def dotted(node):
        if isinstance(node, ast.Name):
            return names.get(node.id)
        if isinstance(node, ast.Attribute):
            base = dotted(node.value)
            return f"{base}.{node.attr}" if base else None
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = dotted(node)
            if name:
                found.append((node.lineno, name))
            elif node.attr in READY_MADE and not isinstance(node.value, ast.Name):
                found.append((node.lineno, f"torch.Tensor.{node.attr}"))  # a method on an expression

    def forbidden(name):
        if any(name == foreign or name.startswith(foreign + ".") for foreign in FOREIGN):
            return True
        if name.startswith(("torch.nn", "torch.optim")):
            return (
                not any(
                    name == allowed or name.startswith(allowed + ".")
                    for allowed in ALLOWED - {"torch.nn", "torch.optim", "torch.nn.init"}
                )
                and name not in ALLOWED
            )
        return name.startswith("torch.") and name.rsplit(".", 1)[-1] in READY_MADE

    return sorted({(line, name) for line, name in found if forbidden(name)})


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda path: path.name)
def test_library_is_from_scratch(path):
    assert violations(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source",
    [
        "import torch.nn.functional as F\nF.softmax(x)",
        "from torch.nn import functional",
        "from torch.nn.functional import silu",
        "from torch import nn\nnn.Linear(1, 2)",
        "import torch\ntorch.nn.functional.cross_entropy(x, y)",
        "import torch\ntorch.nn.utils.clip_grad_norm_(p, 1)",
        "import torch\ntorch.optim.AdamW(p)",
        "from torch.optim import AdamW",
        "from torch import nn\nnn.init.xavier_uniform_(w)",
        "import torch as t\nt.softmax(x, 0)",
        "import torch\n(a + b).softmax(-1)",
        "import torch\ntorch.ops.aten.rms_norm(x)",
        "import tiktoken",
    ],
)
def test_the_reader_sees_every_way_around_it(source):
    assert violations(source)


def test_the_reader_lets_primitives_pass():
    source = """
import torch
from torch import Tensor, nn
class Layer(nn.Module):
    def __init__(self):
        self.weight = nn.Parameter(nn.init.trunc_normal_(torch.empty(3)))
class Mine(torch.optim.Optimizer):
    pass
torch.sigmoid(x) @ y.exp()
softmax(x)
"""
    assert violations(source) == []
