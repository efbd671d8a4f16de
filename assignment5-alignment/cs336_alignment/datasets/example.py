"""One example type for all data sets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A question with its reference answer."""

    prompt: str
    """The bare question, before any template."""
    answer: str
    """The reference answer, as short as the data set has it: what a reward function compares with. Empty where a
    data set has prompts only."""
    solution: str | None = None
    """How the answer comes about, in words."""
    subject: str | None = None
    """The field that the question is from, in the data set's words."""
    level: str | None = None
    """The difficulty, in the data set's words."""
    id: str = ""
    """The data set's name of it."""
