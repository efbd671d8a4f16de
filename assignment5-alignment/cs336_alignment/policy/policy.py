"""The policy: the language model in training, and the log-probabilities it gives to responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.policy.config import Precision
from cs336_alignment.tensors.log_probs import get_response_log_probs
from cs336_alignment.tensors.tokenization import collate


@dataclass(frozen=True)
class TokenizedExample:
    """A prompt and a response to it, in token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    def as_json(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the two as text, in plain data for JSON."""
        return {"prompt": tokenizer.decode(list(self.prompt)), "response": tokenizer.decode(list(self.response))}


@dataclass(frozen=True)
class ResponseLogProbs:
    """Log-probabilities of a batch of responses, token by token."""

    log_probs: Float[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    """True on the tokens of responses."""
    token_entropy: Float[Tensor, "batch seq"] | None = None
    """In nats, without gradient."""


@dataclass(frozen=True)
class Policy:
    """A causal language model (from transformers) with its tokenizer.

    Args:
        precision: bfloat16 computes under autocast; the type of the weights does not change.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    precision: Precision = "float32"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context_length(self) -> int:
        """Maximum number of tokens of a prompt and its response together."""
        return self.model.config.max_position_embeddings

    def tokenize(self, prompt: str, response: str) -> TokenizedExample:
        """Tokenize prompt and response separately, as `tokenize_prompt_and_output` does."""
        return TokenizedExample(*(tuple(self.tokenizer(text)["input_ids"]) for text in (prompt, response)))

    def response_log_probs(
        self, examples: Sequence[TokenizedExample], temperature: float = 1.0, return_token_entropy: bool = False
    ) -> ResponseLogProbs:
        """Compute the log-probability of each token of the responses, in one forward pass.

        Args:
            temperature: of the distribution that the responses were sampled from.
        """
        prompts, responses = [each.prompt for each in examples], [each.response for each in examples]
        batch = collate(prompts, responses, self.tokenizer.pad_token_id, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            result = get_response_log_probs(
                self.model, batch["input_ids"], batch["labels"], return_token_entropy, temperature=temperature
            )
        return ResponseLogProbs(result["log_probs"], batch["response_mask"], result.get("token_entropy"))

    @torch.no_grad()
    def log_probs_no_grad(
        self, examples: Sequence[TokenizedExample], microbatches: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[Float[Tensor, " response"]]:
        """Compute the log-probabilities of each response as constants, for the old or the reference policy.

        Args:
            microbatches: indices into `examples`, each of which occurs once.
        """
        result: dict[int, Tensor] = {}
        training = self.model.training
        self.model.eval()
        for indices in microbatches:
            batch = self.response_log_probs([examples[index] for index in indices], temperature)
            for index, log_probs, mask in zip(indices, batch.log_probs, batch.mask):
                result[index] = log_probs[mask]
        self.model.train(training)
        return [result[index] for index in range(len(examples))]

    @torch.no_grad()
    def mean_entropy(self, example: TokenizedExample) -> float:
        """Compute the mean entropy, in nats, of the predictions of a response that is not empty."""
        batch = self.response_log_probs([example], return_token_entropy=True)
        assert batch.token_entropy is not None
        return batch.token_entropy[batch.mask].mean().item()


def scatter_to_mask(values: Sequence[Tensor], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Write the values of each response, [response], to the positions of its tokens in the mask, and 0 elsewhere."""
    scattered = torch.zeros(mask.shape, device=mask.device)
    scattered[mask] = torch.cat([value.to(scattered) for value in values])
    return scattered
