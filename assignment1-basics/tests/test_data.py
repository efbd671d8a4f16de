"""Batches: what is drawn, how evenly, and from files that are not loaded."""

import numpy as np
import pytest
import torch

from cs336_basics.data import get_batch


def test_targets_are_the_inputs_one_token_on():
    x, y = get_batch(np.arange(100), batch_size=8, context_length=7)
    assert x.shape == y.shape == (8, 7)
    assert x.dtype == y.dtype == torch.int64
    assert torch.equal(y, x + 1)
    assert torch.equal(x, x[:, :1] + torch.arange(7))


def test_every_start_is_equally_likely():
    x, _ = get_batch(np.arange(20), batch_size=32_000, context_length=4, rng=np.random.default_rng(0))
    counts = np.bincount(x[:, 0].numpy(), minlength=20)
    assert (counts[16:] == 0).all()
    expected = 32_000 / 16  # starts 0 ... 20 - 4 - 1
    chi_square = ((counts[:16] - expected) ** 2 / expected).sum()
    assert chi_square < 37.7  # 99.9 % of a chi-square distribution with 15 degrees of freedom


def test_the_shortest_data_set_has_one_window():
    x, y = get_batch(np.arange(5), batch_size=3, context_length=4)
    assert (x == torch.arange(4)).all()
    assert (y == torch.arange(1, 5)).all()


def test_numpys_seed_fixes_the_batch():
    batches = []
    for _ in range(2):
        np.random.seed(5)
        batches.append(get_batch(np.arange(1000), 4, 8)[0])
    assert torch.equal(*batches)


def test_memory_mapped_files_are_not_loaded(tmp_path):
    path = tmp_path / "tokens.npy"
    np.save(path, (np.arange(100_000) % 50_000).astype(np.uint16))
    tokens = np.load(path, mmap_mode="r")
    x, y = get_batch(tokens, 4, 16)
    assert torch.equal(y, (x + 1) % 50_000)
    assert isinstance(tokens, np.memmap)


def test_too_short_a_data_set_is_refused():
    with pytest.raises(ValueError, match="has 4 tokens, but context length 4 needs at least 5"):
        get_batch(np.arange(4), 1, 4)


def test_an_impossible_device_is_refused():
    with pytest.raises(RuntimeError, match=r"CUDA (error|enabled).*|.*cuda:99"):
        get_batch(np.arange(10), 1, 4, device="cuda:99")
    with pytest.raises(RuntimeError, match="nowhere"):
        get_batch(np.arange(10), 1, 4, device="nowhere")
