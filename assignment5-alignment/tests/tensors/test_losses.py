"""Losses against arithmetic of single numbers and finite differences; sums over any split against the whole."""

import inspect
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cs336_alignment.tensors.losses import (
    aggregate,
    compute_grpo_clip_loss,
    compute_grpo_no_clip_loss,
    compute_naive_policy_gradient_loss,
    compute_policy_gradient_loss,
    kl_estimate,
)
from cs336_alignment.tensors.recipes import RECIPES

SHAPES = [(1, 1), (3, 1), (1, 6), (4, 9)]
AGGREGATIONS = ["masked_mean", "masked_normalize", "token_mean"]


def random_batch(shape, dtype=torch.float64, seed=0, spread=0.5):
    """Advantages, policy and old log-probabilities, and a mask in which a row may be empty."""
    rng = torch.Generator().manual_seed(seed)
    policy = -torch.rand(shape, generator=rng, dtype=dtype) * 5
    old = policy + torch.randn(shape, generator=rng, dtype=dtype) * spread
    advantages = torch.randn(shape[0], 1, generator=rng, dtype=dtype)
    return advantages, policy, old, torch.rand(shape, generator=rng) < 0.6


def one_by_one(function, advantages, *per_token):
    """`function` of the Python numbers of each token."""
    rows = zip(advantages.tolist(), *(tensor.tolist() for tensor in per_token))
    return torch.tensor(
        [[function(advantage, *token) for token in zip(*row)] for (advantage,), *row in rows], dtype=torch.float64
    )


def clip_by_hand(low, high):
    def loss(advantage, policy, old):
        ratio = math.exp(policy - old)
        return -min(ratio * advantage, max(1 - low, min(1 + high, ratio)) * advantage)

    return loss


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_values_against_single_numbers(shape, dtype, tolerance):
    advantages, policy, old, _ = random_batch(shape, dtype)

    def close(ours, expected):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=tolerance)

    naive = one_by_one(lambda advantage, log_prob: -advantage * log_prob, advantages, policy)
    close(compute_naive_policy_gradient_loss(advantages, policy), naive)

    for low, high in ((0.2, 0.2), (0.0, 0.0), (0.2, 0.28), (0.5, 0.01)):
        loss, metadata = compute_grpo_clip_loss(advantages, policy, old, low, high)
        close(loss, one_by_one(clip_by_hand(low, high), advantages, policy, old))
        bound = one_by_one(
            lambda advantage, p, o, low=low, high=high: (
                math.exp(p - o) > 1 + high if advantage > 0 else math.exp(p - o) < 1 - low
            ),
            advantages, policy, old,
        )  # fmt: skip
        assert torch.equal(metadata["clipped"], bound.bool())
        close(metadata["ratio"], one_by_one(lambda _, p, o: math.exp(p - o), advantages, policy, old))
    symmetric, _ = compute_grpo_clip_loss(advantages, policy, old, 0.3)
    close(symmetric, one_by_one(clip_by_hand(0.3, 0.3), advantages, policy, old))

    loss, metadata = compute_grpo_no_clip_loss(advantages, policy, old)
    close(loss, one_by_one(lambda advantage, p, o: -math.exp(p - o) * advantage, advantages, policy, old))
    assert "clipped" not in metadata

    expected = one_by_one(lambda _, p, r: math.exp(r - p) - 1 - (r - p), advantages, policy, old)
    close(kl_estimate(policy, old), expected)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_against_finite_differences(seed):
    advantages, policy, old, mask = random_batch((3, 5), seed=seed)
    policy.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: compute_naive_policy_gradient_loss(advantages, p), policy)
    assert torch.autograd.gradcheck(lambda p: compute_grpo_clip_loss(advantages, p, old, 0.2, 0.28)[0], policy)
    assert torch.autograd.gradcheck(lambda p: compute_grpo_no_clip_loss(advantages, p, old)[0], policy)
    assert torch.autograd.gradcheck(lambda p: kl_estimate(p, old), policy)
    for aggregation in AGGREGATIONS:
        assert torch.autograd.gradcheck(lambda p, how=aggregation: aggregate(p, mask, how, 11.0), policy)


