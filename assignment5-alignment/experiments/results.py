"""Result files: what was measured, with which command and versions, where, and when."""

import json
from pathlib import Path
from typing import Any

import torch

from cs336_alignment.run_folder import write_atomically
from cs336_alignment.runs.run_log import describe_environment

RESULTS = Path(__file__).parent.parent / "results"


def write_result(path: Path, what: str, device: torch.device, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write a result file, and print its rows.

    Args:
        more: further entries of the file, or other values for those that describe the environment.
    """
    record = {"what": what, **describe_environment(device), **more, "rows": rows}
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    for row in rows:
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
        print("  ".join(f"{key} {value}" for key, value in shown.items()))
    print(f"written: {path}")
