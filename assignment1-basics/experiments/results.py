"""The files of results: what was measured, and where it comes from."""

import json
import re
from pathlib import Path
from typing import Any

import torch

from cs336_basics.run_log import environment, write_atomically

RESULTS = Path(__file__).parent.parent / "results"


def write_result(name: str, what: str, content: dict[str, Any], folder: Path = RESULTS, device: str = "cpu") -> Path:
    """Write `content` with its origin (day, commit, command, versions, device) to `<folder>/<name>.json`."""
    path = folder / f"{name}.json"
    record = {"what": what, **environment(torch.device(device)), **content}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    text = re.sub(r'\[\n[^][{}"]*\]', _on_one_line, text)  # curves; no string of JSON has a newline in it
    write_atomically(path, text + "\n")
    print(f"written: {path}")
    return path


def _on_one_line(numbers: re.Match[str]) -> str:
    """A list of numbers, without the line that JSON gives each of them."""
    return f"[{' '.join(numbers[0][1:-1].split())}]"


def read_result(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read `<folder>/<name>.json`."""
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
