"""Reading rows: forms of files, and error messages of one sentence."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cs336_alignment.datasets.rows import read_csv_rows, read_json_rows

ROWS = [{"a": "x", "n": 1}, {"a": "line\u2028separator, ünïcödé", "n": 2.5}]


@pytest.mark.parametrize("form", ["lines", "blank lines", "crlf", "list", "indented list", "byte order mark"])
@pytest.mark.parametrize("packed", [False, True])
def test_forms_of_json(tmp_path, form, packed):
    lines = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    text = {
        "lines": "\n".join(lines),
        "blank lines": "\n\n" + "\n   \n".join(lines) + "\n\n",
        "crlf": "\r\n".join(lines) + "\r\n",
        "list": json.dumps(ROWS),
        "indented list": json.dumps(ROWS, indent=2),
        "byte order mark": "\ufeff" + "\n".join(lines),
    }[form]
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.json")
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert [row.fields for row in read_json_rows(path)] == ROWS


def test_rows_know_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n\n{"a": 2}\n')
    assert [row.place for row in read_json_rows(path)] == [f"{path}, line 1", f"{path}, line 4"]
    path.write_text('[{"a": 1},\n\n{"a": 2}]')
    assert [row.place for row in read_json_rows(path)] == [f"{path}, row 1", f"{path}, row 2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: it has no rows"),
        (b"\n \n", "is empty: it has no rows"),
        (b"[]", "is empty: it has no rows"),
        (b'{"a": 1}\n{"a": \n', r", line 2: broken JSON \(Expecting value at column 6\)"),
        (b'{"a": 1}{"a": 2}', r", line 1: broken JSON \(Extra data at column 9\)"),
        (b'{"a": 1}\n[1, 2]\n', r", line 2: \[1, 2\] is not a JSON object with named fields"),
        (b'[{"a": 1}, 7]', r", row 2: 7 is not a JSON object"),
        (b'[{"a": 1}', r"broken JSON"),
        (b'{"a": 1}\n{"a": "\xff"}\n', r", line 2: byte 0xff at column 8 is not UTF-8; convert the file to UTF-8"),
        (b'{"a": ' + b"[" * 100_000, r", line 1: broken JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", r", line 1: broken JSON \(Exceeds the limit"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json_rows(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-9], lambda data: b"no gzip", lambda data: data[:20] + b"\0" * 30]
)
def test_a_damaged_archive(tmp_path, damage):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(damage(gzip.compress(b'{"a": "abcdefghijklmnopqrstuvwxyz"}\n' * 3)))
    with pytest.raises(ValueError, match=r"rows.jsonl.gz is not a complete gzip file"):
        read_json_rows(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no data file .*nowhere.jsonl"):
        read_json_rows(tmp_path / "nowhere.jsonl")


@given(st.lists(st.fixed_dictionaries({"a": st.text(), "b": st.integers() | st.none()}), min_size=1, max_size=4))
def test_json_lines_come_back(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row.fields for row in read_json_rows(path)] == rows


def test_csv_cells_may_span_lines(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes('a,b\r\n"x, ""y""\nz",2\r\n\r\nü,3\r\n'.encode())
    rows = read_csv_rows(path)
    assert [row.fields for row in rows] == [{"a": 'x, "y"\nz', "b": "2"}, {"a": "ü", "b": "3"}]
    assert [row.number for row in rows] == [2, 5]
    assert read_csv_rows(path, ["p", "q"])[0].fields == {"p": "a", "q": "b"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n", "is empty: it has no rows"),
        ("", "is empty: it has no rows"),
        ("a,b\n1,2\n1,2,3\n", ", line 3: 3 columns, but there must be 2: a, b"),
        ('a,b\n1,2\n"1,2\n', r", line 3: broken CSV \(unexpected end of data\)"),
    ],
)
def test_what_is_wrong_with_a_csv_file(tmp_path, content, message):
    path = tmp_path / "rows.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_csv_rows(path)


def row(tmp_path, **fields):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(fields))
    return read_json_rows(path)[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"b": "x"}, "line 1: field 'a' is missing; the row has b"),
        ({"a": None, "b": 1}, "line 1: field 'a' is missing; the row has a, b"),
        ({"a": 12}, "line 1: field 'a' is 12, but must be a string"),
        ({"a": ["x" * 100]}, r"line 1: field 'a' is \['x+\.\.\., but must be a string"),
        ({"a": " \n"}, "line 1: field 'a' is empty"),
        ({"a": "\ud800"}, "line 1: field 'a' holds half of a surrogate pair"),
    ],
)
def test_what_is_wrong_with_a_text_field(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        row(tmp_path, **fields).text("a")


def test_empty_texts_where_they_are_fine(tmp_path):
    assert row(tmp_path, a="").text("a", may_be_empty=True) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(145.0, "145"), ("145.0", "145"), (-3, "-3"), (0.5, "0.5"), (1e16, "1" + "0" * 16), (2 / 3, "0.6666666666666666")],
)  # fmt: skip
def test_numbers_are_written_short(tmp_path, value, text):
    assert row(tmp_path, a=value).number_text("a") == text


@pytest.mark.parametrize("value", ["many", True, [1], float("nan"), float("inf"), "nan", 10**400])
def test_values_that_are_not_numbers(tmp_path, value):
    with pytest.raises(ValueError, match=r"line 1: field 'a' is .*, but must be a number"):
        row(tmp_path, a=value).number_text("a")
