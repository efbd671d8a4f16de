"""Prompts and outputs as tensors: token ids, next-token labels, and a mask of the labels that belong to responses."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Tokenize each prompt and each output separately, with the tokenizer's defaults, and `collate` them.

    No token spans the boundary, so the prompt's tokens are those that generation started from. Nothing is added: an end
    of sequence must be written at the end of the output. A tokenizer that begins every text with a special token does
    so for the output too.

    Returns:
        The tensors of `collate`.

    Raises:
        ValueError: the tokenizer has no pad token, or there is not one output for each prompt.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set tokenizer.pad_token, for instance to its eos_token")
    prompts, outputs = ([tokenizer(text)["input_ids"] for text in texts] for texts in (prompt_strs, output_strs))
    return collate(prompts, outputs, tokenizer.pad_token_id)


def collate(
    prompts: Sequence[Sequence[int]],
    outputs: Sequence[Sequence[int]],
    pad_token_id: int,
    device: torch.device | str | None = None,
) -> dict[str, Tensor]:
    """Concatenate the token ids of prompts and outputs, and pad them on the right.

    Because the padding is on the right, a causal model needs no attention mask: no token that counts can see it.

    Returns:
        Three tensors of shape [batch, tokens of the longest row − 1]:
        `input_ids`, without the last column;
        `labels`, without the first column: the token after each input;
        `response_mask`, True where the label is a token of the output. An empty output has a row of False.

    Raises:
        ValueError: there is not one output for each prompt, or there are none.
    """
    if len(prompts) != len(outputs):
        raise ValueError(f"there are {len(prompts)} prompts, but {len(outputs)} outputs; each prompt needs one")
    if not prompts:
        raise ValueError("there are no prompts; a batch needs at least one")
    rows = [torch.tensor([*prompt, *output], dtype=torch.long) for prompt, output in zip(prompts, outputs)]
    ids: Int[Tensor, "batch longest"] = pad_sequence(rows, batch_first=True, padding_value=pad_token_id).to(device)

    position = torch.arange(ids.shape[1], device=device)
    begin = torch.tensor([len(prompt) for prompt in prompts], device=device).unsqueeze(1)
    end = torch.tensor([len(row) for row in rows], device=device).unsqueeze(1)
    is_response: Bool[Tensor, "batch longest"] = (begin <= position) & (position < end)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": is_response[:, 1:]}


def token_budget_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split sequences into microbatches that need about the same memory, with little padding.

    Args:
        lengths: tokens of each sequence.
        max_tokens: maximum number of tokens in a microbatch, padding included: sequences · longest sequence. A longer
            sequence gets a microbatch of its own.

    Returns:
        Indices into `lengths`, each of which occurs once. Sequences are sorted by length, so that those of a microbatch
        have similar lengths. The longest come first, so that running out of memory happens at once.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, but must be at least 1")
    microbatches: list[list[int]] = []
    rows_left = 0
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if rows_left == 0:
            microbatches.append([])
            rows_left = max(1, max_tokens // max(1, lengths[index]))
        microbatches[-1].append(index)
        rows_left -= 1
    return microbatches
