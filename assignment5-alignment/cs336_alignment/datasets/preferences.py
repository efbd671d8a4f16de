"""Preference pairs: two responses to a prompt, of which people preferred one."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.datasets.demonstrations import instruction_with_input
from cs336_alignment.datasets.rows import Row, read_json_rows

#: The parts of Anthropic's data that the course uses.
HH_SUBSETS = ("helpful-base", "harmless-base", "helpful-online", "helpful-rejection-sampled")

_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class PreferencePair:
    """Two responses to a prompt."""

    prompt: str
    chosen: str
    rejected: str


def load_preferences(path: Path) -> tuple[list[PreferencePair], Counter[str]]:
    """Read JSON lines of preference pairs, also gzipped (`.gz`), and keep those with one request and one reply.

    A row may have one of three forms: Anthropic's, in which `chosen` and `rejected` are whole dialogues of "Human:" and
    "Assistant:" (Bai et al. 2022); `conversations` with the replies `chosen` and `rejected`, in which each turn has a
    `from` and a `value`; or `instruction` (with `input`) or `prompt`, `chosen` (or `output`) and `rejected`.

    Returns:
        The pairs, and the numbers of rows that were left out, by reason.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks a field or has a wrong one, the file is broken or empty, or no pair is left.
    """
    pairs: list[PreferencePair] = []
    left_out: Counter[str] = Counter()
    for row in read_json_rows(path):
        pair = _pair(row)
        if isinstance(pair, str):
            left_out[pair] += 1
        elif not pair.chosen or not pair.rejected:
            left_out["an empty response"] += 1
        elif pair.chosen == pair.rejected:
            left_out["equal responses"] += 1
        else:
            pairs.append(pair)
    if not pairs:
        reasons = ", ".join(f"{count} for {reason}" for reason, count in left_out.items())
        raise ValueError(f"{path}: every row was left out ({reasons})")
    return pairs, left_out


def _pair(row: Row) -> PreferencePair | str:
    """Return the pair in a row, or the reason for leaving the row out."""
    if "conversations" in row:
        return _from_conversation(row)
    if "instruction" in row:
        chosen = row.text("chosen" if "chosen" in row else "output", may_be_empty=True)
        return PreferencePair(instruction_with_input(row), chosen, row.text("rejected", may_be_empty=True))
    if "prompt" in row:
        chosen, rejected = (row.text(name, may_be_empty=True) for name in ("chosen", "rejected"))
        return PreferencePair(row.text("prompt"), chosen, rejected)
    return _from_dialogues(row)


def _from_dialogues(row: Row) -> PreferencePair | str:
    exchanges = []
    for name in ("chosen", "rejected"):
        start, *turns = _TURN.split(row.text(name))
        if start.strip() or not turns:
            raise row.wrong(name, "is not a dialogue; it must begin with '\\n\\nHuman:'")
        if turns[::2] != ["Human", "Assistant"]:
            return "more than one turn each"
        exchanges.append([text.strip() for text in turns[1::2]])
    (prompt, chosen), (other_prompt, rejected) = exchanges
    if prompt != other_prompt:
        return "different prompts"
    return PreferencePair(prompt, chosen, rejected) if prompt else "an empty prompt"


def _from_conversation(row: Row) -> PreferencePair | str:
    conversation = row.fields["conversations"]
    if not isinstance(conversation, list):
        raise row.wrong("conversations", "must be a list of turns")
    speakers, texts = zip(*(_turn(row, "conversations", turn) for turn in conversation)) if conversation else ((), ())
    if speakers != ("human",):
        return "a system message" if speakers == ("system", "human") else "more than one turn each"
    (_, chosen), (_, rejected) = (_turn(row, name, row.fields.get(name)) for name in ("chosen", "rejected"))
    return PreferencePair(texts[0], chosen, rejected)


def _turn(row: Row, name: str, turn: object) -> tuple[str, str]:
    """Return the speaker and the text of a turn."""
    if not isinstance(turn, dict):
        raise row.wrong(name, "must hold turns with a 'from' and a 'value'")
    said = Row(row.path, row.number, turn, row.counted_in)
    return said.text("from"), said.text("value", may_be_empty=True)
