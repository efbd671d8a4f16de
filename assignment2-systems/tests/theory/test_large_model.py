"""The memory of the 2026 leaderboard's step by hand."""

import pytest

from cs336_basics.model import ModelConfig
from cs336_systems.theory.large_model import step_bytes

LEADERBOARD = ModelConfig(151_936, 32_768, d_model=4096, num_layers=34, num_heads=32, d_ff=11_008)


def test_memory_by_hand():
    """d 4096, d_ff 11008, 32768 tokens: s = 268 MB and 721 MB inside; a block has 202 M weights, the head 622 M."""
    s, inner, block, head = 2 * 32_768 * 4096, 2 * 32_768 * 11_008, 202_375_168, 622_329_856
    parameters, norms, rope = 34 * block + 2 * head, 69 * 4096, 32_768 * 128 * 4
    ours = step_bytes(LEADERBOARD, "ours", batch_size=1, world_size=2)
    assert ours["start"] == 4 * (parameters / 2 + norms) + rope
    always = 12 * (parameters / 2 + norms) + rope
    one_block = 7 * s + 5 * inner + 2 * 2 * block + 2 * 2 * block
    assert ours["head"] == always + 37 * s + 2 * (head + block) + 4 * head + 4 * head + 2 * head
    assert ours["first block"] == always + 34 * s + 4 * head / 2 + one_block
    assert ours["last block"] == always + s + 4 * head / 2 + 4 * 34 * block / 2 + one_block
    assert max(ours.values()) == pytest.approx(71.1e9, rel=1e-3)

    torchs = step_bytes(LEADERBOARD, "torch", batch_size=1, world_size=2)
    logits = 2 * 32_768 * 151_936
    assert torchs["start"] == ours["start"]
    assert torchs["head"] == always + 37 * s + 2 * 2 * head + logits + 2 * head + 2 * block
    assert torchs["last block"] == always + s + 2 * 2 * head + 2 * head + 4 * 34 * block / 2 + one_block
    # On one GPU nearly all of the peak are 16 bytes a parameter.
    alone = max(step_bytes(LEADERBOARD, "ours", batch_size=1, world_size=1).values())
    assert 16 * (parameters + norms) < alone < 1.05 * 16 * (parameters + norms)
