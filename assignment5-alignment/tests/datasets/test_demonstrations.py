"""Rows for supervised fine-tuning."""

import gzip
import json

import pytest

from cs336_alignment.datasets.demonstrations import Demonstration, load_demonstrations


def write(path, *rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"prompt": "p", "response": " r\n"}, Demonstration("p", " r\n")),
        ({"prompt": "p", "response": "r", "ground_truth": "7"}, Demonstration("p", "r", "7")),
        ({"prompt": "p", "response": "r", "answer": "7", "other": [1]}, Demonstration("p", "r", "7")),
        ({"prompt": "p", "response": "r", "answer": None}, Demonstration("p", "r")),
        ({"instruction": "i", "input": "", "output": "o"}, Demonstration("i", "o")),
        ({"instruction": "i", "input": "about\nthis", "output": "o"}, Demonstration("i\nabout\nthis", "o")),
        ({"instruction": "i", "response": "o"}, Demonstration("i", "o")),
    ],
)
@pytest.mark.parametrize("name", ["sft.jsonl", "sft.jsonl.gz"])
def test_forms_of_rows(tmp_path, row, example, name):
    assert load_demonstrations(write(tmp_path / name, row)) == [example]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p"}, "line 2: field 'response' is missing; the row has prompt"),
        ({"response": "r"}, "line 2: field 'prompt' is missing; the row has response"),
        ({"prompt": "p", "response": ""}, "line 2: field 'response' is empty"),
        ({"prompt": "p", "response": "r", "ground_truth": 7}, "line 2: field 'ground_truth' is 7, but must be a str"),
        ({"instruction": "i", "output": 1}, "line 2: field 'output' is 1, but must be a string"),
        ({"instruction": "i", "input": 1, "output": "o"}, "line 2: field 'input' is 1, but must be a string"),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path, row, message):
    path = write(tmp_path / "sft.jsonl", {"prompt": "p", "response": "r"}, row)
    with pytest.raises(ValueError, match=message):
        load_demonstrations(path)
