"""DPO against arithmetic of single numbers, and against transformers, one whole string at a time."""

import math

import pytest
import torch

from cs336_alignment.prompts.templates import load_prompt
from cs336_alignment.tensors.dpo_loss import (
    compute_per_instance_dpo_loss,
    dpo_loss,
    encode_document,
    sequence_log_probs,
)
from tests.tiny import tiny_model, tiny_tokenizer

PAIRS = [
    ("What is 3 + 4?", "7", "The answer is 8, so User: 3"),
    ("", "a", ""),
    ("Hügel 🙂", "the same", "the same"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def models():
    return tiny_model(seed=1), tiny_model(seed=2)


def log_prob_by_hand(model, tokenizer, text):
    """log p of the whole string and the end of sequence, token by token in float64."""
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    with torch.no_grad():
        log_probs = model.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
    model.float()
    return math.fsum(log_probs[position, token].item() for position, token in enumerate(ids[1:]))


def loss_by_hand(models, tokenizer, beta, pair, log_prob=log_prob_by_hand):
    prompt, *responses = pair
    texts = [load_prompt("alpaca_sft").render(instruction=prompt, response=response) for response in responses]
    chosen, rejected = ([log_prob(model, tokenizer, text) for model in models] for text in texts)
    margin = beta * ((chosen[0] - rejected[0]) - (chosen[1] - rejected[1]))
    return math.log1p(math.exp(-margin))


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_a_pair_by_hand(pair, beta, models, tokenizer):
    loss = compute_per_instance_dpo_loss(*models, tokenizer, beta, *pair)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(loss_by_hand(models, tokenizer, beta, pair), abs=1e-4)


def test_at_the_reference_the_loss_is_log_2(models, tokenizer):
    loss = compute_per_instance_dpo_loss(models[0], models[0], tokenizer, 0.5, *PAIRS[0])
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_only_the_policy_gets_a_gradient_and_it_lowers_the_loss(tokenizer):
    policy, reference = tiny_model(seed=1), tiny_model(seed=1)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = compute_per_instance_dpo_loss(policy, reference, tokenizer, 0.1, *PAIRS[0])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert all(parameter.grad is None for parameter in reference.parameters())


def test_the_prompt_cancels(models, tokenizer):
    """The same loss comes from the log-probabilities of the responses alone."""

    def of_response(model, tokenizer, text):
        head = text[: text.index("### Response:\n") + len("### Response:\n")]
        assert tokenizer.encode(text)[: len(tokenizer.encode(head))] == tokenizer.encode(head)
        ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        return sum(log_probs[i - 1, ids[i]].item() for i in range(len(tokenizer.encode(head)), len(ids)))

    loss = compute_per_instance_dpo_loss(*models, tokenizer, 0.5, *PAIRS[0])
    assert loss.item() == pytest.approx(loss_by_hand(models, tokenizer, 0.5, PAIRS[0], of_response), abs=1e-4)


def test_documents_are_the_template_and_one_end_of_sequence(tokenizer, tmp_path):
    ids = encode_document(tokenizer, "Why?", "Because.")
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[:-1]).endswith("\n\n### Instruction:\nWhy?\n\n### Response:\nBecause.")

    (tmp_path / "own.prompt").write_text("Q {instruction} A {response}\n")
    own = encode_document(tokenizer, "Why?", "Because.", template=str(tmp_path / "own.prompt"))
    assert tokenizer.decode(own) == "Q Why? A Because.<eos>"


def test_a_tokenizer_without_end_of_sequence_is_refused(models):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token; set tokenizer\.eos_token"):
        compute_per_instance_dpo_loss(*models, tokenizer, 0.1, *PAIRS[0])


def test_a_tokenizer_without_pad_token_will_do(models, tokenizer):
    expected = compute_per_instance_dpo_loss(*models, tokenizer, 0.1, *PAIRS[0])
    other = tiny_tokenizer()
    other.pad_token = None
    torch.testing.assert_close(compute_per_instance_dpo_loss(*models, other, 0.1, *PAIRS[0]), expected)


def test_sequences_of_a_batch_do_not_touch_each_other(models):
    sequences = [[5, 9, 1], [7], [3, 0, 0, 8, 2, 1], [4, 4]]
    together = sequence_log_probs(models[0], sequences)
    alone = torch.cat([sequence_log_probs(models[0], [ids]) for ids in sequences if len(ids) > 1])
    torch.testing.assert_close(together[[0, 2, 3]], alone, rtol=1e-5, atol=1e-5)
    assert together[1].item() == 0  # its only token is given


def test_values_and_gradients_of_a_batch():
    rng = torch.Generator().manual_seed(0)
    numbers = list((torch.randn(4, 6, dtype=torch.float64, generator=rng) * 20).requires_grad_())
    loss, chosen, rejected = dpo_loss(*numbers, beta=0.3)
    for i in range(6):
        pc, pr, rc, rr = (tensor[i].item() for tensor in numbers)
        assert loss[i].item() == pytest.approx(math.log1p(math.exp(-0.3 * (pc - pr - rc + rr))), rel=1e-12)
        assert chosen[i].item() == pytest.approx(0.3 * (pc - rc))
        assert rejected[i].item() == pytest.approx(0.3 * (pr - rr))
    assert not chosen.requires_grad
    assert not rejected.requires_grad
    leaves = [tensor.detach().requires_grad_() for tensor in numbers]
    assert torch.autograd.gradcheck(lambda *tensors: dpo_loss(*tensors, beta=0.3)[0], leaves)


def test_extreme_margins_stay_finite():
    zero = torch.zeros(2)
    loss, _, _ = dpo_loss(torch.tensor([1e5, -1e5]), zero, zero, zero, beta=0.1)
    assert loss.tolist() == [0.0, 1e4]
