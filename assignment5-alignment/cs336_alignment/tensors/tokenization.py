"""From prompts and outputs to tensors: token ids, next-token labels, and which labels are response tokens."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase


def tokenize_prompt_and_output(
    prompt_strs: Sequence[str], output_strs: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Tokenise each prompt and each output by itself, with the tokenizer's defaults, and `collate` them.

    No token spans the boundary, so that the prompt's tokens are those that generation started from. Nothing is added:
    whoever wants an end of sequence writes it at the end of the output. A tokenizer that opens every text with a
    token of its own does so for the output too.

    Returns:
        What `collate` does.

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

    With the padding on the right, a causal model needs no attention mask: no token that counts sees it.

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
        raise ValueError("there are no prompts to make a batch of; give at least one")
    rows = [torch.tensor([*prompt, *output], dtype=torch.long) for prompt, output in zip(prompts, outputs)]
    ids: Int[Tensor, "batch longest"] = pad_sequence(rows, batch_first=True, padding_value=pad_token_id).to(device)

    position = torch.arange(ids.shape[1], device=device)
    begin = torch.tensor([len(prompt) for prompt in prompts], device=device).unsqueeze(1)
    end = torch.tensor([len(row) for row in rows], device=device).unsqueeze(1)
    is_response: Bool[Tensor, "batch longest"] = (begin <= position) & (position < end)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "response_mask": is_response[:, 1:]}


def token_budget_microbatches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split sequences into microbatches that take about the same memory, with little padding.

    Args:
        lengths: tokens of each sequence.
        max_tokens: the most tokens of a microbatch, padding included: rows · longest row. A sequence that is longer
            than that gets a microbatch of its own.

    Returns:
        Indices into `lengths`, each once. Sequences are sorted by length, so that rows of one microbatch are of
        similar length, and the longest come first: what does not fit into memory fails at once.
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
