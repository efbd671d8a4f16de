"""Every kernel on small, odd shapes under NVIDIA's compute-sanitizer: out-of-bounds accesses, races, barriers.

    python -m benchmarks.sanitizer [--tools memcheck racecheck synccheck] [--out results]

PyTorch's caching allocator is off meanwhile, so that a tensor's end is the end of its allocation.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from cs336_basics.nn_utils import cross_entropy
from cs336_systems.adamw import FusedAdamW
from cs336_systems.flash_attention import flash_attention
from cs336_systems.linear_cross_entropy import linear_cross_entropy
from cs336_systems.measure import show, write_result
from cs336_systems.rms_norm import rms_norm

#: (query heads, key heads, queries, keys, d)
SHAPES = [(2, 2, 17, 17, 64), (1, 1, 1, 1, 16), (4, 2, 130, 75, 32), (2, 1, 70, 200, 128), (1, 1, 257, 257, 80)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TIMEOUT_S = 200


def run_kernels() -> None:
    """All kernels once per shape, forward and backward."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=["memcheck", "racecheck", "synccheck"])
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--child", action="store_true", help="run the kernels, without the sanitizer")
    arguments = parser.parse_args()
    if arguments.child:
        run_kernels()
        return
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    rows = []
    for tool in arguments.tools:
        command = [sanitizer, "--tool", tool, sys.executable, "-m", "benchmarks.sanitizer", "--child"]
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        try:
            run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
            output = run.stdout + run.stderr
        except subprocess.TimeoutExpired as error:
            output = f"no end after {error.timeout} s"
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", output)
        finished = "all kernels ran" in output
        rows.append({"tool": tool, "finished": finished, "summary": summary[-1] if summary else output[-300:]})
        if not finished or (summary and not summary[-1].startswith("0 ")):
            print(output[-3000:])
    show("compute-sanitizer", rows)
    write_result(arguments.out, "sanitizer", "compute-sanitizer over all kernels", rows, torch.device("cuda"))


if __name__ == "__main__":
    main()
