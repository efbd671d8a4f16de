"""Packed instruction data, against documents encoded one by one."""

import gzip
import json
import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from cs336_alignment.datasets.packing import PackedSftDataset, iterate_batches

BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
ROWS = [{"prompt": f"Say {word}.", "response": f"{word}! " * n} for n, word in enumerate(["hi", "ünï", "no", "yes"], 1)]


def byte_tokenizer(adds_bos=False, bos=BOS, eos=EOS):
    """One token per byte. Like Llama-3's tokenizer, it can add a beginning of sequence to every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in (BOS, EOS) if token in (bos, eos)])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def document(row, begin=BOS, end=EOS):
    opening = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    )
    return f"{begin}{opening}\n\n### Instruction:\n{row['prompt']}\n\n### Response:\n{row['response']}{end}"


@pytest.mark.parametrize("seq_length", [1, 7, 32, 100])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_chunks_of_all_documents(path, seq_length, adds_bos):
    tokenizer = byte_tokenizer(adds_bos)
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) is adds_bos
    dataset = PackedSftDataset(tokenizer, path, seq_length, shuffle=False)
    stream = tokenizer.encode("".join(document(row) for row in ROWS), add_special_tokens=False)
    assert stream.count(tokenizer.bos_token_id) == stream.count(tokenizer.eos_token_id) == len(ROWS)
    assert len(dataset) == (len(stream) - 1) // seq_length
    for index, item in enumerate(dataset):
        start = index * seq_length
        assert item.keys() == {"input_ids", "labels"}
        assert item["input_ids"].dtype == item["labels"].dtype == torch.int64
        assert item["input_ids"].tolist() == stream[start : start + seq_length]
        assert item["labels"].tolist() == stream[start + 1 : start + 1 + seq_length]
    assert index == len(dataset) - 1


def test_indices_are_those_of_a_sequence(path):
    dataset = PackedSftDataset(byte_tokenizer(), path, 32, shuffle=False)
    assert torch.equal(dataset[-1]["labels"], dataset[len(dataset) - 1]["labels"])
    for index in (len(dataset), -len(dataset) - 1):
        with pytest.raises(IndexError):
            dataset[index]


def test_an_incomplete_chunk_is_dropped(path):
    tokens = sum(len(document(row, "#", "#").encode()) for row in ROWS)
    tokenizer = byte_tokenizer()
    assert len(PackedSftDataset(tokenizer, path, tokens - 1, shuffle=False)) == 1
    with pytest.raises(ValueError, match=rf"sft.jsonl has {tokens} tokens, but one chunk .* needs {tokens + 1}"):
        PackedSftDataset(tokenizer, path, tokens, shuffle=False)


def test_a_tokenizer_without_a_beginning_of_sequence(path):
    tokenizer = byte_tokenizer(bos=None)
    dataset = PackedSftDataset(tokenizer, path, 1, shuffle=False)
    text = tokenizer.decode([item["input_ids"].item() for item in dataset])
    assert text == "".join(document(row, begin="") for row in ROWS).removesuffix(EOS)


def test_a_tokenizer_without_an_end_of_sequence_is_refused(path):
    with pytest.raises(ValueError, match=r"has no end-of-sequence token .*; set tokenizer.eos_token"):
        PackedSftDataset(byte_tokenizer(eos=None), path, 32, shuffle=False)


def documents_of(dataset, tokenizer):
    text = tokenizer.decode([item["input_ids"].item() for item in dataset])
    return (text + EOS).removesuffix(EOS).split(EOS)


def test_shuffling_permutes_whole_documents(path):
    tokenizer = byte_tokenizer()
    expected = [document(row, end="") for row in ROWS]
    orders = set()
    for seed in range(8):
        shuffled = documents_of(PackedSftDataset(tokenizer, path, 1, shuffle=True, seed=seed), tokenizer)
        assert shuffled == documents_of(PackedSftDataset(tokenizer, path, 1, shuffle=True, seed=seed), tokenizer)
        assert sorted(shuffled) == sorted(expected)
        orders.add(tuple(shuffled))
    assert len(orders) > 4
    assert documents_of(PackedSftDataset(tokenizer, path, 1, shuffle=False), tokenizer) == expected


def test_an_archive_gives_the_same(path, tmp_path):
    packed = tmp_path / "sft.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    plain, unpacked = (PackedSftDataset(byte_tokenizer(), str(source), 9, shuffle=False) for source in (path, packed))
    assert all(torch.equal(a["labels"], b["labels"]) for a, b in zip(plain, unpacked, strict=True))


def test_thousands_of_documents_go_through_in_order(tmp_path):
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n}", "response": "r"}) + "\n" for n in range(2500)))
    tokenizer = byte_tokenizer()
    text = tokenizer.decode(
        torch.cat([item["labels"] for item in PackedSftDataset(tokenizer, path, 64, shuffle=False)])
    )
    numbers = [int(part.split("\n")[1]) for part in text.split("### Instruction:")[1:-1]]
    assert numbers == list(range(len(numbers)))
    assert len(numbers) > 2490


@pytest.mark.parametrize("seq_length", [0, -1])
def test_a_length_that_makes_no_sense(path, seq_length):
    with pytest.raises(ValueError, match=f"seq_length is {seq_length}, but must be at least 1"):
        PackedSftDataset(byte_tokenizer(), path, seq_length, shuffle=False)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 8, 1000])
def test_an_epoch_of_batches(path, shuffle, batch_size):
    dataset = PackedSftDataset(byte_tokenizer(), path, 16, shuffle=False)
    batches = iterate_batches(dataset, batch_size, shuffle)
    assert len(batches) == math.ceil(len(dataset) / batch_size)
    sizes, seen = [], []
    for batch in batches:
        sizes.append(len(batch["input_ids"]))
        assert batch["input_ids"].shape == batch["labels"].shape == (sizes[-1], 16)
        assert torch.equal(batch["input_ids"][:, 1:], batch["labels"][:, :-1])
        seen += batch["input_ids"].tolist()
    assert sizes[:-1] == [batch_size] * (len(batches) - 1)
    everything = [item["input_ids"].tolist() for item in dataset]
    assert sorted(seen) == sorted(everything)
    assert (seen == everything) is not shuffle


def test_a_generator_fixes_the_order_and_epochs_differ(path):
    dataset = PackedSftDataset(byte_tokenizer(), path, 16, shuffle=False)

    def epochs():
        batches = iterate_batches(dataset, 4, shuffle=True, generator=torch.Generator().manual_seed(5))
        return [torch.cat([batch["labels"] for batch in batches]) for _ in range(2)]

    first, second = epochs()
    assert not torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip((first, second), epochs()))
