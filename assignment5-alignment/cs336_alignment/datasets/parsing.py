"""The answer in a free response: the letter of a choice, or the last number."""

import re
from collections.abc import Mapping
from typing import Any

_LETTERS = "ABCD"
# No letter of a choice is the beginning of a word, or the article of what follows: "A virus", but "A because ...".
_LETTER = r"[\"'*(\[{`]*[A-D](?![\w'’])(?!(?<=A)\s+(?!(?:and|as|because|for|is|or|since|which)\b)[a-z])"
_LETTERS_STATED = rf"({_LETTER}(?:[\"'*)\]}}`]*\s*(?:,|/|&|\bor\b|\band\b)\s*{_LETTER})*)"
# Possessive quantifiers (*+): white space has no two ways to match, of which a long stretch would make very many.
#: Where a letter may stand, from what says the most to what says the least.
_PLACES = (
    re.compile(r"\A\s*(\**[A-D])\**\s*(?:[.:,)]|\n|\Z)"),
    re.compile(rf"\b(?:[Aa]nswer|ANSWER)\b(?:\s+is)?\s*+:?\s*+(?:(?:option|choice)\s*+)?{_LETTERS_STATED}"),
    re.compile(r"([(\[{][A-D][)\]}])"),
    re.compile(rf"\b(?:[Oo]ption|[Cc]hoice)\s+{_LETTERS_STATED}"),
)
_STATEMENT = re.compile(r"\banswer(?:\s+is|\s*:)\s*+:?\s*+([^\n]+)", re.IGNORECASE)

_NUMBER = re.compile(
    r"(?<![0-9.])"  # not the rest of a number
    r"((?<![\w)\]])[-−])?"  # a sign, unless something stands before it from which the number is subtracted
    r"\$?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def parse_mmlu_response(mmlu_example: Mapping[str, Any], model_output: str) -> str | None:
    """The letter that a response chooses, or None if it chooses none or more than one.

    The first of these that the response has decides: a letter at its start, a letter stated as the answer, a letter in
    brackets, a letter called an option or a choice, or exactly the text of one option, alone or stated as the answer.

    Args:
        mmlu_example: the question; of its fields only `options`, the four texts, matters, and may be absent.
        model_output: the response.

    >>> parse_mmlu_response({"options": ["100", "1", "10", "unknown"]}, "The correct answer is B. There is only one.")
    'B'
    """
    for place in _PLACES:
        letters = set(re.findall(r"\b[A-D]\b", " ".join(place.findall(model_output))))
        if letters:
            return letters.pop() if len(letters) == 1 else None
    stated = [model_output, *_STATEMENT.findall(model_output)]
    texts = {_bare(text) for text in (*stated, *(text.partition(". ")[0] for text in stated))}
    chosen = [letter for letter, option in zip(_LETTERS, mmlu_example.get("options", ())) if _bare(option) in texts]
    return chosen[0] if len(chosen) == 1 else None


def parse_gsm8k_response(model_output: str) -> str | None:
    """The last number of a response, without thousands separators, or None if it has none.

    >>> parse_gsm8k_response("Natalia sold 48 + 24 = 1,072 clips altogether.")
    '1072'
    """
    numbers = list(_NUMBER.finditer(model_output))
    if not numbers:
        return None
    sign, digits = numbers[-1].groups()
    return ("-" if sign else "") + digits.replace(",", "")


def _bare(text: str) -> str:
    return text.strip(" \t\n\"'`*.").casefold()
