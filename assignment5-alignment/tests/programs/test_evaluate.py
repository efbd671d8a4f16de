"""The evaluation of a model on a data set."""

import json
from dataclasses import replace

import pytest

from cs336_alignment.datasets.example import Example
from cs336_alignment.policy.loading import load_tokenizer
from cs336_alignment.programs.configs.evaluate import BENCHMARKS, EvaluateConfig
from cs336_alignment.programs.evaluate import evaluate
from cs336_alignment.rollouts.validation import subsample
from cs336_alignment.run_folder import read_metrics
from tests import scripted_engine
from tests.tiny_task import TinyTask, write_rows


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return TinyTask.make(tmp_path_factory.mktemp("task"))


@pytest.fixture
def say(task, monkeypatch):
    """Let the engine respond with a function of the prompt."""

    def use(respond):
        engine = scripted_engine.ScriptedEngine(
            load_tokenizer(task.folder / "model"), lambda prompt, _: respond(prompt)
        )
        return scripted_engine.use(engine, monkeypatch)

    return use


def config_of(task, tmp_path, **changes):
    fields = {"output": tmp_path / "out", "model": str(task.folder / "model"), "data": task.folder / "test.jsonl",
              "precision": "float32", "rollouts": task.rollouts()}  # fmt: skip
    return EvaluateConfig(**(fields | changes))


def test_the_defaults_are_zero_shot_evaluation_with_the_r1_zero_prompt():
    params = EvaluateConfig().rollouts.sampling()
    assert (params.temperature, params.top_p, params.max_tokens, params.stop) == (1.0, 1.0, 1024, ("</answer>",))
    assert (EvaluateConfig().rollouts.prompt, EvaluateConfig().rollouts.reward) == ("r1_zero", "r1_zero")
    for name in ("mmlu", "gsm8k", "alpaca_eval", "simple_safety_tests"):
        params = BENCHMARKS[name].rollouts.sampling()
        assert (params.temperature, params.stop) == (0.0, ("# Query:",))


