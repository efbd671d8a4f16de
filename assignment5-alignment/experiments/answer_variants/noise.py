"""Texts that are not answers at all."""

import random

_PIECES = [
    r"\frac", "{", "}", "(", ")", "[", "]", "^", "_", r"\sqrt", r"\pi", "+", "-", "*", "/", "=", "<", r"\le", ",",
    " ", "1", "2", "37", "0.5", "x", "y", "i", "e", "!", "%", "$", r"\$", r"\%", r"\cup", r"\infty", r"\text{",
    "and", "or", "|", "&", r"\begin{pmatrix}", r"\end{pmatrix}", r"\\", "\\", r"\left", r"\right", "é", "∞", "²",
    "½", "√", "\ud800", "\0", "\n", r"\sin", r"\log", r"\sum_{k=1}^{n}", r"\int", r"^\circ", r"\{", r"\}", r"\pm",
    ":", ";", ".", "'", '"', "#", "SELECT", "__import__", "10^{10}", "9" * 20, r"\binom", r"\lim_{x\to0}",
    r"\mathbb{R}", r"\in", r"\overline{", r"\cdot",
]  # fmt: skip


def noise(source: random.Random, answers: list[str]) -> str:
    """Make a text at random: pieces of LaTeX, a damaged answer, random characters, or one piece many times."""
    choice = source.random()
    if choice < 0.4:
        return "".join(source.choices(_PIECES, k=source.randint(1, 12)))
    if choice < 0.8:
        damaged = list(source.choice(answers))
        for _ in range(source.randint(1, 4)):
            start = source.randrange(len(damaged) + 1)
            damaged[start : start + source.randint(0, 2)] = source.choice([[], [source.choice(_PIECES)]])
        return "".join(damaged)
    if choice < 0.9:
        return "".join(chr(source.choice([source.randrange(32, 127), source.randrange(0x110000)])) for _ in range(20))
    return source.choice(_PIECES) * source.randint(1, 400)
