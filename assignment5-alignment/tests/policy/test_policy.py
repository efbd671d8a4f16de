"""Log-probabilities of responses under a policy."""

import pytest
import torch

from cs336_alignment.policy.policy import Policy, TokenizedExample, scatter_to_mask
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [TokenizedExample((5, 6, 7), (8, 9)), TokenizedExample((5,), (10, 11, 12, 13)), TokenizedExample((6, 7), ())]


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model(), tiny_tokenizer())


def by_hand(model, row, temperature=1.0):
    """log softmax, one row at a time, without padding."""
    ids = torch.tensor([*row.prompt, *row.response])
    logits = model(ids[None]).logits[0].double() / temperature
    log_probs = logits.log_softmax(-1)
    chosen = log_probs[:-1].gather(-1, ids[1:, None])[:, 0][len(row.prompt) - 1 :]
    entropy = -(log_probs.exp() * log_probs).sum(-1)[:-1][len(row.prompt) - 1 :]
    return chosen, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_each_row_by_itself(policy, temperature):
    batch = policy.response_log_probs(ROWS, temperature, return_token_entropy=True)
    frozen = policy.log_probs_no_grad(ROWS, [[2, 0], [1]], temperature)
    assert batch.mask.sum(-1).tolist() == [2, 4, 0]
    for number, row in enumerate(ROWS):
        chosen, entropy = by_hand(policy.model, row, temperature)
        for ours in (batch.log_probs[number][batch.mask[number]], frozen[number]):
            torch.testing.assert_close(ours.double(), chosen, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch.token_entropy[number][batch.mask[number]].double(), entropy, atol=1e-5, rtol=0)
    assert batch.log_probs.requires_grad
    assert not any(values.requires_grad for values in frozen)
    assert policy.mean_entropy(ROWS[0]) == pytest.approx(by_hand(policy.model, ROWS[0])[1].mean().item(), abs=1e-5)


def test_values_return_to_their_places(policy):
    batch = policy.response_log_probs(ROWS)
    laid = scatter_to_mask(policy.log_probs_no_grad(ROWS, [[0], [1], [2]]), batch.mask)
    torch.testing.assert_close(laid, batch.log_probs.detach() * batch.mask, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_autocast(policy):
    half = Policy(policy.model, policy.tokenizer, "bfloat16").response_log_probs(ROWS)
    full = policy.response_log_probs(ROWS)
    assert half.log_probs.dtype == torch.float32
    gap = (half.log_probs - full.log_probs)[full.mask].abs()
    assert 0 < gap.max() < 0.1
    assert all(weight.dtype == torch.float32 for weight in policy.model.parameters())


def test_prompt_and_response_are_tokenised_by_themselves(policy):
    row = policy.tokenize("think", "er")
    assert row.prompt == tuple(policy.tokenizer("think")["input_ids"])
    assert row.response == tuple(policy.tokenizer("er")["input_ids"])
    assert len(row) == len(row.prompt) + len(row.response)
    assert policy.context_length == 512
