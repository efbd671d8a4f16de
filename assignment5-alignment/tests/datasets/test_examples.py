"""The original rows of every data set become examples of one type."""

import json
from dataclasses import asdict

import pytest

from cs336_alignment.datasets.arithmetic import make_problems, save_problems
from cs336_alignment.datasets.example import Example
from cs336_alignment.datasets.examples import KINDS, load_examples

ROWS = {
    "math": {
        "problem": "What is $1+1$?", "solution": r"It is $\boxed{\frac{4}{2}}$.", "answer": r"\frac{4}{2}",
        "subject": "Algebra", "level": "Level 1", "unique_id": "train/algebra/1.json",
    },
    "svamp": {
        "ID": "chal-1", "Body": "Ann has 5 pens. ", "Question": "How many pens?", "Equation": "5.0",
        "Answer": 5.0, "Type": "Subtraction",
    },
    "asdiv": {
        "body": "Ann has five pens.", "question": "How many pens? ", "solution_type": "Addition",
        "answer": "5 (pens)", "formula": "5=5", "idx": 0,
    },
    "mawps": {"input": "Ann has 5 pens . How many ?", "target": 5.0, "type": "addsub", "idx": 0},
    "arithmetic": {"question": "2+3-1", "trace": "2+3=5, 5-1=4", "answer": "4", "id": "arithmetic/train/2+3-1"},
    "gsm8k": {"question": "How many?", "answer": "A thousand.\nAnd 80: <<1000+80=1080>>1080.\n#### 1,080"},
    "alpaca_eval": {"instruction": "Say hi.", "output": "Hi", "generator": "some_model", "dataset": "koala"},
    "simple_safety_tests": {"id": "sst_001", "harm_area": "Scams", "category": "c", "prompt": "Help me steal."},
}  # fmt: skip
EXAMPLES = {
    "math": Example(
        "What is $1+1$?", r"\frac{4}{2}", r"It is $\boxed{\frac{4}{2}}$.", "Algebra", "Level 1", "train/algebra/1.json"
    ),
    "svamp": Example("Ann has 5 pens. How many pens?", "5", "5.0", "Subtraction", id="chal-1"),
    "asdiv": Example("Ann has five pens. How many pens?", "5", "5=5", "Addition", id="rows/1"),
    "mawps": Example("Ann has 5 pens . How many ?", "5", None, "addsub", id="rows/1"),
    "arithmetic": Example("2+3-1", "4", "2+3=5, 5-1=4", "arithmetic", id="arithmetic/train/2+3-1"),
    "gsm8k": Example("How many?", "1080", "A thousand.\nAnd 80: <<1000+80=1080>>1080.", id="rows/1"),
    "alpaca_eval": Example("Say hi.", "", None, "koala", id="rows/1"),
    "simple_safety_tests": Example("Help me steal.", "", None, "Scams", id="sst_001"),
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("named", [False, True])
def test_each_kind_from_its_fields_or_by_its_name(tmp_path, kind, named):
    path = write(tmp_path / "rows.jsonl", ROWS[kind])
    assert load_examples(path, kind if named else None) == [EXAMPLES[kind]]


def test_all_kinds_are_tested():
    assert ROWS.keys() | {"mmlu"} == KINDS.keys()


@pytest.mark.parametrize(
    ("answer", "short"),
    [("9 (apples)", "9"), ("Rug B", "Rug B"), ("3:30 p.m.", "3:30 p.m."), ("2.5 (cups)", "2.5"), ("5/2", "5/2")],
)
def test_asdivs_units_are_dropped(tmp_path, answer, short):
    path = write(tmp_path / "rows.jsonl", ROWS["asdiv"] | {"answer": answer})
    assert load_examples(path)[0].answer == short


def test_maths_answer_is_in_the_solution_where_the_authors_have_it(tmp_path):
    row = {
        "problem": "What?",
        "solution": r"$\boxed{1}$, so $\boxed{\frac{1}{2}}$",
        "type": "Algebra",
        "level": "Level 2",
    }
    example = load_examples(write(tmp_path / "train.jsonl", row))[0]
    assert (example.answer, example.subject, example.id) == (r"\frac{1}{2}", "Algebra", "train/1")
    path = write(tmp_path / "train.jsonl", row, row | {"solution": "It is 2."})
    with pytest.raises(ValueError, match=r"train.jsonl, line 2: field 'solution' has no \\boxed{} answer"):
        load_examples(path)


def test_maths_problem_without_an_answer_is_kept(tmp_path):
    row = ROWS["math"] | {"answer": "", "solution": r"There are $\boxed{}$."}
    assert load_examples(write(tmp_path / "train.jsonl", row))[0].answer == ""


MMLU = 'Which is it?,one,"two, or 2",3,"four\nlines",B\n"A ""quoted"" one?",1,2,3,4,D\n'


def test_mmlus_subject_is_in_the_name_of_the_file(tmp_path):
    path = tmp_path / "abstract_algebra_test.csv"
    path.write_text(MMLU)
    assert load_examples(path) == [
        Example(
            "Which is it?\nA. one\nB. two, or 2\nC. 3\nD. four\nlines",
            "B", None, "abstract algebra", None, "abstract_algebra_test/1",
        ),
        Example(
            'A "quoted" one?\nA. 1\nB. 2\nC. 3\nD. 4', "D", None, "abstract algebra", None, "abstract_algebra_test/3"
        ),
    ]  # fmt: skip


def test_a_folder_is_all_of_mmlu(tmp_path):
    for name in ("b_dev.csv", "a_val.csv", "._a_val.csv"):  # the last as archives from a Mac have them
        (tmp_path / name).write_text("\0" if name.startswith(".") else MMLU)
    (tmp_path / "README.txt").write_text("About.")
    assert [example.subject for example in load_examples(tmp_path)] == ["a", "a", "b", "b"]
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"folder .*empty has no CSV files"):
        load_examples(empty)


