"""Prompts with the responses that a model is to learn."""

from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.datasets.rows import Row, read_json_rows


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate."""

    prompt: str
    response: str
    answer: str | None = None
    """The reference answer, where the file has one: with it, wrong responses can be filtered out."""


def load_demonstrations(path: Path) -> list[Demonstration]:
    """Read JSON lines for supervised fine-tuning, also gzipped (`.gz`).

    Two forms of rows are known: `prompt` and `response`, as in the course's reasoning traces, with the reference
    answer in `ground_truth` or `answer` if there is one; and Alpaca's `instruction` and `output` (or `response`), whose
    `input`, if not empty, goes below the instruction.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks a field or has a wrong one, or the file is broken or empty.
    """
    return [_example(row) for row in read_json_rows(path)]


def instruction_with_input(row: Row) -> str:
    """The request of a row in Alpaca's form: its instruction, then, in a line of its own, what it is about."""
    instruction = row.text("instruction")
    about = row.text("input", may_be_empty=True) if "input" in row else ""
    return f"{instruction}\n{about}" if about.strip() else instruction


def _example(row: Row) -> Demonstration:
    if "instruction" in row:
        return Demonstration(instruction_with_input(row), row.text("output" if "output" in row else "response"))
    answer = next((row.text(name) for name in ("ground_truth", "answer") if name in row), None)
    return Demonstration(row.text("prompt"), row.text("response"), answer)
