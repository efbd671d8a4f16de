"""Sample text from a model.

The KV cache handles prompts of different lengths at once without padding on the left. Shorter prompts are padded on
the right. What the padding writes into the cache is at positions that no real token attends to, because a token
attends only to positions up to its own, and each of them is overwritten before it is reached.
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
    """Return the tokens with which the model continues each prompt; see `generate_stream` for the arguments."""
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
    """Yield the next token of every prompt as it is chosen, or None once its continuation has ended.

    If a text is longer than the context length, the model sees a window of its last tokens. When the window is full, it
    moves on by half its length (see `window_start`).

    Args:
        model: the model; it is in training mode again afterwards if it was before.
        prompts: token ids, at least one per prompt; lengths may differ.
        sampling: how tokens are chosen.
        stop_token_id: ends a continuation, and is not part of it.
        use_cache: False computes every step from scratch, for comparison; the tokens are the same.

    Raises:
        ValueError: a prompt is empty, or has a token that the model does not know.
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
            if cache is not None and starts == cached_starts:  # all but the last token are in the cache
                token_ids = torch.tensor([text[-1:] for text in texts], device=device)
                positions = torch.tensor([[len(text) - 1 - start] for text, start in zip(texts, starts)], device=device)
                logits = model(token_ids, positions, cache)[:, -1]
            else:
                token_ids, positions, last = _padded([text[start:] for text, start in zip(texts, starts)], device)
                cache, cached_starts = (model.new_cache(len(texts)) if use_cache else None), starts
                logits = model(token_ids, positions, cache)[torch.arange(len(texts), device=device), last]

            chosen = sample(logits.float(), sampling, rng).tolist()
            done = [finished or token == stop_token_id for finished, token in zip(done, chosen)]
            if all(done):
                return
            for text, token in zip(texts, chosen):
                text.append(token)  # to finished texts too, because all sequences of the cache move on together
            yield [None if finished else token for finished, token in zip(done, chosen)]
    finally:
        model.train(was_training)


def _padded(
    windows: list[list[int]], device: torch.device
) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"], Int[Tensor, " batch"]]:
    """Pad texts on the right to one length; return their ids, the positions, and the index of each last token."""
    longest = max(map(len, windows))
    token_ids = torch.tensor([window + [0] * (longest - len(window)) for window in windows], device=device)
    positions = torch.arange(longest, device=device).expand(len(windows), -1)
    return token_ids, positions, torch.tensor([len(window) - 1 for window in windows], device=device)


def window_start(length: int, context_length: int) -> int:
    """Return where the model's window on a text of `length` tokens begins: at 0, later in steps of half a context.

    >>> [window_start(length, 8) for length in (7, 8, 9, 12, 13)]
    [0, 0, 4, 4, 8]
    """
    stride = max(1, context_length // 2)
    return max(0, -(-(length - context_length) // stride)) * stride


def sample(
    logits: Float[Tensor, "batch vocab"], sampling: SamplingConfig, rng: torch.Generator | None = None
) -> Int[Tensor, " batch"]:
    """Choose one token per sequence."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    shifted = logits - logits.amax(-1, keepdim=True)  # at most 0, so that no temperature is too low to divide by
    probabilities = softmax(filter_logits(shifted / sampling.temperature, sampling.top_k, sampling.top_p))
    return torch.multinomial(probabilities, 1, generator=rng).squeeze(-1)


def filter_logits(
    logits: Float[Tensor, "batch vocab"], top_k: int | None = None, top_p: float | None = None
) -> Float[Tensor, "batch vocab"]:
    """Keep the logits of the `top_k` most likely tokens and of these the nucleus of `top_p`; set all others to -∞.

    The nucleus (Holtzman et al. 2020) is the smallest set of most likely tokens whose probabilities sum to at least
    `top_p`; it is never empty.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        inside = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, logits.topk(top_k, dim=-1).indices, True)
        logits = logits.masked_fill(~inside, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = softmax(ordered)
        before = probabilities.cumsum(-1) - probabilities  # the sum over all more likely tokens
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
            raise ValueError(f"prompt {number} is empty; begin with at least one token, for example <|endoftext|>")
        outside = [token for token in prompt if not 0 <= token < vocab_size]
        if outside:
            raise ValueError(
                f"prompt {number} has token id {outside[0]}, but the model's vocabulary has {vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
