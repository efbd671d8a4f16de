"""Preference pairs: three forms of rows, and which are left out."""

import json

import pytest

from cs336_alignment.datasets.preferences import PreferencePair, load_preferences

HH = {
    "chosen": "\n\nHuman: Why?\nTell me.\n\nAssistant: Because.",
    "rejected": "\n\nHuman: Why?\nTell me.\n\nAssistant: No. ",
}
TALK = {
    "conversations": [{"from": "human", "value": "Why?"}],
    "chosen": {"from": "gpt", "value": "Because."},
    "rejected": {"from": "gpt", "value": "No."},
}  # fmt: skip
ALPACA = {"instruction": "Correct it.", "input": "freind", "output": "friend", "rejected": "friend, dummy"}


def write(tmp_path, *rows):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (HH, PreferencePair("Why?\nTell me.", "Because.", "No.")),
        (TALK, PreferencePair("Why?", "Because.", "No.")),
        (ALPACA, PreferencePair("Correct it.\nfreind", "friend", "friend, dummy")),
        (ALPACA | {"chosen": "friend!"}, PreferencePair("Correct it.\nfreind", "friend!", "friend, dummy")),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, PreferencePair("p", "c", "r")),
    ],
)
def test_forms_of_rows(tmp_path, row, pair):
    pairs, left_out = load_preferences(write(tmp_path, row))
    assert pairs == [pair]
    assert left_out.total() == 0


def test_a_colon_within_a_turn_begins_no_turn(tmp_path):
    row = {name: f"\n\nHuman: The\nHuman: race, Human: \n\nAssistant: {name}: Human:" for name in HH}
    assert load_preferences(write(tmp_path, row))[0] == [
        PreferencePair("The\nHuman: race, Human:", "chosen: Human:", "rejected: Human:")
    ]


TWO_TURNS = "\n\nHuman: Hm.\n\nAssistant: Yes."


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({name: text + TWO_TURNS for name, text in HH.items()}, "more than one turn each"),
        (HH | {"rejected": HH["rejected"] + TWO_TURNS}, "more than one turn each"),
        (HH | {"rejected": "\n\nHuman: Why?\nTell me."}, "more than one turn each"),
        (HH | {"rejected": "\n\nAssistant: Hello.\n\nHuman: Hi."}, "more than one turn each"),
        (HH | {"rejected": "\n\nHuman: Why not?\n\nAssistant: No."}, "different prompts"),
        (HH | {"chosen": "\n\nHuman: Why?\nTell me.\n\nAssistant: "}, "an empty response"),
        (HH | {"rejected": HH["chosen"]}, "equal responses"),
        ({name: f"\n\nHuman: \n\nAssistant: {name}" for name in HH}, "an empty prompt"),
        (
            TALK | {"conversations": [{"from": "system", "value": "Be good."}, *TALK["conversations"]]},
            "a system message",
        ),
        (TALK | {"conversations": TALK["conversations"] * 3}, "more than one turn each"),
        (ALPACA | {"rejected": "friend"}, "equal responses"),
    ],
)
def test_what_is_left_out_is_counted(tmp_path, row, reason):
    pairs, left_out = load_preferences(write(tmp_path, row, HH, row))
    assert len(pairs) == 1
    assert left_out == {reason: 2}
    with pytest.raises(ValueError, match=rf"pairs.jsonl: every row was left out \(1 for {reason}\)"):
        load_preferences(write(tmp_path, row))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "x"}, "line 2: field 'chosen' is not a dialogue; it must begin with"),
        ({"chosen": HH["chosen"]}, "line 2: field 'rejected' is missing"),
        (HH | {"rejected": 3}, "line 2: field 'rejected' is 3, but must be a string"),
        (TALK | {"conversations": "Why?"}, "line 2: field 'conversations' must be a list of turns"),
        (
            TALK | {"conversations": ["Why?"]},
            "line 2: field 'conversations' must hold turns with a 'from' and a 'value'",
        ),
        (TALK | {"chosen": {"from": "gpt"}}, "line 2: field 'value' is missing; the row has from"),
        (TALK | {"rejected": None}, "line 2: field 'rejected' must hold turns"),
        ({"instruction": "i", "rejected": "r"}, "line 2: field 'output' is missing"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_preferences(write(tmp_path, HH, row))
