"""Questions in, graded responses out."""

import math
from contextlib import contextmanager

import pytest
import torch

from cs336_alignment.datasets.example import Example
from cs336_alignment.policy.policy import Policy
from cs336_alignment.prompts.templates import PromptTemplate
from cs336_alignment.rollouts.config import EngineConfig, RolloutConfig, SamplingParams
from cs336_alignment.rollouts.engines.base import Completion
from cs336_alignment.rollouts.grader import open_grader
from cs336_alignment.rollouts.worker import RolloutWorker, check_memory, open_rollout_worker
from tests import scripted_engine
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_task import TinyTask

EXAMPLES = [Example("1+1", "2"), Example("2+2", "4")]
TEMPLATE = PromptTemplate("sum", "{question}=")


def answer(prompt, sample):
    return f"</think> <answer>{(prompt == '1+1=') * 2 + sample}</answer>"


@pytest.fixture
def engine():
    return scripted_engine.ScriptedEngine(tiny_tokenizer(), answer)


def test_responses_are_graded_in_their_order(engine):
    phases = []

    @contextmanager
    def phase(name):
        phases.append(name)
        yield

    with open_grader("r1_zero", workers=1) as grade:
        found = RolloutWorker(engine, TEMPLATE, grade, phase=phase).generate(EXAMPLES, SamplingParams(n=5))
    assert [each.prompt for each in found] == ["1+1="] * 5 + ["2+2="] * 5
    assert [each.correct for each in found] == [True, *[False] * 4, *[False] * 4, True]
    assert [each.completion.text for each in found[:2]] == [answer("1+1=", 0), answer("1+1=", 1)]
    assert phases == ["rollout", "grading"]
    assert not RolloutWorker(engine, TEMPLATE, None).generate(EXAMPLES, SamplingParams())[0].rewards


def test_weights_are_loaded_once_an_update(engine):
    policy = Policy(tiny_model(), tiny_tokenizer())
    worker = RolloutWorker(engine, TEMPLATE, None, colocated=True)
    for update in (0, 0, 3):
        worker.sync_weights(policy, update)
        worker.sleep()
        with torch.no_grad():
            policy.model.lm_head.weight += 1
    assert engine.calls == ["wake", "sleep"] * 3
    first, second = (weights["lm_head.weight"] for weights in engine.weights)
    torch.testing.assert_close(second, first + 2)
    elsewhere = RolloutWorker(engine, TEMPLATE, None, colocated=False)
    elsewhere.sync_weights(policy, 0)
    elsewhere.sleep()
    assert len(engine.calls) == 6  # an engine on a GPU of its own need not sleep
    assert len(engine.weights) == 3


def test_probabilities_of_nan_stop_everything(engine):
    engine.generate = lambda prompts, params: [[Completion("a", (5, 6), (-1.0, math.nan), "stop")]] * len(prompts)
    with pytest.raises(FloatingPointError, match=r"probabilities are NaN, .* lower the learning rate"):
        RolloutWorker(engine, TEMPLATE, None).generate(EXAMPLES, SamplingParams())


def test_engines_and_graders_are_closed(engine, tmp_path, monkeypatch):
    task = TinyTask.make(tmp_path)
    scripted_engine.use(engine, monkeypatch)
    with open_rollout_worker(task.rollouts(), task.folder / "model", "float32") as worker:
        (only, _) = worker.generate(EXAMPLES, SamplingParams())
        assert only.correct
    assert engine.closed


def test_sampling_parameters():
    config = RolloutConfig()
    assert config.sampling() == SamplingParams(temperature=1.0, top_p=1.0, max_tokens=1024, stop=("</answer>",))
    assert config.sampling(n=8, min_tokens=4) == SamplingParams(n=8, min_tokens=4, stop=("</answer>",))
    assert RolloutConfig(stop=("x",)).sampling().stop == ("x",)
    assert RolloutConfig(prompt="question_only").sampling().stop == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RolloutConfig(reward="charm"), "there is no reward 'charm'; choose one of r1_zero, question_only"),
        (lambda: RolloutConfig(prompt="charm"), "there is no prompt 'charm'"),
        (lambda: RolloutConfig(temperature=-1.0), "temperature is -1.0"),
        (lambda: RolloutConfig(top_p=0.0), "top_p is 0.0"),
        (lambda: RolloutConfig(max_tokens=0), "max_tokens 0"),
        (lambda: EngineConfig(gpu_memory_utilization=0.0), "gpu_memory_utilization is 0.0, but must be above 0"),
    ],
)
def test_impossible_configurations_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_vllm_beside_a_policy_must_fit():
    h100, qwen = 85 * 10**9, 12 * 1_540_000_000 + 4 * 10**9
    with pytest.raises(ValueError, match=r"is 0\.85, but training on the same GPU keeps 22 of its 85 GB; .*most 0\.73"):
        check_memory(0.85, qwen, h100)
    check_memory(0.73, qwen, h100)
