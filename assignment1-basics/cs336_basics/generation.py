"""Sampling text from a model.

The key-value cache works on prompts of different lengths at once without padding on the left. Prompts are
filled up on the right; what the padding writes into the cache lies at positions that no real token looks at,
because a token looks only at positions up to its own, and each is overwritten before it is reached.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cs336_basics.model import BasicsTransformerLM, KVCache
from cs336_basics.model_config import SamplingConfig
from cs336_basics.nn_utils import softmax
from cs336_basics.tokenizer import Tokenizer


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
    cache: list[KVCache] | None = None
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

            chosen = sample(logits.float(), sampling, rng).tolist()
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


def sample(
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


def print_continuations(
    model: BasicsTransformerLM, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig
) -> None:
    """Print the continuations of prompts: one as it is generated, several one below the other when they are complete.

    The tokenizer's first special token ends a continuation, and starts one whose prompt is empty.
    """
    stop = tokenizer.token_to_id[tokenizer.special_tokens[0].encode()]
    prompt_ids = [tokenizer.encode(prompt) or [stop] for prompt in prompts]
    texts = list(prompts)
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]  # characters may span tokens
    show: Callable[..., None] = print if len(prompts) == 1 else (lambda *_, **__: None)
    show(prompts[0], end="", flush=True)
    for tokens in generate_stream(model, prompt_ids, sampling, stop):
        for index, token in enumerate(tokens):
            if token is not None:
                piece = decoders[index].decode(tokenizer.vocab[token])
                texts[index] += piece
                show(piece, end="", flush=True)
    for index, decoder in enumerate(decoders):
        rest = decoder.decode(b"", final=True)  # half a character at the end
        texts[index] += rest
        show(rest)
    if len(prompts) > 1:
        for number, text in enumerate(texts, start=1):
            print(f"--- {number}\n{text}")


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