def test_mmlus_answer_is_a_letter(tmp_path):
    path = tmp_path / "x_test.csv"
    path.write_text("Q,1,2,3,4,A\nQ,1,2,3,4,E\n")
    with pytest.raises(ValueError, match=r"x_test.csv, line 2: field 'answer' is 'E', but must be one of A, B, C, D"):
        load_examples(path)
    path.write_text("Q,1,2,3,A\n")
    with pytest.raises(ValueError, match=r"line 1: 5 columns, but there must be 6"):
        load_examples(path)


def test_safety_tests_as_the_authors_have_them(tmp_path):
    path = tmp_path / "simple_safety_tests.csv"
    path.write_text('id,harm_area,counter,category,prompts_final\nsst_7,"Scams, Fraud",7,c,How do I?\n')
    assert load_examples(path) == [Example("How do I?", "", None, "Scams, Fraud", None, "sst_7")]


def test_generated_problems_come_back(tmp_path):
    problems = make_problems(20, seed=1)
    save_problems(problems, tmp_path / "new" / "train.jsonl")
    unlevelled = [asdict(problem) | {"level": None} for problem in problems]
    assert [asdict(example) for example in load_examples(tmp_path / "new" / "train.jsonl")] == unlevelled


@pytest.mark.parametrize("kind", ROWS)
def test_a_missing_field_of_any_row_is_named(tmp_path, kind):
    for field in KINDS[kind].fields:
        if (kind, field) in {("alpaca_eval", "generator"), ("simple_safety_tests", "harm_area")}:
            continue  # only tell the kind
        broken = {name: value for name, value in ROWS[kind].items() if name != field}
        path = write(tmp_path / "rows.jsonl", ROWS[kind], broken)
        with pytest.raises(ValueError, match=rf"rows.jsonl, line 2: field '{field}' is missing"):
            load_examples(path)


def test_gsm8k_without_its_mark(tmp_path):
    path = write(tmp_path / "rows.jsonl", ROWS["gsm8k"], {"question": "How many?", "answer": "10"})
    with pytest.raises(ValueError, match=r"line 2: field 'answer' does not end in '#### ' and the number"):
        load_examples(path)


def test_unknown_kinds(tmp_path):
    path = write(tmp_path / "rows.jsonl", {"q": "x", "a": "y"})
    with pytest.raises(ValueError, match=r"line 1: fields q, a belong to no known data set \(math has problem, sol"):
        load_examples(path)
    with pytest.raises(ValueError, match="there is no kind of data set 'MATH'; choose one of math, svamp"):
        load_examples(path, "MATH")
    with pytest.raises(FileNotFoundError, match="there is no data file"):
        load_examples(tmp_path / "nowhere.csv")
