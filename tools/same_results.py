"""Check that two checkouts train to the same weights and losses, bit for bit: `python tools/same_results.py OLD NEW`.

A change that is meant to be neutral, such as moving code or renaming it, must not change a result. This runs short
training runs with fixed seeds on the CPU in both checkouts, each in its own environment (`make setup`): the demo of
Assignment 1; its loop under DDP and FSDP, two processes over gloo; and SFT, GRPO, expert iteration, DPO and instruction
tuning of Assignment 5's tiny model. Then it compares every number in `metrics.jsonl` that is not a time, and every
tensor in the checkpoints.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

TIMES = ("seconds", "per_second", "mfu")
FILES = "*/**/metrics.jsonl", "*/**/*.pt", "*/**/*.safetensors"


def commands(checkout: Path, folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """The training runs: the folder each starts in, and its words. Their outputs go to `folder`."""
    basics, systems, alignment = (
        checkout / name for name in ("assignment1-basics", "assignment2-systems", "assignment5-alignment")
    )
    yield basics, words("cs336-basics", "demo", run=folder / "demo", data=folder / "text.py", steps=20)

    python = str(systems / ".venv" / "bin" / "python")
    data = {name: folder / "demo" / "data" / f"{name.split('-')[0]}.npy" for name in ("train-data", "valid-data")}
    shape = {"vocab-size": 2048, "context-length": 32, "d-model": 32, "num-layers": 2, "num-heads": 4, "d-ff": 64}
    for strategy in ("ddp-bucketed", "ddp+sharded-optimizer", "fsdp"):
        options = {"run": folder / strategy, "steps": 8, "batch-size": 8, "eval-windows": 8, "device": "cpu"}
        launch = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        train = ["cs336_systems", "--", "train", "--strategy", strategy, "--backend", "gloo", "tinystories-40m-tokens"]
        yield systems, [*launch, *words(*train, **data, **shape, **options)]
        yield systems, words("cs336-systems", "consolidate", run=folder / strategy)

    rl = folder / "rl"
    options = {"sft-examples": 256, "sft-epochs": 1, "grpo-steps": 2, "rollout-batch-size": 64, "held-out": 32}
    yield alignment, words("cs336-alignment", "demo", run=rl, **options)
    common = {"model": longer_context(rl / "model"), "device": "cpu", "precision": "float32"}
    pairs = {"train-data": folder / "pairs.jsonl", "held-out-pairs": 8, "batch-size": 8, "lr": 1e-3}
    yield alignment, words("cs336-alignment", "dpo", run=folder / "dpo", **common, **pairs)
    texts = {"train-data": rl / "data" / "sft.jsonl", "eval-data": folder / "held_out.jsonl"}
    packed = {**texts, "seq-length": 64, "batch-size": 16, "lr": 1e-3}
    yield alignment, words("cs336-alignment", "instruction-tune", run=folder / "tuned", **common, **packed)
    sampled = {
        "gradient-accumulation-steps": 2,
        "prompt": rl / "data" / "demo.prompt",
        "max-tokens": 32,
        "grading-workers": 1,
        "engine": "transformers",
        "train-data": rl / "data" / "train.jsonl",
        "eval-data": rl / "data" / "held_out.jsonl",
        "eval-examples": 16,
    }
    clipped = {"loss-type": "grpo_clip", "epochs-per-rollout-batch": 2, "train-batch-size": 32, "kl-coefficient": 0.01}
    grpo = {"n-grpo-steps": 2, "rollout-batch-size": 64, **clipped}
    sft = common | {"model": checkpoint(rl / "sft")}
    yield alignment, words("cs336-alignment", "grpo", run=folder / "grpo", **sft, **sampled, **grpo)
    rounds = {"n-ei-steps": 2, "question-batch-size": 32, "rollouts-per-question": 2, "batch-size": 8, "lr": 1e-3}
    yield alignment, words("cs336-alignment", "expert-iteration", run=folder / "ei", **sft, **sampled, **rounds)


def words(*start: str, **options: object) -> list[str]:
    """The words of a command, for which options may be written as in Python."""
    return [*start, *(word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value)))]


def longer_context(model: Path) -> Path:
    """A copy of the tiny model that takes 512 tokens: its positions are rotary, so no weight depends on them."""
    copy = shutil.copytree(model, model.with_name("longer"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    return copy


def checkpoint(run_dir: Path) -> Path:
    """The latest checkpoint of a run; the run comes first in `commands`."""
    return max((run_dir / "checkpoints").glob("step_*"))


def train(checkout: Path, folder: Path) -> None:
    """Run everything in a checkout, into a folder that is empty."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    (folder / "text.py").write_text("".join((stdlib / name).read_text() for name in ("argparse.py", "ast.py")))
    pairs, held_out = [], []
    for number in range(40):
        even = number % 2 == 0
        pairs.append({"prompt": f"Is {number} even?", "chosen": str(even), "rejected": str(not even)})
        held_out.append({"prompt": f"Is {number} odd?", "response": str(not even)})
    for name, rows in (("pairs", pairs), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # One thread: with several, which adds what first is chance, and a program's results differ from its own.
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    for start, command in commands(checkout, folder):
        program = start / ".venv" / "bin" / command[0]
        result = subprocess.run(
            [str(program) if program.is_file() else command[0], *command[1:]],
            cwd=start, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        if result.returncode:
            sys.exit(f"{' '.join(command)} failed in {start}:\n{result.stderr[-2000:]}")
        print(f"{checkout.name}: {' '.join(command[:2])} → {command[command.index('--run') + 1]}", flush=True)


def compare(old: Path, new: Path, renamed: Mapping[str, str]) -> tuple[int, list[str]]:
    """Compare the files of two folders: how many values there were, and what differs.

    Args:
        renamed: parts of the names of metrics, as they were → as they are.
    """
    compared, different = 0, []
    found = [[path for form in FILES for path in folder.glob(form) if path.is_file()] for folder in (old, new)]
    names = [sorted(str(path.relative_to(folder)) for path in paths) for folder, paths in zip((old, new), found)]
    if names[0] != names[1]:
        different.append(f"only in one of them: {sorted(set(names[0]) ^ set(names[1]))}")
    for name in sorted(set(names[0]) & set(names[1])):
        before, after = dict(leaves(read(old / name))), dict(leaves(read(new / name)))
        for older, newer in renamed.items():
            before = {key.replace(older, newer): value for key, value in before.items()}
        compared += len(before)
        unequal = [key for key in before.keys() & after.keys() if not same(before[key], after[key])]
        different += [f"{name}: {key} is not what it was" for key in sorted(unequal)]
        if missing := sorted(before.keys() ^ after.keys()):
            different.append(f"{name}: only in one of them: {missing}")
    return compared, different


def read(path: Path) -> Any:
    """The contents of metrics or of a checkpoint."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested containers by their place, times excepted."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            if not any(word in str(key) for word in TIMES):
                yield from leaves(value, f"{prefix}/{key}")
    else:
        yield prefix, tree


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal; NaN equals NaN."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b or (a != a and b != b)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a checkout, set up")
    parser.add_argument("new", type=Path, help="another one")
    parser.add_argument("--renamed", nargs="*", default=[], metavar="OLD=NEW", help="names of metrics that changed")
    options = parser.parse_args()
    renamed = dict(pair.split("=") for pair in options.renamed)
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in ("old", "new")]
        for folder, checkout in zip(folders, (options.old, options.new)):
            folder.mkdir()
            train(checkout.resolve(), folder)
        compared, different = compare(*folders, renamed)
    print("\n".join(different) or f"the same: {compared} numbers and tensors")
    sys.exit(1 if different or not compared else 0)


if __name__ == "__main__":
    main()
