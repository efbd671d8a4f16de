"""Demonstrations: prompts with responses to learn from."""

from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.datasets.rows import Row, read_json_rows


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate."""

    prompt: str
    response: str
    answer: str | None = None
    """The reference answer, if the file has one. It is needed to filter out wrong responses."""


def load_demonstrations(path: Path) -> list[Demonstration]:
    """Read JSON lines for supervised fine-tuning, also gzipped (`.gz`).

    A row may have one of two forms: `prompt` and `response`, as in the course's reasoning traces, optionally with the
    reference answer in `ground_truth` or `answer`; or Alpaca's `instruction` and `output` (or `response`), in which
    `input`, if it is not empty, is appended to the instruction.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks a field or has a wrong one, or the file is broken or empty.
    """
    return [_example(row) for row in read_json_rows(path)]


def instruction_with_input(row: Row) -> str:
    """Return the request of a row in Alpaca's form: its instruction and, on a line of its own, its input."""
    instruction = row.text("instruction")
    about = row.text("input", may_be_empty=True) if "input" in row else ""
    return f"{instruction}\n{about}" if about.strip() else instruction


def _example(row: Row) -> Demonstration:
    if "instruction" in row:
        return Demonstration(instruction_with_input(row), row.text("output" if "output" in row else "response"))
    answer = next((row.text(name) for name in ("ground_truth", "answer") if name in row), None)
    return Demonstration(row.text("prompt"), row.text("response"), answer)
