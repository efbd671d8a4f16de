"""Prompt templates: what is filled in, what stays as it is, and which files are prompts."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cs336_alignment.prompts.templates import STOPS, PromptTemplate, load_prompt

BUILT_IN = ["alpaca_sft", "mmlu", "question_only", "r1_zero", "zero_shot_system"]


def test_r1_zero_ends_where_the_model_begins_to_think():
    text = load_prompt("r1_zero").render("What is 2+2?")
    assert text.endswith("User: What is 2+2?\nAssistant: <think>")
    assert all(tag in text.partition("\n")[0] for tag in ("<think>", "</think>", "<answer>", "</answer>"))


def test_question_only_asks_for_a_box():
    text = load_prompt("question_only").render("What is 2+2?")
    assert text.startswith("What is 2+2?\n")
    assert r"\boxed{}" in text
    assert "<think>" not in text


def test_alpaca_template_letter_by_letter():
    assert load_prompt("alpaca_sft").render(instruction="Say hi.", response="Hi!") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:\nHi!"
    )


def test_alpaca_prompt_alone_ends_where_the_response_begins():
    template = load_prompt("alpaca_sft")
    assert template.render("Say hi.", response="Hi!") == template.render("Say hi.") + "Hi!"


def test_zero_shot_system_has_the_sections_and_stops_at_the_next_one():
    template = load_prompt("zero_shot_system")
    text = template.render("Say hi.")
    assert text.startswith("# Instruction\n")
    assert "# Query:\n```\nSay hi.\n```\n" in text
    assert text.endswith("# Answer:\n```")
    assert template.stop == ("# Query:",)
    assert load_prompt("r1_zero").stop == ("</answer>",)
    assert load_prompt("question_only").stop == ()


def test_mmlu_asks_for_the_sentence_that_is_parsed():
    assert '"The correct answer is _."' in load_prompt("mmlu").render("Which?\nA. 1\nB. 2\nC. 3\nD. 4")


def test_every_stop_belongs_to_a_prompt():
    assert set(STOPS) <= set(BUILT_IN)


@given(st.text(), st.text())
def test_what_is_filled_in_is_left_as_it_is(question, response):
    template = PromptTemplate("x", r"<{question}|{response}|{question}> \boxed{} {x} {0} {} {{question}} %s")
    text = template.render(question, response=response)
    assert text == rf"<{question}|{response}|{question}> \boxed{{}} {{x}} {{0}} {{}} {{{question}}} %s"


def test_places_in_what_is_filled_in_are_not_filled():
    template = PromptTemplate("x", "{instruction} {response}")
    assert template.render("{response} {question}", response=r"{instruction} \1 \g<0>") == (
        r"{response} {question} {instruction} \1 \g<0>"
    )


def test_question_and_instruction_are_one_place():
    assert PromptTemplate("x", "{question}").render(instruction="a") == "a"
    assert PromptTemplate("x", "{instruction}").render("a") == "a"
    for wrong in ({}, {"question": "a", "instruction": "b"}):
        with pytest.raises(ValueError, match="'x' needs either a question or an instruction"):
            PromptTemplate("x", "{question}").render(**wrong)


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_file_is_a_prompt_by_its_path(tmp_path, end):
    path = tmp_path / "r1_zero.prompt"
    path.write_text("Ω \\boxed{} {x}\nUser: {question}\nAssistant: <think>" + end, encoding="utf-8")
    template = load_prompt(str(path))
    assert template.name == "r1_zero"
    assert template.stop == ("</answer>",)
    assert template.render("2+2?") == "Ω \\boxed{} {x}\nUser: 2+2?\nAssistant: <think>"


def test_only_the_last_newline_of_a_file_goes(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("{question}\n\n", encoding="utf-8")
    assert load_prompt(str(path)).render("a") == "a\n"
    assert load_prompt(str(path)).name == "mine.txt"


def test_an_unknown_name_is_answered_with_those_there_are(tmp_path):
    for name in ("r1-zero", str(tmp_path), "../prompts/r1_zero", ""):
        with pytest.raises(ValueError, match=r"neither a file nor one of " + ", ".join(BUILT_IN)):
            load_prompt(name)


def test_files_that_are_no_prompts(tmp_path):
    path = tmp_path / "broken.prompt"
    path.write_text("Write a poem about {x}.", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'broken' has no placeholder for the question; write \{question\}"):
        load_prompt(str(path))
    path.write_bytes(b"{question} \xff")
    with pytest.raises(ValueError, match=r"broken.prompt is not UTF-8: invalid start byte at byte 11"):
        load_prompt(str(path))


def test_built_in_prompts_are_found_in_an_archive(tmp_path):
    """As in an installed wheel: the files are the package's data, wherever and however it is kept."""
    package = Path(__file__).parents[2] / "cs336_alignment"
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in [package / "__init__.py", *(package / "prompts").glob("*.p*")]:
            file.write(path, Path("cs336_alignment") / path.relative_to(package))
    code = (
        "from cs336_alignment.prompts import templates as t; print(t.__file__, t.load_prompt('r1_zero').render('Why?'))"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(archive)}, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(str(archive))
    assert result.stdout.endswith("User: Why?\nAssistant: <think>\n")
