"""Asking a model questions."""

import builtins
from dataclasses import replace

import pytest
import torch

from cs336_alignment.policy.loading import load_model, load_tokenizer
from cs336_alignment.policy.tiny_model import make_tiny_model
from cs336_alignment.programs.configs.generate import GenerateConfig
from cs336_alignment.programs.generate import generate
from cs336_alignment.rollouts.config import EngineConfig, SamplingParams
from tests import scripted_engine


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "model"
    return make_tiny_model(folder, hidden_size=32, layers=1, context_length=64, initializer_range=0.2)


@pytest.fixture
def config(model):
    return GenerateConfig(
        ("1+2=",), str(model), prompt=None, precision="float32", engine=EngineConfig("transformers", "cpu"),
        sampling=SamplingParams(temperature=0.0, max_tokens=5),
    )  # fmt: skip


@pytest.fixture
def engine(model, monkeypatch):
    """An engine that repeats the prompt and adds the number of the sample."""
    engine = scripted_engine.ScriptedEngine(load_tokenizer(model), lambda prompt, sample: f"{prompt}{sample}")
    monkeypatch.setattr("cs336_alignment.programs.generate.make_engine", lambda *_, **__: engine)
    return engine


def test_greedy_text_is_the_models(config, model, capsys):
    generate(config)
    policy, tokenizer = load_model(model, "cpu"), load_tokenizer(model)
    ids = tokenizer("1+2=", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(5):
            ids = torch.cat([ids, policy(ids).logits[:, -1:].argmax(-1)], dim=1)
    captured = capsys.readouterr()
    half_characters = "\ufffd\n"  # at the end, where an engine may leave them out
    assert captured.out.rstrip(half_characters) == tokenizer.decode(ids[0, 4:]).rstrip(half_characters) != ""
    assert captured.err == "(cut short after 5 tokens)\n"


def test_options_of_the_engine_reach_it(config, model, monkeypatch):
    asked = {}

    def record(*_, **options):
        asked.update(options)
        return scripted_engine.ScriptedEngine(load_tokenizer(model), lambda prompt, sample: prompt)

    monkeypatch.setattr("cs336_alignment.programs.generate.make_engine", record)
    generate(replace(config, engine=EngineConfig("vllm", "cpu", gpu_memory_utilization=0.5, compiled=False)))
    assert (asked["gpu_memory_utilization"], asked["compiled"]) == (0.5, False)


def test_the_seed_fixes_the_draws(config, capsys):
    texts = []
    for seed in (1, 1, 2, None, None):
        generate(replace(config, sampling=SamplingParams(max_tokens=20, seed=seed)))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] != texts[4]


def test_the_prompt_is_a_template_with_its_stops(config, engine, capsys):
    generate(replace(config, prompt="r1_zero"))
    (prompts, params), = engine.calls  # fmt: skip
    assert prompts[0].endswith("User: 1+2=\nAssistant: <think>")
    assert params.stop == ("</answer>",)
    assert engine.closed
    generate(replace(config, prompt="r1_zero", sampling=SamplingParams(stop=("!",))))
    assert engine.calls[1][1].stop == ("!",)
    generate(config)
    assert engine.calls[2][1].stop == ()
    assert capsys.readouterr().out.endswith("<think>0\n1+2=0\n")


def test_several_responses_have_headings(config, engine, capsys):
    generate(replace(config, questions=("a", "b"), sampling=SamplingParams(n=2)))
    assert capsys.readouterr().out == "".join(
        f"--- question {question}, sample {sample + 1}\n{text}{sample}\n"
        for question, text in ((1, "a"), (2, "b"))
        for sample in (0, 1)
    )
    generate(replace(config, questions=("a", "b")))
    assert capsys.readouterr().out == "--- question 1\na0\n--- question 2\nb0\n"


@pytest.mark.parametrize("end", ["", EOFError])
def test_questions_are_asked_for(config, engine, end, capsys, monkeypatch):
    typed = iter(["what", "what", "\udcff", end, "never read"])

    def ask(prompt):
        line = next(typed)
        if line is EOFError:
            raise EOFError
        return line

    monkeypatch.setattr(builtins, "input", ask)
    generate(replace(config, questions=(), sampling=SamplingParams(seed=7)))
    assert capsys.readouterr().out == "Type a question. An empty line ends.\nwhat0\nwhat0\n?0\n"
    assert [params.seed for _, params in engine.calls] == [7, 8, 9]
    assert next(typed) == "never read"
    assert engine.closed


def test_what_is_wrong_is_one_sentence(config):
    with pytest.raises(ValueError, match=r"there is no prompt 'r2_zero': it is neither a file nor one of .*r1_zero"):
        replace(config, prompt="r2_zero")
    with pytest.raises(FileNotFoundError, match="nowhere is neither a folder nor a model"):
        generate(replace(config, model="nowhere"))
    with pytest.raises(ValueError, match="has 70 tokens, but the model's context is 64"):
        generate(replace(config, questions=("1" * 70,)))
