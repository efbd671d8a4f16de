"""Tokens are sampled with exactly the right probabilities: evenly spaced numbers replace random ones."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cs336_alignment.rollouts.engines.sampling import draw_uniforms, sample_tokens

GRID = 10_000
ALMOST_ONE = 1 - 2**-53  # the largest number that torch.rand returns in float64


def frequencies(logits, temperature, top_p):
    uniforms = (torch.arange(GRID, dtype=torch.float64) + 0.5) / GRID
    tokens = sample_tokens(logits.expand(GRID, -1), uniforms, temperature, top_p)
    return torch.bincount(tokens, minlength=len(logits)).numpy() / GRID


def nucleus(logits, temperature, top_p):
    """Compute the distribution to sample from, token by token, in float64."""
    weights = np.exp(logits.double().numpy() / temperature)
    probabilities = weights / weights.sum()
    kept, total = np.zeros_like(probabilities), 0.0
    for token in sorted(range(len(probabilities)), key=lambda token: -probabilities[token]):
        if total >= top_p:
            break
        kept[token] = probabilities[token]
        total += probabilities[token]
    return kept / kept.sum()


@settings(deadline=None, max_examples=50)
@given(
    st.integers(0, 1000),
    st.integers(1, 50),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0.01, 0.5, 0.9, 1.0]),
)
def test_frequencies_are_the_probabilities(seed, vocab, temperature, top_p):
    logits = 2 * torch.randn(vocab, generator=torch.Generator().manual_seed(seed))
    expected = nucleus(logits, temperature, top_p)
    np.testing.assert_allclose(frequencies(logits, temperature, top_p), expected, atol=1.5 / GRID + 1e-6)


def test_temperature_zero_takes_the_most_probable():
    logits = torch.randn(30, 100)
    uniforms = torch.rand(30, dtype=torch.float64)
    assert torch.equal(sample_tokens(logits, uniforms, 0, 0.5), logits.argmax(-1))
    assert torch.equal(sample_tokens(logits, uniforms, 1e-12, 1.0), logits.argmax(-1))


@pytest.mark.parametrize("top_p", [0.6, 1.0])
@pytest.mark.parametrize("uniform", [0.0, ALMOST_ONE])
def test_tokens_of_no_probability_are_never_drawn(uniform, top_p):
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    token = sample_tokens(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, top_p).item()
    assert token == (1 if uniform == 0 else 3)


def test_the_tail_of_a_large_vocabulary_is_reached():
    logits = torch.zeros(1, 200_000)
    for share in (0.25, 0.75, 0.999_999):
        token = sample_tokens(logits, torch.tensor([share], dtype=torch.float64), 1.0, 1.0).item()
        assert abs(token - share * 200_000) <= 1


def test_seeds_fix_the_numbers():
    assert torch.equal(draw_uniforms(3, 4, 7), draw_uniforms(3, 4, 7))
    assert not torch.equal(draw_uniforms(3, 4, 7), draw_uniforms(3, 4, 8))
    assert draw_uniforms(3, 4, 7).unique().numel() == 12
    torch.manual_seed(1)
    first = draw_uniforms(3, 4, None)
    assert not torch.equal(first, draw_uniforms(3, 4, None))
    torch.manual_seed(1)
    assert torch.equal(first, draw_uniforms(3, 4, None))
