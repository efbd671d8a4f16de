"""Finding problems of an evaluation in training data."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

from cs336_alignment.datasets.demonstrations import Demonstration
from cs336_alignment.datasets.example import Example
from cs336_alignment.datasets.preferences import PreferencePair

#: Types that have a question as their prompt, bare or inside a template.
HasPrompt = Example | Demonstration | PreferencePair


def check_no_overlap(train: Sequence[HasPrompt], evaluation: Sequence[HasPrompt], allow: bool) -> int:
    """Refuse to train on problems that the model will be evaluated on.

    Args:
        train: the training data.
        evaluation: the evaluation data.
        allow: count the shared problems instead of refusing.

    Returns:
        The number of training rows that contain a problem of the evaluation.

    Raises:
        ValueError: there are such rows, and `allow` is False.
    """
    shared = find_overlap(train, evaluation)
    if shared and not allow:
        example = " ".join(train[shared[0]].prompt.split())
        raise ValueError(
            f"{len(shared)} of {len(train)} training rows have a problem of the evaluation in them, such as "
            f"{example if len(example) <= 200 else '...' + example[-197:]!r}; "
            "use other data, or train on them anyway with --allow-overlap"
        )
    return len(shared)


def find_overlap(train: Sequence[HasPrompt], evaluation: Sequence[HasPrompt]) -> list[int]:
    """Find the training rows that contain a problem of the evaluation, and return their indices.

    A row contains a problem if the problem's lines appear in the row's prompt in sequence. Capitals, spaces, Unicode
    variants and code fences are ignored, and so is text before the problem in its first line, such as a template's
    `User: `.
    """
    problems_by_first_line: dict[str, list[list[str]]] = defaultdict(list)
    for example in evaluation:
        if lines := _lines(example.prompt):
            first, *others = (_normalize(line) for line in lines)
            problems_by_first_line[first].append(others)

    def has_problem(prompt: str) -> bool:
        lines = _lines(prompt)
        normalized = [_normalize(line) for line in lines]
        return any(
            normalized[number : number + len(others)] == others
            for number, line in enumerate(lines, start=1)
            for ending in _endings(line)
            for others in problems_by_first_line.get(_normalize(ending), ())
        )

    return [index for index, example in enumerate(train) if has_problem(example.prompt)]


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip("` \t")]


def _endings(line: str) -> Iterator[str]:
    """Yield the line, and the rest of the line after each colon."""
    yield line
    for colon in re.finditer(r":\s", line):
        yield line[colon.end() :]


def _normalize(line: str) -> str:
    """Remove capitals, Unicode variants, code fences, and spaces other than those between words."""
    words = unicodedata.normalize("NFKC", line).casefold().strip("` \t").split()
    return re.sub(r" (?!\w)|(?<!\w) ", "", " ".join(words))
