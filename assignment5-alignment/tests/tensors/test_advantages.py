"""Advantages against the statistics module, one group at a time."""

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cs336_alignment.tensors.advantages import compute_group_normalized_rewards, group_advantages

EPS = 1e-6


def by_hand(rewards, group_size, eps, normalize_by_std):
    result = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        mean = statistics.fmean(group)
        scale = statistics.stdev(group) + eps if normalize_by_std else 1.0
        result += [(reward - mean) / scale for reward in group]
    return result


@given(
    st.integers(2, 5).flatmap(
        lambda size: st.tuples(
            st.just(size),
            st.lists(st.lists(st.sampled_from([0, 0.1, 0.5, 1]), min_size=size, max_size=size), min_size=1),
        )
    ),
    st.booleans(),
)
def test_against_the_statistics_module(drawn, normalize_by_std):
    size, groups = drawn
    rewards = [float(reward) for group in groups for reward in group]
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        ours, equal = group_advantages(torch.tensor(rewards, dtype=dtype), size, EPS, normalize_by_std)
        assert ours.dtype == dtype
        assert ours.tolist() == pytest.approx(by_hand(rewards, size, EPS, normalize_by_std), abs=tolerance)
        assert equal.tolist() == [len(set(group)) == 1 for group in groups]


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, 1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("eps", [EPS, 0.0])
def test_equal_rewards_have_no_advantage_at_all(reward, eps):
    for size in (2, 3, 7, 10):
        advantages, equal = group_advantages(torch.full((2 * size,), reward), size, eps, True)
        assert advantages.tolist() == [0] * (2 * size)
        assert equal.all()


def test_the_order_of_groups_and_of_responses_does_not_matter():
    rewards = torch.rand(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rewards[2] = 0.5
    advantages, equal = group_advantages(rewards.flatten(), 4, EPS, True)
    rows, columns = torch.randperm(6), torch.randperm(4)
    shuffled, shuffled_equal = group_advantages(rewards[rows][:, columns].flatten(), 4, EPS, True)
    torch.testing.assert_close(shuffled.view(6, 4), advantages.view(6, 4)[rows][:, columns], rtol=0, atol=1e-14)
    assert torch.equal(shuffled_equal, equal[rows])


def test_a_group_of_one_has_a_mean_but_no_deviation():
    advantages, equal = group_advantages(torch.tensor([1.0, 0.0]), 1, EPS, False)
    assert advantages.tolist() == [0, 0]
    assert equal.all()
    with pytest.raises(ValueError, match="group_size is 1, but one reward has no standard deviation"):
        group_advantages(torch.tensor([1.0, 0.0]), 1, EPS, True)


@pytest.mark.parametrize(("count", "size"), [(5, 2), (3, 4), (0, 2), (4, 0), (4, -2)])
def test_what_does_not_split_into_groups_is_refused(count, size):
    with pytest.raises(ValueError, match=f"{count} rewards do not split into groups of {size}"):
        group_advantages(torch.zeros(count), size, EPS, False)


def length_reward(response, truth):
    return {"reward": len(response) / 10, "format_reward": 1.0, "answer_reward": float(response == truth)}


@pytest.mark.parametrize("normalize_by_std", [True, False])
def test_rewards_are_graded_and_compared(normalize_by_std):
    responses = ["a", "bbb", "", "cc", "cc", "cc"]
    advantages, raw, metadata = compute_group_normalized_rewards(
        length_reward, responses, ["a"] * 6, 3, EPS, normalize_by_std
    )
    rewards = [0.1, 0.3, 0.0, 0.2, 0.2, 0.2]
    assert raw.dtype == advantages.dtype == torch.float32
    assert raw.tolist() == pytest.approx(rewards)
    assert advantages.tolist() == pytest.approx(by_hand(rewards, 3, EPS, normalize_by_std), abs=1e-5)
    assert metadata == pytest.approx(
        {"mean": 1 / 6, "std": statistics.stdev(rewards), "max": 0.3, "min": 0.0, "frac_reward_zero_std": 0.5}
    )
    assert all(type(value) is float for value in metadata.values())


def test_the_reward_function_gets_response_and_truth_in_this_order():
    seen = []

    def reward(response, truth):
        seen.append((response, truth))
        return {"reward": 1.0}

    _, _, metadata = compute_group_normalized_rewards(reward, ("r1",), ("t1",), 1, EPS, False)
    assert seen == [("r1", "t1")]
    assert metadata["std"] == 0
    with pytest.raises(ValueError, match="2 responses, but 1 ground truths"):
        compute_group_normalized_rewards(reward, ["a", "b"], ["c"], 2, EPS, False)
