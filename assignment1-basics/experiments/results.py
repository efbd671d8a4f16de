"""Files of results: what was measured, and how it can be repeated."""

import json
import re
from pathlib import Path
from typing import Any

from cs336_basics.run_folder import environment, write_atomically

RESULTS = Path(__file__).parent.parent / "results"
#: Folder inside results/ -> the results that are kept there.
FOLDERS = {
    "tokenizer": ("train_bpe", "tokenizer_experiments", "benchmark_tokenizer"),
    "accounting": ("accounting",),
    "training": (
        *("token_budget", "learning_rate_tuning", "learning_rate", "batch_size_experiment", "ablations"),
        *("main_experiment", "samples"),
    ),
    "speed": ("throughput", "benchmark_training_step", "tinystories_17m_h100", "shared_machine"),
    "leaderboard": ("leaderboard", "leaderboard_finals", "leaderboard_repeated"),
}


def result_path(name: str, folder: Path = RESULTS) -> Path:
    """Return the file of a result: `<name>.json` in its folder inside `folder`, if `FOLDERS` gives it one."""
    inside = next((inside for inside, names in FOLDERS.items() if name in names), "")
    return folder / inside / f"{name}.json"


def write_result(name: str, what: str, content: dict[str, Any], folder: Path = RESULTS, device: str = "cpu") -> Path:
    """Write a result with what is needed to repeat it (day, commit, command, versions, device), and return its path."""
    import torch

    from cs336_basics.run_log import PACKAGES

    path = result_path(name, folder)
    record = {"what": what, **environment(torch.device(device), PACKAGES), **content}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    text = re.sub(r'\[\n[^][{}"]*\]', _on_one_line, text)  # curves; a JSON string never contains a newline
    write_atomically(path, text + "\n")
    print(f"written: {path}")
    return path


def _on_one_line(numbers: re.Match[str]) -> str:
    """Join a list of numbers, which JSON spreads over one line per number, into one line."""
    return f"[{' '.join(numbers[0][1:-1].split())}]"


def read_result(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    """Read the result `name`."""
    return json.loads(result_path(name, folder).read_text(encoding="utf-8"))