def test_a_clipped_token_has_no_gradient_and_the_others_do():
    advantages, policy, old, _ = random_batch((6, 20))
    loss, metadata = compute_grpo_clip_loss(advantages, policy.requires_grad_(), old, 0.2)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert 0 < metadata["clipped"].sum() < policy.numel()
    assert torch.equal(gradient == 0, metadata["clipped"])
    assert not any(tensor.requires_grad for tensor in metadata.values())


def test_on_policy_the_gradients_are_those_of_reinforce_with_baseline():
    advantages, policy, _, mask = random_batch((4, 9))
    gradients = {}
    for name in ("reinforce_with_baseline", "grpo_clip", "grpo_no_clip", "dapo"):
        leaf = policy.clone().requires_grad_()
        loss, metadata = compute_policy_gradient_loss(
            leaf, name, advantages=advantages, old_log_probs=policy, cliprange=0.2
        )
        assert not metadata.get("clipped", torch.tensor(False)).any()
        aggregate(loss, mask, "masked_mean").backward()
        gradients[name] = leaf.grad
    reinforce = gradients.pop("reinforce_with_baseline")
    assert reinforce[mask].all()
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, reinforce, rtol=0, atol=1e-15)


def test_names_stand_for_the_losses_of_the_papers():
    advantages, policy, old, _ = random_batch((3, 7))
    rewards = torch.tensor([[1.0], [0.0], [1.0]], dtype=torch.float64)
    given = {"raw_rewards": rewards, "advantages": advantages, "old_log_probs": old, "cliprange": 0.2}
    expected = {
        "no_baseline": -rewards * policy,
        "reinforce_with_baseline": -advantages * policy,
        "grpo_clip": one_by_one(clip_by_hand(0.2, 0.2), advantages, policy, old),
        "grpo_no_clip": -(policy - old).exp() * advantages,
        "dr_grpo": one_by_one(clip_by_hand(0.2, 0.2), advantages, policy, old),
        "dapo": one_by_one(clip_by_hand(0.2, 0.28), advantages, policy, old),
    }
    assert expected.keys() == RECIPES.keys()
    for name, loss in expected.items():
        torch.testing.assert_close(compute_policy_gradient_loss(policy, name, **given)[0], loss)
    wider, _ = compute_policy_gradient_loss(policy, "dapo", **given, cliprange_high=0.9)
    torch.testing.assert_close(wider, one_by_one(clip_by_hand(0.2, 0.9), advantages, policy, old))

    assert [name for name, recipe in RECIPES.items() if not recipe.normalize_by_std] == ["dr_grpo"]
    assert [name for name, recipe in RECIPES.items() if recipe.skip_equal_groups] == ["dapo"]
    assert RECIPES["dr_grpo"].aggregation == "masked_normalize"
    assert RECIPES["dapo"].aggregation == "token_mean"


@pytest.mark.parametrize(
    ("loss_type", "needed"),
    [
        ("no_baseline", ["raw_rewards"]),
        ("reinforce_with_baseline", ["advantages"]),
        ("grpo_no_clip", ["advantages", "old_log_probs"]),
        *((name, ["advantages", "old_log_probs", "cliprange"]) for name in ("grpo_clip", "dr_grpo", "dapo")),
    ],
)
def test_a_missing_argument_is_named(loss_type, needed):
    advantages, policy, old, _ = random_batch((2, 3))
    given = {"raw_rewards": advantages, "advantages": advantages, "old_log_probs": old, "cliprange": 0.2}
    compute_policy_gradient_loss(policy, loss_type, **{name: given[name] for name in needed})  # nothing else is needed
    for missing in needed:
        with pytest.raises(ValueError, match=f"^loss_type '{loss_type}' needs {missing}, which is missing$"):
            compute_policy_gradient_loss(policy, loss_type, **{**given, missing: None})


