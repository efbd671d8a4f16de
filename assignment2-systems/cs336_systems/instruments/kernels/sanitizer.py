"""Run every kernel on small, odd shapes under NVIDIA's compute-sanitizer: out-of-bounds accesses, races, barriers.

PyTorch's caching allocator is off, so that the end of a tensor is the end of its allocation.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch
import tyro

from cs336_basics.nn_utils import cross_entropy
from cs336_systems.instruments.measure import Row, print_table, write_result
from cs336_systems.instruments.options.common import Measurement
from cs336_systems.kernels.adamw import FusedAdamW
from cs336_systems.kernels.flash_attention import flash_attention
from cs336_systems.kernels.linear_cross_entropy import linear_cross_entropy
from cs336_systems.kernels.rms_norm import rms_norm

#: (query heads, key heads, queries, keys, d)
SHAPES = [(2, 2, 17, 17, 64), (1, 1, 1, 1, 16), (4, 2, 130, 75, 32), (2, 1, 70, 200, 128), (1, 1, 257, 257, 80)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIMEOUT_S = 200
MODULE = "cs336_systems.instruments.kernels.sanitizer"


def run_kernels() -> None:
    """Run all kernels once per shape, forward and backward."""
    torch.manual_seed(0)
    for heads, kv_heads, queries, keys, d in SHAPES:
        for dtype in DTYPES:
            q = torch.randn(1, heads, queries, d, device="cuda", dtype=dtype, requires_grad=True)
            k, v = (torch.randn(1, kv_heads, keys, d, device="cuda", dtype=dtype, requires_grad=True) for _ in range(2))
            for is_causal in (True, False):
                flash_attention(q, k, v, is_causal).sum().backward()
    for tokens, width, vocab in [(3, 17, 19), (130, 96, 1000)]:
        hidden = torch.randn(tokens, width, device="cuda", requires_grad=True)
        weight = torch.nn.Parameter(torch.randn(vocab, width, device="cuda"))
        norm = torch.nn.Parameter(torch.ones(width, device="cuda"))
        targets = torch.randint(vocab, (tokens,), device="cuda")
        loss = linear_cross_entropy(rms_norm(hidden, norm), weight, targets, chunk_tokens=64)
        loss.backward()
        FusedAdamW([weight, norm]).step()
        assert torch.isfinite(loss)
        assert torch.isfinite(cross_entropy(hidden @ weight.T, targets))
    torch.cuda.synchronize()
    print("all kernels ran")


@dataclass(frozen=True)
class Options(Measurement):
    """Run every kernel under NVIDIA's compute-sanitizer. Needs an NVIDIA GPU."""

    tools: tuple[str, ...] = ("memcheck", "racecheck", "synccheck")
    """Tools of compute-sanitizer."""
    child: bool = False
    """Run the kernels, without the sanitizer."""
    name: str = "sanitizer"


def main(options: Options) -> None:
    """Run each tool, print a table and write a file."""
    if options.child:
        run_kernels()
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    rows: list[Row] = []
    for tool in options.tools:
        command = [
            sanitizer,
            "--tool",
            tool,
            sys.executable,
            "-m",
            "cs336_systems.instruments.kernels.sanitizer",
            "--child",
        ]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
            output = run.stdout + run.stderr
        except subprocess.TimeoutExpired as error:
            output = f"not finished after {error.timeout} s"
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        finished = "all kernels ran" in output
        rows.append({"tool": tool, "finished": finished, "summary": summary[-1] if summary else output[-300:]})
        if not finished or (summary and not summary[-1].startswith("0 ")):
            print(output[-3000:])
    print_table("compute-sanitizer", rows)
    write_result(options, "compute-sanitizer over all kernels", rows, torch.device("cuda"))


if __name__ == "__main__":
    main(tyro.cli(Options))
