"""Training steps: values and gradients by hand, and weights that do not depend on how a batch is split."""

import math

import pytest
import torch

from cs336_alignment.tensors.log_probs import get_response_log_probs
from cs336_alignment.tensors.losses import policy_gradient_loss, sft_loss
from cs336_alignment.tensors.masked import masked_mean
from cs336_alignment.tensors.microbatch import grpo_microbatch_train_step, sft_microbatch_train_step
from cs336_alignment.tensors.recipes import RECIPES
from cs336_alignment.tensors.tokenization import collate, token_budget_microbatches
from tests.tiny import tiny_model

VOCAB = 40
AGGREGATIONS = ["masked_mean", "masked_normalize", "token_mean"]


def random_batch(shape=(4, 6), seed=0):
    rng = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(shape, generator=rng, dtype=torch.float64)
    mask = torch.rand(shape, generator=rng) < 0.6
    mask[:, 0] = True
    return log_probs.requires_grad_(), mask, torch.randn(shape[0], 1, generator=rng, dtype=torch.float64)


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("constant", [1.0, 10])
def test_sft_step_by_hand(steps, constant):
    log_probs, mask, _ = random_batch()
    loss, metadata = sft_microbatch_train_step(log_probs, mask, steps, constant)
    rows = [-sum(value for value, kept in zip(*row) if kept) for row in zip(log_probs.tolist(), mask.tolist())]
    assert loss.item() == pytest.approx(sum(rows) / constant / len(rows) / steps, rel=1e-12)
    torch.testing.assert_close(log_probs.grad, -mask.double() / (constant * len(rows) * steps))
    assert not loss.requires_grad
    assert metadata["response_tokens"].item() == mask.sum().item()
    assert metadata["negative_log_likelihood"].item() == pytest.approx(sum(rows))


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("loss_type", ["no_baseline", "reinforce_with_baseline"])
def test_reinforce_step_by_hand(steps, loss_type):
    log_probs, mask, weights = random_batch()
    name = {"no_baseline": "raw_rewards", "reinforce_with_baseline": "advantages"}[loss_type]
    loss, metadata = grpo_microbatch_train_step(log_probs, mask, steps, loss_type, **{name: weights})
    expected = masked_mean(-weights * log_probs.detach(), mask, dim=1).mean() / steps
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(log_probs.grad, -weights * mask / mask.sum(1, keepdim=True) / (len(mask) * steps))
    assert metadata == {}
    assert not loss.requires_grad


def test_gradients_accumulate_over_calls():
    log_probs, mask, advantages = random_batch()
    for _ in range(3):
        grpo_microbatch_train_step(log_probs, mask, 3, "reinforce_with_baseline", advantages=advantages)
    accumulated, log_probs.grad = log_probs.grad, None
    grpo_microbatch_train_step(log_probs, mask, 1, "reinforce_with_baseline", advantages=advantages)
    torch.testing.assert_close(accumulated, log_probs.grad)


def test_what_was_clipped_is_reported():
    log_probs, mask, advantages = random_batch((5, 30))
    old = log_probs.detach() + torch.randn(5, 30, generator=torch.Generator().manual_seed(1)) * 0.5
    _, metadata = grpo_microbatch_train_step(
        log_probs, mask, 1, "grpo_clip", advantages=advantages, old_log_probs=old, cliprange=0.2
    )
    ratio = (log_probs.detach() - old).exp()
    clipped = torch.where(advantages > 0, ratio > 1.2, ratio < 0.8) & mask
    assert torch.equal(metadata["clipped"], clipped)
    assert 0 < masked_mean(metadata["clipped"].float(), mask).item() < 1
    torch.testing.assert_close(metadata["ratio"], ratio.masked_fill(~mask, 1))
    assert torch.equal(log_probs.grad == 0, clipped | ~mask)


