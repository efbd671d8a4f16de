"""The order of data."""

from hypothesis import given
from hypothesis import strategies as st

from cs336_alignment.runs.data_order import Epochs, seed_of_draw, shuffled_indices


@given(size=st.integers(1, 20), seed=st.integers(0, 9), counts=st.lists(st.integers(0, 30), max_size=5))
def test_pieces_make_up_one_sequence_of_permutations(size, seed, counts):
    total = sum(counts)
    whole = shuffled_indices(size, seed, 0, total)
    pieces, start = [], 0
    for count in counts:
        pieces += shuffled_indices(size, seed, start, count)
        start += count
    assert pieces == whole
    for epoch in range(total // size):
        assert sorted(whole[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_seeds_and_epochs_differ():
    orders = [tuple(shuffled_indices(50, seed, start, 50)) for seed in (0, 1) for start in (0, 50)]
    assert len(set(orders)) == 4


@given(size=st.integers(1, 40), batch_size=st.integers(1, 50), epochs=st.integers(1, 4), seed=st.integers(0, 3))
def test_every_epoch_has_each_element_once(size, batch_size, epochs, seed):
    data = Epochs(size, batch_size, epochs, seed)
    batches = [data.batch(number) for number in range(1, data.updates + 1)]
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    indices = [index for batch in batches for index in batch]
    for start in range(0, size * epochs, size):
        assert sorted(indices[start : start + size]) == list(range(size))
    assert len(indices) == size * epochs


def test_orders_differ_by_epoch_and_seed():
    orders = {tuple(Epochs(20, 20, 2, seed).batch(number)) for seed in (0, 1) for number in (1, 2)}
    assert len(orders) == 4


def test_draws_have_seeds_of_their_own():
    seeds = {seed_of_draw(seed, number) for seed in range(10) for number in range(100)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**32 for seed in seeds)
    assert seed_of_draw(3, 5) == seed_of_draw(3, 5)
