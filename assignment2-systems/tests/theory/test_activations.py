"""Predicted activations by hand. `instruments/test_checkpointing.py` and `test_attention.py` compare with autograd."""

from cs336_systems.theory.activations import SavedBytes, attention_bytes, checkpointed_bytes


def test_order_of_peaks():
    parts = SavedBytes(stream=1, block=40, head=10)
    peaks = {name: checkpointed_bytes(name, 48, parts)[1] for name in ("none", "group", "block", "nested")}
    assert peaks == {"none": 1930, "group": 7 + 7 * 40 - 1, "block": 48 + 39, "nested": 6 + 40}


def test_prediction_by_hand():
    # 5 tensors of 8 x 16384 x 64, 2 squares a sequence and its row sums in float32, one mask of bytes
    by_hand = 5 * 33_554_432 + 8 * (2 * 268_435_456 + 16_384) * 4 + 268_435_456
    assert attention_bytes(8, 16_384, 64, 4, keeps_scores=True) == by_hand
    assert attention_bytes(8, 16_384, 64, 4, keeps_scores=False) == 5 * 33_554_432 + 8 * 16_384 * 4