def test_a_reference_costs_its_kl():
    log_probs, mask, advantages = random_batch()
    reference = log_probs.detach() + torch.randn(4, 6, generator=torch.Generator().manual_seed(1)) * 0.5
    plain, _ = grpo_microbatch_train_step(log_probs, mask, 2, "reinforce_with_baseline", advantages=advantages)
    log_probs.grad = None
    loss, metadata = policy_gradient_loss(
        log_probs,
        mask,
        "reinforce_with_baseline",
        advantages=advantages,
        reference_log_probs=reference,
        kl_coefficient=0.3,
    )
    loss = loss / 2
    loss.backward()
    log_ratio = reference - log_probs.detach()
    kl = log_ratio.exp() - 1 - log_ratio
    torch.testing.assert_close(loss, plain + 0.3 * masked_mean(kl, mask, 1).mean() / 2)
    torch.testing.assert_close(metadata["kl"], kl.masked_fill(~mask, 0))
    expected = (-advantages + 0.3 * (1 - log_ratio.exp())) * mask / mask.sum(1, keepdim=True) / 8
    torch.testing.assert_close(log_probs.grad, expected)


@pytest.mark.parametrize("loss_type", list(RECIPES))
def test_an_empty_response_and_wild_padding_leave_everything_finite(loss_type):
    log_probs, mask, weights = random_batch()
    old = log_probs.detach().clone()
    reference = old.clone()
    mask[1] = False
    old[~mask], reference[~mask] = -1e4, 1e4  # their ratios are infinite
    loss, metadata = policy_gradient_loss(
        log_probs, mask, loss_type, raw_rewards=weights, advantages=weights, old_log_probs=old, cliprange=0.2,
        reference_log_probs=reference, kl_coefficient=0.1, normalize_constant=10.0,
    )  # fmt: skip
    loss.backward()
    assert math.isfinite(loss.item())
    assert torch.equal(log_probs.grad != 0, mask)
    assert metadata["kl"].isfinite().all()


def test_an_sft_batch_without_any_response_token_has_no_loss():
    log_probs, mask, _ = random_batch()
    loss, metadata = sft_microbatch_train_step(log_probs, torch.zeros_like(mask), 4)
    assert loss.item() == metadata["response_tokens"].item() == metadata["negative_log_likelihood"].item() == 0
    assert not log_probs.grad.any()


def test_wrong_arguments_are_refused():
    log_probs, mask, weights = random_batch()
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 0"):
        sft_microbatch_train_step(log_probs, mask, 0)
    with pytest.raises(ValueError, match="gradient_accumulation_steps is 0"):
        grpo_microbatch_train_step(log_probs, mask, 0, "no_baseline", raw_rewards=weights)
    with pytest.raises(ValueError, match="loss_type 'grpo_clip' needs old_log_probs, which is missing"):
        grpo_microbatch_train_step(log_probs, mask, 1, "grpo_clip", advantages=weights, cliprange=0.2)
    with pytest.raises(ValueError, match="needs normalize_constant"):
        grpo_microbatch_train_step(
            log_probs, mask, 1, "dr_grpo", advantages=weights, old_log_probs=log_probs.detach(), cliprange=0.2
        )
    with pytest.raises(ValueError, match=r"kl_coefficient 0\.1 needs reference_log_probs"):
        policy_gradient_loss(log_probs, mask, "no_baseline", raw_rewards=weights, kl_coefficient=0.1)
    assert log_probs.grad is None  # nothing was back-propagated


# --- The weights after a step of a real model ---------------------------------------------------------------------

RNG = torch.Generator().manual_seed(42)
LENGTHS = [(3, 5), (1, 9), (7, 2), (4, 4), (2, 1), (5, 0), (6, 8), (3, 3)]  # an output is empty
PROMPTS = [torch.randint(2, VOCAB, (prompt,), generator=RNG).tolist() for prompt, _ in LENGTHS]
OUTPUTS = [torch.randint(2, VOCAB, (output,), generator=RNG).tolist() for _, output in LENGTHS]
ADVANTAGES = torch.randn(8, 1, generator=RNG)
TOTALS = {"total_tokens": sum(map(len, OUTPUTS)), "total_sequences": 8}