def test_unknown_names_are_refused_with_the_known_ones():
    advantages, policy, _, mask = random_batch((2, 3))
    unchecked = inspect.unwrap(compute_policy_gradient_loss)  # beartype would refuse the name first
    with pytest.raises(ValueError, match=r"no loss_type 'ppo'; choose one of no_baseline, .*dapo"):
        unchecked(policy, "ppo", advantages=advantages)
    with pytest.raises(ValueError, match="no aggregation 'mean'; choose one of masked_mean"):
        inspect.unwrap(aggregate)(policy, mask, "mean")
    with pytest.raises(ValueError, match="needs normalize_constant"):
        aggregate(policy, mask, "masked_normalize")


def test_the_kl_estimate_is_unbiased_and_never_negative():
    rng = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 1, 50, dtype=torch.float64, generator=rng).log_softmax(-1)
    estimates = kl_estimate(policy, reference)
    assert (estimates >= 0).all()
    expectation = (policy.exp() * estimates).sum()
    torch.testing.assert_close(expectation, torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=policy[0]), torch.distributions.Categorical(logits=reference[0])
    ))  # fmt: skip
    assert not kl_estimate(policy, policy).any()


def aggregate_by_hand(loss, mask, aggregation, constant):
    """Compute the aggregations that TRL calls grpo, dr_grpo and dapo, over lists of numbers."""
    rows = [[value for value, kept in zip(*row) if kept] for row in zip(loss.tolist(), mask.tolist())]
    if aggregation == "masked_mean":
        return sum(sum(row) / max(len(row), 1) for row in rows) / len(rows)
    if aggregation == "masked_normalize":
        return sum(sum(row) for row in rows) / (constant * len(rows))
    return sum(sum(row) for row in rows) / max(sum(len(row) for row in rows), 1)


@given(st.data())
def test_the_loss_of_a_batch_does_not_depend_on_its_split(data):
    rows, columns = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 5))
    numbers = st.floats(-10, 10, allow_subnormal=False)
    loss = torch.tensor(
        data.draw(st.lists(st.lists(numbers, min_size=columns, max_size=columns), min_size=rows, max_size=rows)),
        dtype=torch.float64,
    )
    bits = st.lists(st.booleans(), min_size=columns, max_size=columns)
    mask = torch.tensor(data.draw(st.lists(bits, min_size=rows, max_size=rows)))
    order = data.draw(st.permutations(range(rows)))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1) if rows > 1 else st.nothing())))
    for aggregation in AGGREGATIONS:
        whole = aggregate(loss, mask, aggregation, 7.0)
        assert whole.item() == pytest.approx(aggregate_by_hand(loss, mask, aggregation, 7.0), abs=1e-12)
        parts = [
            aggregate(loss[part], mask[part], aggregation, 7.0, int(mask.sum()), rows)
            for part in torch.tensor_split(torch.tensor(order), cuts)
        ]
        assert sum(parts).item() == pytest.approx(whole.item(), abs=1e-12)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_an_empty_response_contributes_zero_but_counts(aggregation):
    loss = torch.tensor([[2.0, 4.0], [math.nan, 1.0]], requires_grad=True)
    one_empty = torch.tensor([[True, True], [False, False]])
    expected = {"masked_mean": 1.5, "masked_normalize": 6 / 10 / 2, "token_mean": 3.0}[aggregation]
    result = aggregate(loss, one_empty, aggregation, 10.0)
    assert result.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(result, loss)
    assert gradient[0].all()
    assert not gradient[1].any()

    nothing = aggregate(loss, torch.zeros(2, 2, dtype=torch.bool), aggregation, 10.0)
    assert nothing.item() == 0
    assert not torch.autograd.grad(nothing, loss)[0].any()
    assert aggregate(loss, torch.zeros(2, 2, dtype=torch.bool), aggregation, 10.0, total_tokens=0).item() == 0
