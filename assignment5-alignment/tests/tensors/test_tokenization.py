"""Batches against batches made element by element, and microbatches against the best split."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from cs336_alignment.tensors.tokenization import collate, token_budget_microbatches, tokenize_prompt_and_output
from tests.tiny import tiny_tokenizer

PAD = 0
IDS = st.lists(st.integers(1, 50), max_size=6)


def by_hand(prompts, outputs, pad):
    """Make the batch one element at a time."""
    longest = max(len(prompt) + len(output) for prompt, output in zip(prompts, outputs))
    batch = {"input_ids": [], "labels": [], "response_mask": []}
    for prompt, output in zip(prompts, outputs):
        row = [(token, False) for token in prompt] + [(token, True) for token in output]
        row += [(pad, False)] * (longest - len(row))
        batch["input_ids"].append([token for token, _ in row[:-1]])
        batch["labels"].append([token for token, _ in row[1:]])
        batch["response_mask"].append([response for _, response in row[1:]])
    width = max(longest - 1, 0)
    return {
        key: torch.tensor(rows, dtype=torch.bool if key == "response_mask" else torch.long).view(len(prompts), width)
        for key, rows in batch.items()
    }


def assert_same_batch(ours, expected):
    assert ours.keys() == expected.keys()
    for key in expected:
        assert ours[key].dtype == expected[key].dtype
        assert torch.equal(ours[key], expected[key]), key


@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5))
def test_collate_equals_a_batch_made_by_hand(rows):
    prompts, outputs = [prompt for prompt, _ in rows], [output for _, output in rows]
    assert_same_batch(collate(prompts, outputs, PAD), by_hand(prompts, outputs, PAD))


def test_collate_of_known_ids():
    batch = collate([[5, 6, 7], (8,)], [[9], (10, 11, 12, 13)], pad_token_id=99)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 9], [8, 10, 11, 12]]
    assert batch["labels"].tolist() == [[6, 7, 9, 99], [10, 11, 12, 13]]
    assert batch["response_mask"].tolist() == [[False, False, True, False], [True, True, True, True]]


def test_a_pad_token_within_an_output_still_counts():
    batch = collate([[3]], [[PAD, 4]], PAD)
    assert batch["response_mask"].tolist() == [[True, True]]


def test_collate_refuses_what_is_no_batch():
    with pytest.raises(ValueError, match="2 prompts, but 1 outputs"):
        collate([[1], [2]], [[3]], PAD)
    with pytest.raises(ValueError, match="at least one"):
        collate([], [], PAD)


@pytest.mark.parametrize(
    ("prompts", "outputs"),
    [
        (["User: What is 3 + 4?"], [" 7"]),
        (["Us", "User: What is"], ["er: What is 3?", ""]),
        (["a", "the answer is 3"], ["a much longer answer than the other: 3 + 4", "é 🙂"]),
        (["", "x"], ["only an output", ""]),
    ],
)
def test_texts_are_tokenised_apart(prompts, outputs):
    tokenizer = tiny_tokenizer()
    encoded = [[tokenizer.encode(text) for text in texts] for texts in (prompts, outputs)]
    batch = tokenize_prompt_and_output(prompts, outputs, tokenizer)
    assert_same_batch(batch, by_hand(*encoded, tokenizer.pad_token_id))
    for output, labels, mask in zip(outputs, batch["labels"], batch["response_mask"]):
        if len(output) > 1:
            assert tokenizer.decode(labels[mask]) in output
            assert mask.any()
        elif not output:
            assert not mask.any()


def test_no_token_spans_the_boundary():
    tokenizer = tiny_tokenizer()
    assert len(tokenizer.encode("User")) < len(tokenizer.encode("Us")) + len(tokenizer.encode("er"))
    batch = tokenize_prompt_and_output(["Us"], ["er"], tokenizer)
    assert batch["input_ids"].shape == (1, len(tokenizer.encode("Us")) + len(tokenizer.encode("er")) - 1)


def test_what_the_tokenizer_adds_by_itself_stays():
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 1)])
    batch = tokenize_prompt_and_output(["3"], ["4"], tokenizer)
    three, four = (tokenizer.convert_tokens_to_ids(digit) for digit in "34")
    assert batch["input_ids"].tolist() == [[1, three, 1]]
    assert batch["labels"].tolist() == [[three, 1, four]]
    assert batch["response_mask"].tolist() == [[False, True, True]]


def test_a_tokenizer_without_pad_token_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"no pad token; set tokenizer\.pad_token"):
        tokenize_prompt_and_output(["a"], ["b"], tokenizer)


def fewest_microbatches(lengths, max_tokens):
    """Search all ways to cut the sorted sequences into microbatches that fit."""
    lengths = sorted(lengths)
    best = [0]
    for end in range(1, len(lengths) + 1):
        fitting = [
            best[start] for start in range(end) if end - start == 1 or (end - start) * lengths[end - 1] <= max_tokens
        ]
        best.append(1 + min(fitting))
    return best[-1]


@given(st.lists(st.integers(0, 30), max_size=20), st.integers(1, 100))
@settings(max_examples=200)
def test_microbatches_keep_to_the_budget(lengths, max_tokens):
    microbatches = token_budget_microbatches(lengths, max_tokens)
    assert sorted(index for microbatch in microbatches for index in microbatch) == list(range(len(lengths)))
    in_order = [lengths[index] for microbatch in microbatches for index in microbatch]
    assert in_order == sorted(lengths, reverse=True)
    for microbatch in microbatches:
        padded = len(microbatch) * max(lengths[index] for index in microbatch)
        assert padded <= max_tokens or len(microbatch) == 1
    if all(lengths):  # rows without tokens take no memory, but are no reason for an endless microbatch
        assert len(microbatches) == fewest_microbatches(lengths, max_tokens)


def test_microbatches_of_known_lengths():
    assert token_budget_microbatches([3, 10, 4, 5, 40, 5], max_tokens=20) == [[4], [1, 3], [5, 2, 0]]
    assert token_budget_microbatches([], max_tokens=20) == []
    with pytest.raises(ValueError, match="max_tokens is 0"):
        token_budget_microbatches([1], max_tokens=0)
