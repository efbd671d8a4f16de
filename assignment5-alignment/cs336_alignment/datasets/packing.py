"""Packing: instruction data as one stream of tokens, cut into sequences of equal length, without padding or masks."""

import random
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from cs336_alignment.datasets.demonstrations import load_demonstrations
from cs336_alignment.prompts.templates import load_prompt

_DOCUMENTS_AT_ONCE = 1024  # enough to keep the tokenizer's threads busy


class PackedSftDataset(Dataset[dict[str, Tensor]]):
    """Non-overlapping sequences of tokens from the documents of a file, which are concatenated.

    A document is a prompt with its response in the Alpaca template (Taori et al. 2023), between the tokenizer's
    beginning-of-sequence and end-of-sequence tokens. If the tokenizer has no beginning-of-sequence token, such as
    Qwen's, the end of the previous document separates the two. Tokens at the end that do not fill a sequence are
    dropped.

    Args:
        tokenizer: its own settings for adding special tokens are ignored.
        dataset_path: JSON lines, see `load_demonstrations`.
        seq_length: tokens per sequence.
        shuffle: shuffle the documents first.
        seed: seed of that order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is malformed, or too short for one sequence; or the tokenizer has no
            end-of-sequence token.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        dataset_path: str | Path,
        seq_length: int,
        shuffle: bool,
        seed: int = 0,
    ) -> None:
        if seq_length < 1:
            raise ValueError(f"seq_length is {seq_length}, but must be at least 1")
        template = load_prompt("alpaca_sft")
        texts = [template.render(row.prompt, response=row.response) for row in load_demonstrations(Path(dataset_path))]
        if shuffle:
            random.Random(seed).shuffle(texts)
        self._tokens = _encode_documents(tokenizer, texts)
        self._seq_length = seq_length
        if len(self) == 0:
            raise ValueError(
                f"{dataset_path} has {len(self._tokens)} tokens, but one chunk with its labels needs {seq_length + 1}"
            )

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_length  # the last label is one token after its sequence

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids` and `labels`, the next tokens, both int64 of shape [seq_length]."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"chunk {index} of {len(self)}")
        start = index % len(self) * self._seq_length
        chunk = self._tokens[start : start + self._seq_length + 1].long()
        return {"input_ids": chunk[:-1], "labels": chunk[1:]}


def iterate_batches(
    dataset: Dataset[dict[str, Tensor]], batch_size: int, shuffle: bool, generator: torch.Generator | None = None
) -> DataLoader[dict[str, Tensor]]:
    """Iterate over one epoch of batches, `input_ids` and `labels` of shape [batch seq]. The last may be short.

    Args:
        dataset: the sequences.
        batch_size: sequences per batch.
        shuffle: use a random order, which differs in every epoch.
        generator: for that order. Default: PyTorch's global generator.
    """
    return DataLoader(dataset, batch_size=batch_size, shuffle=shuffle, generator=generator)


def _encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Int[Tensor, " tokens"]:
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token to end documents with; set tokenizer.eos_token")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [tokenizer.eos_token_id]
    parts = []
    for start in range(0, len(texts), _DOCUMENTS_AT_ONCE):
        # Some tokenizers add special tokens to each text and others do not. Here none does.
        encoded = tokenizer(texts[start : start + _DOCUMENTS_AT_ONCE], add_special_tokens=False)["input_ids"]
        ids = [token for document in encoded for token in (*begin, *document, *end)]
        parts.append(torch.tensor(ids, dtype=torch.int32))  # half of int64; vocabularies are far below 2^31
    return torch.cat(parts)
