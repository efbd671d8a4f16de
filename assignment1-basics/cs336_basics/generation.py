"""Sampling text from a model.

The key-value cache works on prompts of different lengths at once without padding on the left. Prompts are
filled up on the right; what the padding writes into the cache lies at positions that no real token looks at,
because a token looks only at positions up to its own, and each is overwritten before it is reached.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cs336_basics.model import BasicsTransformerLM, LayerCache
from cs336_basics.nn_utils import softmax


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    """The most tokens to generate for each prompt."""
    temperature: float = 1.0
    """Logits are divided by it: below 1 bolder, above 1 more varied; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float | None = None
    """Choose among the fewest tokens whose probabilities sum to at least this (nucleus sampling)."""
    seed: int | None = 0
    """Fixes the random choices; None for other ones every time."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, but must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, but must not be negative; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, but must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but must lie above 0 and at most at 1")


def generate(
    model: BasicsTransformerLM,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig | None = None,
    stop_token_id: int | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """The tokens that the model continues each prompt with; see `generate_stream`."""
    continuations: list[list[int]] = [[] for _ in prompts]
    for tokens in generate_stream(model, prompts, sampling, stop_token_id, use_cache):
        for continuation, token in zip(continuations, tokens, strict=True):
            if token is not None:
                continuation.append(token)
    return continuations


@torch.no_grad()
def generate_stream(
    model: BasicsTransformerLM,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig | None = None,
    stop_token_id: int | None = None,
    use_cache: bool = True,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt as it is chosen; None once a prompt has come to its end.

    Args:
        prompts: token ids, at least one each; lengths may differ.
        stop_token_id: ends a continuation, of which it is no part.
        use_cache: False computes every step from scratch, for comparison; the tokens are the same.

    A text longer than the context length is seen through a window of its last tokens: when it is full, it
    moves on by half its length (see `window_start`).
    """
    sampling = sampling or SamplingConfig()
    _check_prompts(prompts, model.vocab_size)
    device = model.lm_head.weight.device
    rng = torch.Generator(device)
    if sampling.seed is None:
        rng.seed()
    else:
        rng.manual_seed(sampling.seed)

    texts = [list(prompt) for prompt in prompts]
    done = [False] * len(texts)
    cache: list[LayerCache] | None = None
    cached_starts: list[int] = []
    was_training = model.training
    model.eval()
    try:
        for _ in range(sampling.max_new_tokens):
            starts = [window_start(len(text), model.context_length) for text in texts]
            if cache is not None and starts == cached_starts:  # all but the last token is in the cache
                token_ids = torch.tensor([text[-1:] for text in texts], device=device)
                positions = torch.tensor([[len(text) - 1 - start] for text, start in zip(texts, starts)], device=device)
                logits = model(token_ids, positions, cache)[:, -1]
            else:
                windows = [text[start:] for text, start in zip(texts, starts)]
                longest = max(map(len, windows))
                token_ids = torch.tensor([window + [0] * (longest - len(window)) for window in windows], device=device)
                positions = torch.arange(longest, device=device).expand(len(windows), -1)
                cache, cached_starts = (model.new_cache(len(windows)) if use_cache else None), starts
                last = torch.tensor([len(window) - 1 for window in windows], device=device)
                logits = model(token_ids, positions, cache)[torch.arange(len(windows), device=device), last]

            chosen = choose(logits.float(), sampling, rng).tolist()
            done = [finished or token == stop_token_id for finished, token in zip(done, chosen)]
            if all(done):
                return
            for text, token in zip(texts, chosen):
                text.append(token)  # to finished texts too: the rows of the cache move on together
            yield [None if finished else token for finished, token in zip(done, chosen)]
    finally:
        model.train(was_training)


def window_start(length: int, context_length: int) -> int:
    """Where the model's view of a text of `length` tokens begins: 0, then on by half a context when it is full.

    >>> [window_start(length, 8) for length in (7, 8, 9, 12, 13)]
    [0, 0, 4, 4, 8]
    """
    stride = max(1, context_length // 2)
    return max(0, -(-(length - context_length) // stride)) * stride


def choose(
    logits: Float[Tensor, "batch vocab"], sampling: SamplingConfig, rng: torch.Generator | None = None
) -> Int[Tensor, " batch"]:
    """Choose one token of each row."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    below_zero = logits - logits.amax(-1, keepdim=True)  # so that no temperature is too low to divide by
    probabilities = softmax(filter_logits(below_zero / sampling.temperature, sampling.top_k, sampling.top_p))
    return torch.multinomial(probabilities, 1, generator=rng).squeeze(-1)


def filter_logits(
    logits: Float[Tensor, "batch vocab"], top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "batch vocab"]:
    """Set the logits of all but the likeliest tokens to -∞: first to `top_k` tokens, then to the nucleus of `top_p`.

    The nucleus (Holtzman et al. 2020) is the smallest set of likeliest tokens whose probabilities sum to at
    least `top_p`; it is never empty.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        inside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, dim=-1).indices, True)
        logits = logits.masked_fill(~inside, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = softmax(ordered)
        before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(outside, -torch.inf)
    return logits


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty; begin with at least one token, <|endoftext|> say")
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"prompt {number} has token id {outside[0]}, but the model's vocabulary has {vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
