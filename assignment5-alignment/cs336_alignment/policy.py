"""A policy: the language model that is trained, with what it takes to ask it for log-probabilities of responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.log_probs import get_response_log_probs
from cs336_alignment.tokenization import collate

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class TokenRow:
    """A prompt and a response to it, in token ids."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True)
class ResponseLogProbs:
    """What a policy says of a batch of rows, token by token."""

    log_probs: Float[Tensor, "batch seq"]
    mask: Bool[Tensor, "batch seq"]
    """True on the tokens of responses."""
    token_entropy: Float[Tensor, "batch seq"] | None = None
    """In nats, without gradient."""


@dataclass(frozen=True)
class Policy:
    """A causal language model of transformers with its tokenizer.

    Args:
        precision: bfloat16 computes under autocast; the weights stay what they are.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    precision: Precision = "float32"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context_length(self) -> int:
        """The most tokens of a row."""
        return self.model.config.max_position_embeddings

    def tokenize(self, prompt: str, response: str) -> TokenRow:
        """Prompt and response by themselves, as `tokenize_prompt_and_output` does."""
        return TokenRow(*(tuple(self.tokenizer(text)["input_ids"]) for text in (prompt, response)))

    def response_log_probs(
        self, rows: Sequence[TokenRow], temperature: float = 1.0, return_token_entropy: bool = False
    ) -> ResponseLogProbs:
        """The log-probability of each token of the responses, in one forward pass.

        Args:
            temperature: that of the distribution which the responses were drawn from.
        """
        pad = self.tokenizer.pad_token_id
        batch = collate([row.prompt for row in rows], [row.response for row in rows], pad, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            result = get_response_log_probs(
                self.model, batch["input_ids"], batch["labels"], return_token_entropy, temperature=temperature
            )
        return ResponseLogProbs(result["log_probs"], batch["response_mask"], result.get("token_entropy"))

    @torch.no_grad()
    def frozen_log_probs(
        self, rows: Sequence[TokenRow], microbatches: Sequence[Sequence[int]], temperature: float = 1.0
    ) -> list[Float[Tensor, " response"]]:
        """The same without gradients, row by row: for policies of before (old, reference).

        Args:
            microbatches: indices into `rows`, each once.
        """
        result: dict[int, Tensor] = {}
        training = self.model.training
        self.model.eval()
        for indices in microbatches:
            batch = self.response_log_probs([rows[index] for index in indices], temperature)
            for index, log_probs, mask in zip(indices, batch.log_probs, batch.mask):
                result[index] = log_probs[mask]
        self.model.train(training)
        return [result[index] for index in range(len(rows))]

    @torch.no_grad()
    def mean_entropy(self, row: TokenRow) -> float:
        """The mean entropy of the predictions of the response's tokens, in nats; it must have one."""
        batch = self.response_log_probs([row], return_token_entropy=True)
        assert batch.token_entropy is not None
        return batch.token_entropy[batch.mask].mean().item()


def on_mask(values: Sequence[Tensor], mask: Bool[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Lay values of responses, a tensor [response] for each row, where the mask has these tokens; 0 elsewhere."""
    laid = torch.zeros(mask.shape, device=mask.device)
    laid[mask] = torch.cat([value.to(laid) for value in values])
    return laid
