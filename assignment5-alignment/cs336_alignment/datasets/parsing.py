"""Finding the answer in a free-form response: the letter of a choice, or the last number."""

import re
from collections.abc import Mapping
from typing import Any

_LETTERS = "ABCD"
# A letter of a choice does not begin a word and is not an article: "A virus", but "A because ...".
_LETTER = r"[\"'*(\[{`]*[A-D](?![\w'’])(?!(?<=A)\s+(?!(?:and|as|because|for|is|or|since|which)\b)[a-z])"
_LETTERS_STATED = rf"({_LETTER}(?:[\"'*)\]}}`]*\s*(?:,|/|&|\bor\b|\band\b)\s*{_LETTER})*)"
# Possessive quantifiers (*+) keep white space from matching in several ways, which would take exponential time.
#: Where a letter may occur, from the most to the least explicit place.
_PLACES = (
    re.compile(r"\A\s*(\**[A-D])\**\s*(?:[.:,)]|\n|\Z)"),
    re.compile(rf"\b(?:[Aa]nswer|ANSWER)\b(?:\s+is)?\s*+:?\s*+(?:(?:option|choice)\s*+)?{_LETTERS_STATED}"),
    re.compile(r"([(\[{][A-D][)\]}])"),
    re.compile(rf"\b(?:[Oo]ption|[Cc]hoice)\s+{_LETTERS_STATED}"),
)
_STATEMENT = re.compile(r"\banswer(?:\s+is|\s*:)\s*+:?\s*+([^\n]+)", re.IGNORECASE)

_NUMBER = re.compile(
    r"(?<![0-9.])"  # not the end of a longer number
    r"((?<![\w)\]])[-−])?"  # a sign, unless the number is subtracted from something before it
    r"\$?((?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def parse_mmlu_response(mmlu_example: Mapping[str, Any], model_output: str) -> str | None:
    """Find the letter that a response chooses; None if it chooses none, or more than one.

    The first of these that occurs in the response decides: a letter at its start, a letter stated as the answer, a
    letter in brackets, a letter called an option or a choice, or the exact text of one option, alone or stated as the
    answer.

    Args:
        mmlu_example: the question. Only its field `options`, the four texts, is used, and it may be absent.
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
    """Find the last number in a response, without thousands separators; None if there is no number.

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