def test_everything_is_written_down(task, tmp_path, say):
    def respond(prompt):
        number = int(prompt.split("+")[0])
        if number % 4 == 0:
            return f" </think> <answer>{number + 1}</answer>"
        return " </think> <answer>7</answer>" if number % 4 == 1 else "I cannot say…"

    engine = say(respond)
    metrics = evaluate(config_of(task, tmp_path))
    expected = {
        "examples": 16, "reward": 0.25, "format_reward": 0.5, "answer_reward": 0.25, "unfinished": 0.5,
        "format_1_answer_1": 4, "format_1_answer_0": 4, "format_0_answer_0": 8,
    }  # fmt: skip
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["examples_per_second"] == pytest.approx(16 / metrics["seconds"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    rows = read_metrics(tmp_path / "out" / "generations.jsonl")
    assert [row["prompt"] for row in rows] == engine.calls[0][0] == [f"{n}+1=" for n in range(100, 116)]
    assert rows[0] == {
        "id": "test/1", "prompt": "100+1=", "response": " </think> <answer>101</answer>", "ground_truth": "101",
        "reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0, "finish_reason": "stop",
        "response_length": len(engine.tokenizer(" </think> <answer>101</answer>")["input_ids"]),
    }  # fmt: skip
    assert rows[2]["finish_reason"] == "length"
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["config"]["rollouts"]["reward"] == "r1_zero"
    assert stored["environment"]["torch"]
    assert engine.closed


def test_a_real_engine_draws_by_the_seed(task, tmp_path):
    """The same seed gives the same responses, and another seed gives other responses."""
    config = config_of(task, tmp_path, max_examples=3)
    runs = []
    for seed in (0, 0, 1):
        evaluate(replace(config, seed=seed))
        runs.append((tmp_path / "out" / "generations.jsonl").read_text())
    assert runs[0] == runs[1] != runs[2]
    assert len(runs[0].splitlines()) == 3


def test_mmlu(task, tmp_path, say):
    folder = tmp_path / "mmlu" / "test"
    folder.mkdir(parents=True)
    (folder / "anatomy_test.csv").write_text("Which one?,one,two,three,four,B\nAnd now?,one,two,three,four,C\n")
    engine = say(lambda _: "The correct answer is B.\n```\n\n# Query:")
    benchmark = BENCHMARKS["mmlu"]
    rollouts = replace(benchmark.rollouts, grading_workers=1)
    metrics = evaluate(config_of(task, tmp_path, data=folder, kind="mmlu", rollouts=rollouts))
    assert (metrics["answer_reward"], metrics["format_reward"]) == (0.5, 1.0)
    prompt, params = engine.calls[0][0][0], engine.calls[0][1]
    assert "# Query:" in prompt
    assert "Which one?\nA. one\nB. two" in prompt
    assert 'of the form "The correct answer is _."' in prompt
    assert (params.temperature, params.stop) == (0.0, ("# Query:",))


def test_gsm8k(task, tmp_path, say):
    write_rows(tmp_path / "gsm8k.jsonl", [
        {"question": "How many?", "answer": "2 * 600 = 1200\n#### 1,200"}, {"question": "And now?", "answer": "#### 3"}
    ])  # fmt: skip
    say(lambda _: "It is 2, so there are 1,200 of them.")
    rollouts = replace(BENCHMARKS["gsm8k"].rollouts, grading_workers=1)
    metrics = evaluate(config_of(task, tmp_path, data=tmp_path / "gsm8k.jsonl", kind="gsm8k", rollouts=rollouts))
    assert metrics["answer_reward"] == 0.5


def test_instructions_are_written_as_their_official_evaluators_read_them(task, tmp_path, say):
    say(lambda _: "Use ``` fences.\n```\n\n# Query:")
    write_rows(tmp_path / "alpaca.jsonl", [
        {"instruction": "Help me.", "output": "No.", "generator": "davinci", "dataset": "helpful_base"}
    ])  # fmt: skip
    rollouts = BENCHMARKS["alpaca_eval"].rollouts
    metrics = evaluate(config_of(task, tmp_path, data=tmp_path / "alpaca.jsonl", kind="alpaca_eval", rollouts=rollouts))
    assert "reward" not in metrics
    assert "format_1_answer_1" not in metrics
    assert json.loads((tmp_path / "out" / "alpaca_eval.json").read_text()) == [
        {"instruction": "Help me.", "output": "Use ``` fences.", "generator": str(task.folder / "model"),
         "dataset": "helpful_base"}
    ]  # fmt: skip

    (tmp_path / "sst.csv").write_text("id,harm_area,prompts_final\nsst_1,Scams,Should I?\n")
    evaluate(config_of(task, tmp_path, data=tmp_path / "sst.csv", kind="simple_safety_tests", rollouts=rollouts))
    lines = (tmp_path / "out" / "simple_safety_tests.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == [{"prompts_final": "Should I?", "output": "Use ``` fences."}]


def test_answers_are_needed_to_grade(task, tmp_path):
    write_rows(tmp_path / "alpaca.jsonl", [{"instruction": "Help me.", "output": "No.", "generator": "davinci"}])
    with pytest.raises(ValueError, match=r"alpaca\.jsonl has no answers that a reward could compare with; .*None"):
        evaluate(config_of(task, tmp_path, data=tmp_path / "alpaca.jsonl"))


def test_a_prompt_longer_than_the_context_is_one_sentence(task, tmp_path):
    write_rows(tmp_path / "long.jsonl", [{"question": "1" * 200, "trace": "?", "answer": "2"}])
    with pytest.raises(ValueError, match="has 201 tokens, but the model's context is 128"):
        evaluate(config_of(task, tmp_path, data=tmp_path / "long.jsonl"))


def test_some_are_always_the_same():
    numbers = [Example(str(number), "") for number in range(100)]
    assert subsample(numbers, None) == subsample(numbers, 100) == subsample(numbers, 1000) == numbers
    assert subsample(numbers, 5) == subsample(numbers, 6)[:5]
    assert subsample(numbers, 5) != numbers[:5]
