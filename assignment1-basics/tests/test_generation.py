"""Sampling: the cache changes nothing, and the filters keep the tokens that they should."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_basics.generation import filter_logits, generate, generate_stream, sample, window_start
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.model_config import ModelConfig, SamplingConfig

CONFIG = ModelConfig(vocab_size=61, context_length=16, d_model=32, num_layers=2, num_heads=4)
GREEDY = SamplingConfig(max_new_tokens=24, temperature=0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = BasicsTransformerLM.from_config(CONFIG)
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # decisive logits, so that rounding never swaps two tokens
    return model


def naive_greedy(model, prompt, count):
    text = list(prompt)
    for _ in range(count):
        window = text[window_start(len(text), model.context_length) :]
        text.append(model(torch.tensor([window]))[0, -1].argmax().item())
    return text[len(prompt) :]


@settings(max_examples=8, deadline=None)
@given(st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=40), min_size=1, max_size=4))
def test_cached_batch_equals_uncached_single_prompts(model, prompts):
    expected = [naive_greedy(model, prompt, 24) for prompt in prompts]
    assert generate(model, prompts, GREEDY) == expected
    assert generate(model, prompts, GREEDY, use_cache=False) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "post"},
        {"norm": "none"},
        {"position": "none"},
        {"ffn": "silu"},
        {"qk_norm": True, "tie_embeddings": True},
    ],
)
def test_cache_works_for_every_ablation(changes):
    torch.manual_seed(1)
    config = ModelConfig(61, 16, 32, 2, 4, **changes)
    model = BasicsTransformerLM.from_config(config)
    prompts = [[1, 2, 3], [4]]
    assert generate(model, prompts, GREEDY) == generate(model, prompts, GREEDY, use_cache=False)


def test_cached_logits_equal_those_of_the_whole_sequence(model):
    ids = torch.randint(61, (3, 16))
    expected = model(ids)
    cache = model.new_cache(3)
    parts = [(0, 5), (5, 6), (6, 6 + 9), (15, 16)]
    positions = torch.arange(16).expand(3, -1)
    logits = torch.cat([model(ids[:, a:b], positions[:, a:b], cache) for a, b in parts], dim=1)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_stop_token_ends_a_continuation_and_is_no_part_of_it(model):
    free = generate(model, [[1], [2]], GREEDY)
    stop = free[0][3]
    stopped = generate(model, [[1], [2]], GREEDY, stop_token_id=stop)
    for with_stop, without in zip(stopped, free):
        assert with_stop == (without[: without.index(stop)] if stop in without else without)


def test_stream_yields_what_generate_returns(model):
    steps = list(generate_stream(model, [[1], [2, 3]], GREEDY))
    assert [list(row) for row in zip(*steps)] == generate(model, [[1], [2, 3]], GREEDY)


def test_seed_fixes_the_choices(model):
    def sample(seed):
        return generate(model, [[5]] * 3, SamplingConfig(max_new_tokens=20, temperature=2.0, seed=seed))

    first = sample(1)
    assert first == sample(1)
    assert first != sample(2)
    assert first[0] != first[1]
    assert sample(None) != sample(None)


def test_generation_leaves_the_model_as_it_was(model):
    model.train()
    generate(model, [[1]], GREEDY)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(40_000, 4)
    chosen = sample(logits, SamplingConfig(temperature=1.0), torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        chosen.bincount(minlength=4) / 40_000, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0, atol=0.01
    )
    halved = sample(logits, SamplingConfig(temperature=0.5), torch.Generator().manual_seed(0))
    squares = torch.tensor([1.0, 4.0, 9.0, 16.0]) / 30
    torch.testing.assert_close(halved.bincount(minlength=4) / 40_000, squares, rtol=0, atol=0.01)


@given(st.lists(st.floats(-9, 9), min_size=2, max_size=12), st.integers(1, 14), st.floats(0.01, 1))
@settings(deadline=None)
def test_filters_keep_the_likeliest_tokens(values, top_k, top_p):
    logits = torch.tensor([values], dtype=torch.float64)
    kept = torch.isfinite(filter_logits(logits, top_k=top_k))[0]
    assert kept.sum() == min(top_k, len(values))
    assert kept.all() or logits[0][kept].min() >= logits[0][~kept].max()

    nucleus = torch.isfinite(filter_logits(logits, top_p=top_p))[0]
    probabilities = torch.softmax(logits, -1)[0]
    total = probabilities[nucleus].sum().item()
    assert total >= top_p - 1e-9
    assert total - probabilities[nucleus].min().item() < top_p + 1e-9
    assert nucleus.all() or probabilities[nucleus].min() >= probabilities[~nucleus].max()


@pytest.mark.parametrize("temperature", [1e-45, 1e-40, 1e-10])
def test_the_lowest_temperatures_are_greedy(temperature):
    logits = torch.tensor([[1.0, 5.0, 3.0]])
    assert sample(logits, SamplingConfig(temperature=temperature), torch.Generator()).item() == 1


def test_window_moves_on_by_half_a_context():
    starts = [window_start(length, 8) for length in range(1, 22)]
    assert starts == [0] * 8 + [4] * 4 + [8] * 4 + [12] * 4 + [16]
    assert [window_start(length, 1) for length in (1, 2, 3)] == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[]], "prompt 0 is empty"), ([[1], [61]], "prompt 1 has token id 61, but the model's vocabulary has 61")],
)
def test_impossible_prompts_are_refused(model, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts)


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}]
)
def test_impossible_sampling_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingConfig(**options)
