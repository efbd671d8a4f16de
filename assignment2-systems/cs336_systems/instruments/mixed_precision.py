"""Show what half precision does to numbers: accumulation, dtypes of a small model under autocast, and RMSNorm."""

from collections.abc import Callable
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from cs336_basics.model import RMSNorm
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.strategy import resolve_device
from cs336_systems.instruments.measure import Row, print_table, result_file
from cs336_systems.instruments.options.one_gpu import MixedPrecision

HALF = (torch.float16, torch.bfloat16)
NormName = Literal["LayerNorm", "RMSNorm"]


def run(options: MixedPrecision) -> None:
    """Compute, print tables and write a file."""
    device = resolve_device(options.device)
    tables = {
        "1000 times 0.01, added up": accumulation_rows(),
        f"dtypes of a small model under autocast on {device.type}": dtype_rows(device),
        "RMSNorm of x = scale · normal, largest error relative to float64": rms_norm_rows(device),
    }
    for title, rows in tables.items():
        columns = [key for key in rows[0] if key not in ("group", "error")]
        print_table(title, rows, columns, digits=6 if "sum" in columns else 2)
    file = result_file(options, "; ".join(tables), device)
    file.write([row for rows in tables.values() for row in rows])
    file.announce()


def accumulation_rows() -> list[Row]:
    """Add 0.01 a thousand times, varying the dtype of the sum, the rounding of 0.01, and the dtype that is added.

    A sum in half precision stops growing evenly once the spacing of its numbers approaches the addend; a float32 sum of
    rounded addends is off only by their rounding.
    """
    cases = [
        (torch.float32, torch.float32, torch.float32),
        *((half, half, half) for half in HALF),
        *((torch.float32, half, half) for half in HALF),  # promoted by the addition
        *((torch.float32, half, torch.float32) for half in HALF),  # converted before it: the same
    ]
    rows = []
    for accumulator, rounded, added in cases:
        total = torch.tensor(0, dtype=accumulator)
        for _ in range(1000):
            total += torch.tensor(0.01, dtype=rounded).to(added)
        row = {"accumulator": _name(accumulator), "rounded_to": _name(rounded), "added_as": _name(added)}
        rows.append({"group": "accumulation", **row, "sum": total.item(), "error": total.item() - 10})
    return rows


class ToyModel(nn.Module):
    """The assignment's model: linear, ReLU, norm, linear."""

    def __init__(self, d_in: int = 8, d_out: int = 4, norm: NormName = "LayerNorm") -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_in, 10, bias=False)
        self.ln = nn.LayerNorm(10) if norm == "LayerNorm" else RMSNorm(10)
        self.fc2 = nn.Linear(10, d_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.ln(torch.relu(self.fc1(x))))


def dtype_rows(device: torch.device) -> list[Row]:
    """Record the dtype of every tensor of `ToyModel` under float16 and bfloat16 autocast, with hooks.

    The device matters: CUDA's autocast runs `layer_norm` in float32, the CPU's leaves it in half precision. Both leave
    Assignment 1's `RMSNorm` alone; it computes in float32 and returns the dtype of its input.
    """
    norms: tuple[NormName, ...] = ("LayerNorm", "RMSNorm")
    return [_dtypes(norm, half, device) for norm, half in product(norms, HALF)]


def _dtypes(norm: NormName, half: torch.dtype, device: torch.device) -> Row:
    torch.manual_seed(0)
    model = ToyModel(norm=norm).to(device)
    seen: dict[str, str] = {}

    def record(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = _name(output.dtype)

        return hook

    for name, module in {"fc1_output": model.fc1, "norm_output": model.ln, "logits": model.fc2}.items():
        module.register_forward_hook(record(name))
    x, targets = torch.randn(16, 8, device=device), torch.randint(4, (16,), device=device)
    with torch.autocast(device.type, dtype=half):
        loss = cross_entropy(model(x), targets)
        parameters = {_name(parameter.dtype) for parameter in model.parameters()}
    loss.backward()
    gradients = {_name(parameter.grad.dtype) for parameter in model.parameters() if parameter.grad is not None}
    return {
        "group": "dtypes",
        "norm": norm,
        "autocast": _name(half),
        "parameters": ", ".join(sorted(parameters)),
        **seen,
        "loss": _name(loss.dtype),
        "gradients": ", ".join(sorted(gradients)),
    }


def rms_norm_rows(device: torch.device) -> list[Row]:
    """Compare the error of Assignment 1's RMSNorm with that of the plain formula in the input's dtype.

    Both get half-precision input, as they do under autocast, which changes neither. The squares of entries above 256
    exceed float16: the plain formula then gives zeros, an error of 1. bfloat16 has enough range, but few digits.
    """
    rows = []
    for half, scale in product(HALF, (1.0, 300.0)):
        generator = torch.Generator().manual_seed(0)
        x = (scale * torch.randn(64, 1024, generator=generator)).to(device, half)
        norm = RMSNorm(1024, device=device)
        wide = x.double()
        expected = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
        with torch.autocast(device.type, dtype=half):
            ours = norm(x)
            plain = x * torch.rsqrt(torch.sum(x * x, -1, keepdim=True, dtype=half) / 1024 + norm.eps)
        row: Row = {"group": "rms norm", "input": _name(half), "scale": scale, "output": _name(ours.dtype)}
        for name, result in (("computed in float32", ours), ("computed in the input's dtype", plain.to(half))):
            row[f"error, {name}"] = ((result.double() - expected).abs().max() / expected.abs().max()).item()
        rows.append(row)
    return rows


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
