"""Functions that tests run in worker processes."""

import os
import sys
import time
from pathlib import Path


def echo(response: str, truth: str) -> list[str]:
    return [response, truth]


def process_id(response: str, truth: str) -> int:
    return os.getpid()


def modules(response: str, truth: str) -> list[str]:
    return [name for name in response.split() if name in sys.modules]


def sleep(response: str, truth: str) -> str:
    time.sleep(float(response))
    return truth


def big_power(response: str, truth: str) -> int:
    """Call a C function that does not return."""
    return 9 ** (9**9) % int(response)


def fill_memory(response: str, truth: str) -> int:
    return len(bytearray(1 << 34))


def fail(response: str, truth: str) -> None:
    raise ValueError(f"no such answer: {response}")


def hang_at_first(response: str, truth: str) -> str:
    """Write a process id to the file `response`, and hang until killed; the next process finds the file."""
    path = Path(response)
    if path.exists():
        return "second attempt"
    path.with_suffix(".tmp").write_text(str(os.getpid()))
    path.with_suffix(".tmp").rename(path)
    time.sleep(60)
    return "first attempt"


def length_reward(response: str, ground_truth: str) -> dict[str, float]:
    """A reward function as a user may write one."""
    if response == "hang":
        time.sleep(60)
    correct = float(len(response) == int(ground_truth))
    return {"reward": correct, "format_reward": 1.0, "answer_reward": correct}
