"""Encoding prompts and decoding completions, identically in both engines so that their completions are the same."""

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import GenerationConfig, PreTrainedTokenizerBase


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], context_length: int) -> list[list[int]]:
    """Tokenize each prompt with the tokenizer's defaults, as in training.

    Args:
        context_length: maximum number of tokens of a prompt and its completion together.

    Raises:
        ValueError: a prompt is empty, or leaves no room for a completion.
    """
    encoded: list[list[int]] = tokenizer(list(prompts))["input_ids"] if prompts else []
    for number, token_ids in enumerate(encoded):
        if not token_ids:
            raise ValueError(f"prompt {number} is empty, but a model needs a token to continue; give it some text")
        if len(token_ids) >= context_length:
            raise ValueError(
                f"prompt {number} has {len(token_ids)} tokens, but the model's context is {context_length}, of which "
                "at least one is for the completion; shorten the prompt, or choose a model with a longer context"
            )
    return encoded


def end_of_sequence_ids(
    tokenizer: PreTrainedTokenizerBase, generation_config: GenerationConfig | None
) -> frozenset[int]:
    """Return the tokens that end a completion: the tokenizer's, and those in the model's generation config."""
    named = generation_config.eos_token_id if generation_config is not None else None
    more = [] if named is None else [named] if isinstance(named, int) else named
    return frozenset({tokenizer.eos_token_id, *more} - {None})


class CompletionText:
    """The text of a completion that grows token by token until a stop string ends it.

    As in vLLM, special tokens have no text, and a character appears when the last of its bytes has arrived.

    >>> text = CompletionText(tokenizer, prompt_ids, stop=("</answer>",))
    >>> [text.append(token) for token in tokenizer("7</answer>!")["input_ids"]]
    [False, True, True]
    >>> text.text
    '7</answer>'

    Args:
        prompt_ids: the prompt's tokens. Some tokenizers write a token's leading space only if it follows another token.
        min_tokens: stop strings are ignored within this many tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        min_tokens: int = 0,
    ) -> None:
        self.text = ""
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=list(prompt_ids), skip_special_tokens=True)
        self._stop = stop
        self._tokens_until_stop = min_tokens

    def append(self, token_id: int) -> bool:
        """Add the next token. Return True if it completes a stop string, after which the text is cut off."""
        seen = len(self.text)
        self.text += self._stream.step(self._tokenizer, token_id) or ""
        self._tokens_until_stop -= 1
        if self._tokens_until_stop >= 0:
            return False
        ends = [
            start + len(stop)
            for stop in self._stop
            if (start := self.text.find(stop, max(0, seen + 1 - len(stop)))) >= 0
        ]
        if ends:
            self.text = self.text[: min(ends)]
        return bool(ends)