def log_probs_of(model, indices, extra_padding=0):
    batch = collate([PROMPTS[i] for i in indices], [OUTPUTS[i] for i in indices], pad_token_id=0)
    padded = {key: torch.nn.functional.pad(value, (0, extra_padding)) for key, value in batch.items()}
    result = get_response_log_probs(model, padded["input_ids"], padded["labels"])
    return result["log_probs"], padded["response_mask"]


def weights_after_step(microbatches, step, dtype=torch.float64, optimizer=torch.optim.AdamW, **padding):
    model = tiny_model(VOCAB, dtype=dtype)
    make = optimizer(model.parameters(), lr=0.01)
    for indices in microbatches:
        step(*log_probs_of(model, indices, **padding), indices)
    make.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def grpo(steps=1, loss_type="reinforce_with_baseline", **options):
    def step(log_probs, mask, indices):
        arguments = {"advantages": ADVANTAGES[indices].to(log_probs), "old_log_probs": log_probs.detach()}
        if options:
            policy_gradient_loss(log_probs, mask, loss_type, cliprange=0.2, **arguments, **options)[0].backward()
        else:
            grpo_microbatch_train_step(log_probs, mask, steps, loss_type, cliprange=0.2, **arguments)

    return step


def sft(steps=1, **options):
    def step(log_probs, mask, _):
        if options:
            sft_loss(log_probs, mask, 10.0, **options).backward()
        else:
            sft_microbatch_train_step(log_probs, mask, steps, 10.0)

    return step


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


WHOLE = [list(range(8))]
ONE_EACH = [[index] for index in range(8)]
UNEVEN = [[6, 1, 0], [3], [2, 5, 7, 4]]


@pytest.mark.parametrize("make", [sft, grpo])
@pytest.mark.parametrize(("dtype", "optimizer"), [(torch.float64, torch.optim.AdamW), (torch.float32, torch.optim.SGD)])
def test_accumulating_over_8_equals_1(make, dtype, optimizer):
    start = weights_after_step([], make(), dtype, optimizer)
    whole = weights_after_step(WHOLE, make(), dtype, optimizer)
    assert (whole - start).abs().max() > 1e-4
    for microbatches in (ONE_EACH, [[7, 6], [5, 4], [3, 2], [1, 0]], [[0, 2, 4, 6], [1, 3, 5, 7]]):
        assert_same(weights_after_step(microbatches, make(len(microbatches)), dtype, optimizer), whole)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_any_split_gives_the_same_weights(aggregation):
    options = {"aggregation": aggregation, "normalize_constant": 10.0}
    whole = weights_after_step(WHOLE, grpo(**options))
    by_budget = token_budget_microbatches([prompt + output for prompt, output in LENGTHS], max_tokens=22)
    assert 1 < len(by_budget) < 8
    for microbatches in (ONE_EACH, UNEVEN, by_budget):
        assert_same(weights_after_step(microbatches, grpo(**options, **TOTALS)), whole)


def test_any_split_gives_the_same_weights_in_sft():
    whole = weights_after_step(WHOLE, sft())
    for microbatches in (ONE_EACH, UNEVEN):
        assert_same(weights_after_step(microbatches, sft(total_sequences=8)), whole)


@pytest.mark.parametrize("make", [sft, grpo])
def test_more_padding_and_another_order_change_nothing(make):
    whole = weights_after_step(WHOLE, make())
    assert_same(weights_after_step(WHOLE, make(), extra_padding=7), whole)
    assert_same(weights_after_step([[5, 2, 7, 0, 1, 6, 3, 4]], make()), whole)


@pytest.mark.parametrize("loss_type", ["grpo_clip", "grpo_no_clip"])
def test_on_policy_the_weights_are_those_of_reinforce(loss_type):
    assert_same(weights_after_step(WHOLE, grpo(loss_type=loss_type)), weights_after_step(WHOLE, grpo()))
