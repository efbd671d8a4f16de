"""One example type for all data sets."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A question with its reference answer."""

    prompt: str
    """The bare question, before any template."""
    answer: str
    """The reference answer in its shortest form, which a reward function compares with. Empty if the data set has
    prompts only."""
    solution: str | None = None
    """Derivation of the answer."""
    subject: str | None = None
    """Field that the question belongs to, as the data set names it."""
    level: str | None = None
    """Difficulty, as the data set names it."""
    id: str = ""
    """Identifier of the example in its data set."""
