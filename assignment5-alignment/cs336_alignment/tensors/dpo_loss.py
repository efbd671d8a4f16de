"""The loss of direct preference optimization (Rafailov et al. 2023), from log-probabilities of whole responses."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase

from cs336_alignment.prompts.templates import load_prompt
from cs336_alignment.tensors.log_probs import get_response_log_probs
from cs336_alignment.tensors.masked import masked_normalize
from cs336_alignment.tensors.tokenization import collate


def dpo_loss(
    policy_chosen: Float[Tensor, " pairs"],
    policy_rejected: Float[Tensor, " pairs"],
    ref_chosen: Float[Tensor, " pairs"],
    ref_rejected: Float[Tensor, " pairs"],
    beta: float,
) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
    """−log σ(reward of the chosen − reward of the rejected), where reward = β log(p / p_ref) (section 4, eq. 7).

    Args:
        policy_chosen, ...: summed log-probabilities of whole responses, or of prompts with responses: those of the
            prompt are the same on both sides and cancel.

    Returns:
        The loss of each pair, and the implicit rewards of its chosen and its rejected response, without gradient.
    """
    chosen = beta * (policy_chosen - ref_chosen)
    rejected = beta * (policy_rejected - ref_rejected)
    return -logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def compute_per_instance_dpo_loss(
    lm: nn.Module,
    lm_ref: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    beta: float,
    prompt: str,
    response_chosen: str,
    response_rejected: str,
) -> Float[Tensor, ""]:
    """Compute the DPO loss of one pair, in the Alpaca template.

    Args:
        lm_ref: the policy at the start. It receives no gradient, and may be on another device.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token.
    """
    sequences = [encode_document(tokenizer, prompt, response) for response in (response_chosen, response_rejected)]
    policy = sequence_log_probs(lm, sequences)
    with torch.no_grad():
        reference = sequence_log_probs(lm_ref, sequences).to(policy.device)
    loss, _, _ = dpo_loss(policy[:1], policy[1:], reference[:1], reference[1:], beta)
    return loss.squeeze(0)


def encode_document(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, template: str = "alpaca_sft"
) -> list[int]:
    """Tokenize a prompt and its response in a template, given by name or path, and append the end of sequence.

    Raises:
        ValueError: the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token; set tokenizer.eos_token")
    text = load_prompt(template).render(instruction=prompt, response=response)
    return [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]


def sequence_log_probs(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Float[Tensor, " sequences"]:
    """Compute log p of each whole sequence of token ids, given its first token."""
    device = next(model.parameters()).device
    first, rest = [ids[:1] for ids in sequences], [ids[1:] for ids in sequences]
    batch = collate(first, rest, pad_token_id=0, device=device)  # any token will do, because its predictions are masked
    log_probs = get_response_log_probs(model, batch["input_ids"], batch["labels"])["log_probs"]
    return masked_normalize(log_probs, batch["response_mask"], dim=-1)
