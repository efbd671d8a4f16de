"""Reading questions with reference answers: every data set becomes a list of one type, `Example`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.datasets.example import Example
from cs336_alignment.datasets.rows import Row, first_line, is_csv, read_csv_rows, read_json_rows
from cs336_alignment.grading.extract import extract_boxed

_LETTERS = ("A", "B", "C", "D")
_MMLU_COLUMNS = ["question", *_LETTERS, "answer"]


def load_examples(path: Path, kind: str | None = None) -> list[Example]:
    """Read a file of questions: JSON lines, a JSON list or CSV, also gzipped (`.gz`).

    Args:
        path: the file; for MMLU also a folder, all of whose CSV files are read.
        kind: name of the data set, one of `KINDS`. Default: decided by the fields of the first row.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks a field or has a wrong one, the file is broken or empty, or the data set is not known.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"there is no kind of data set {kind!r}; choose one of {', '.join(KINDS)}")
    if path.is_dir():
        files = sorted(file for file in path.rglob("[!.]*") if is_csv(file))
        if not files:
            raise ValueError(f"folder {path} has no CSV files, which MMLU consists of; give the path of a file")
        return [example for file in files for example in load_examples(file, kind or "mmlu")]
    rows = _read_rows(path, kind)
    form = KINDS[kind or _detect(rows[0])]
    return [form.convert(row) for row in rows]


@dataclass(frozen=True)
class _Kind:
    fields: tuple[str, ...]
    """Fields that distinguish its rows from those of other data sets."""
    convert: Callable[[Row], Example]


def _read_rows(path: Path, kind: str | None) -> list[Row]:
    if not is_csv(path):
        return read_json_rows(path)
    if kind is None:  # MMLU's files are those without a header
        kind = "simple_safety_tests" if "harm_area" in first_line(path) else "mmlu"
    return read_csv_rows(path, _MMLU_COLUMNS if kind == "mmlu" else None)


def _detect(row: Row) -> str:
    for name, kind in KINDS.items():
        if all(field in row for field in kind.fields):
            return name
    known = "; ".join(f"{name} has {', '.join(kind.fields)}" for name, kind in KINDS.items())
    raise ValueError(f"{row.place}: fields {', '.join(row.fields)} belong to no known data set ({known})")


def _math(row: Row) -> Example:
    solution = row.text("solution")
    # In the authors' files the answer is in the solution only. Two training problems have an empty box.
    answer = row.text("answer", may_be_empty=True) if "answer" in row else extract_boxed(solution)
    if answer is None:
        raise row.wrong("solution", r"has no \boxed{} answer, and there is no field 'answer'")
    return Example(
        row.text("problem"), answer, solution,
        subject=_either(row, "subject", "type"), level=_either(row, "level"), id=_either(row, "unique_id") or _id(row),
    )  # fmt: skip


def _gsm8k(row: Row) -> Example:
    solution, marker, answer = row.text("answer").rpartition("####")
    answer = answer.strip().replace(",", "")
    if not marker or not answer:
        raise row.wrong("answer", "does not end in '#### ' and the number")
    return Example(row.text("question"), answer, solution.strip(), id=_id(row))


def _svamp(row: Row) -> Example:
    return Example(
        f"{row.text('Body').strip()} {row.text('Question').strip()}", row.number_text("Answer"),
        _either(row, "Equation"), subject=_either(row, "Type"), id=_either(row, "ID") or _id(row),
    )  # fmt: skip


def _asdiv(row: Row) -> Example:
    answer = re.sub(r"\s*\([^()]*\)$", "", row.text("answer").strip())  # "9 (apples)"
    return Example(
        f"{row.text('body').strip()} {row.text('question').strip()}", answer,
        _either(row, "formula"), subject=_either(row, "solution_type"), id=_id(row),
    )  # fmt: skip


def _mawps(row: Row) -> Example:
    return Example(row.text("input"), row.number_text("target"), subject=_either(row, "type"), id=_id(row))


def _mmlu(row: Row) -> Example:
    answer = row.text("answer").strip()
    if answer not in _LETTERS:
        raise row.wrong("answer", f"is {answer!r}, but must be one of {', '.join(_LETTERS)}")
    options = "".join(f"\n{letter}. {row.text(letter)}" for letter in _LETTERS)
    subject = re.sub(r"_(test|dev|val)$", "", _stem(row)).replace("_", " ")
    return Example(row.text("question") + options, answer, subject=subject, id=_id(row))


def _alpaca_eval(row: Row) -> Example:
    # Its "output" is a response of another model, for comparison, not a correct answer.
    return Example(row.text("instruction"), "", subject=_either(row, "dataset"), id=_id(row))


def _simple_safety_tests(row: Row) -> Example:
    prompt = row.text("prompts_final" if "prompts_final" in row else "prompt")
    return Example(prompt, "", subject=_either(row, "harm_area"), id=_either(row, "id") or _id(row))


def _arithmetic(row: Row) -> Example:
    return Example(
        row.text("question"), row.text("answer"), row.text("trace"), "arithmetic", id=_either(row, "id") or _id(row)
    )


#: The data sets that `load_examples` reads, in the order in which it tries them.
KINDS: dict[str, _Kind] = {
    "math": _Kind(("problem", "solution"), _math),
    "svamp": _Kind(("Body", "Question", "Answer"), _svamp),
    "asdiv": _Kind(("body", "question", "answer"), _asdiv),
    "mawps": _Kind(("input", "target"), _mawps),
    "arithmetic": _Kind(("question", "trace", "answer"), _arithmetic),
    "mmlu": _Kind(tuple(_MMLU_COLUMNS), _mmlu),
    "gsm8k": _Kind(("question", "answer"), _gsm8k),
    "alpaca_eval": _Kind(("instruction", "generator"), _alpaca_eval),
    "simple_safety_tests": _Kind(("harm_area",), _simple_safety_tests),
}


def _either(row: Row, *names: str) -> str | None:
    """Return the first of these fields that the row has."""
    return next((row.text(name) for name in names if name in row), None)


def _id(row: Row) -> str:
    return f"{_stem(row)}/{row.number}"


def _stem(row: Row) -> str:
    return row.path.name.partition(".")[0]
