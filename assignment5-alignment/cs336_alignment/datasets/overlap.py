"""Whether problems of an evaluation are among those of training."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence

from cs336_alignment.datasets.demonstrations import Demonstration
from cs336_alignment.datasets.example import Example
from cs336_alignment.datasets.preferences import PreferencePair

#: What has a question as its prompt, bare or inside a template.
HasPrompt = Example | Demonstration | PreferencePair


def check_no_overlap(train: Sequence[HasPrompt], evaluation: Sequence[HasPrompt], allow: bool) -> int:
    """Refuse to train on problems that the model will be evaluated on.

    Args:
        train: what is trained on.
        evaluation: what is evaluated on.
        allow: only count them.

    Returns:
        How many training rows have a problem of the evaluation.

    Raises:
        ValueError: there are some, and `allow` is false.
    """
    shared = find_overlap(train, evaluation)
    if shared and not allow:
        example = " ".join(train[shared[0]].prompt.split())
        raise ValueError(
            f"{len(shared)} of {len(train)} training rows have a problem of the evaluation in them, such as "
            f"{example if len(example) <= 200 else '...' + example[-197:]!r}; "
            "take other data, or train on them all the same with --allow-overlap"
        )
    return len(shared)


def find_overlap(train: Sequence[HasPrompt], evaluation: Sequence[HasPrompt]) -> list[int]:
    """Indices of the training rows that have a problem of the evaluation in them.

    A problem counts as found if its lines stand among those of the training prompt, one after the other, each the same
    but for capitals, spaces, Unicode variants and code fences. What stands before it in its first line, as templates
    have it (`User: `), does not matter.
    """
    problems_by_first_line: dict[str, list[list[str]]] = defaultdict(list)
    for example in evaluation:
        if lines := _lines(example.prompt):
            first, *others = (_normalise(line) for line in lines)
            problems_by_first_line[first].append(others)

    def has_problem(prompt: str) -> bool:
        lines = _lines(prompt)
        normalised = [_normalise(line) for line in lines]
        return any(
            normalised[number : number + len(others)] == others
            for number, line in enumerate(lines, start=1)
            for ending in _endings(line)
            for others in problems_by_first_line.get(_normalise(ending), ())
        )

    return [index for index, example in enumerate(train) if has_problem(example.prompt)]


def _lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip("` \t")]


def _endings(line: str) -> Iterator[str]:
    """The line, and what follows each colon in it."""
    yield line
    for colon in re.finditer(r":\s", line):
        yield line[colon.end() :]


def _normalise(line: str) -> str:
    """Without capitals, Unicode variants, fences, and spaces other than between words."""
    words = unicodedata.normalize("NFKC", line).casefold().strip("` \t").split()
    return re.sub(r" (?!\w)|(?<!\w) ", "", " ".join(words))
