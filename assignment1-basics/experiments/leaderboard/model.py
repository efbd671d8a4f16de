"""The model and the training of `experiments.leaderboard.config`: options that the ladder tried and dropped."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from cs336_basics import training
from cs336_basics.model import BasicsTransformerLM, CausalAttention, Embedding, KVCache, TransformerBlock
from experiments.leaderboard.config import LeaderboardConfig, LeaderboardModelConfig


def train(config: LeaderboardConfig, causal_attention: CausalAttention | None = None) -> dict[str, float]:
    """Train the leaderboard's model on batches that may grow; see `cs336_basics.training.train`."""
    if config.compile:
        _allow_shapes(config)
    return training.train(
        config, causal_attention=causal_attention, model_class=LeaderboardLM, batch_shape=config.batch_shape
    )


class LeaderboardLM(BasicsTransformerLM):
    """A `BasicsTransformerLM` with a soft cap on its logits and value embeddings in its last blocks."""

    config: LeaderboardModelConfig

    def _build_layers(
        self, causal_attention: CausalAttention | None, device: torch.device | None, dtype: torch.dtype | None
    ) -> nn.ModuleList:
        """Build the blocks, then the tables: between blocks and head in the random numbers and in the state dict."""
        self.layers = super()._build_layers(causal_attention, device, dtype)
        config = self.config
        tables = [Embedding(config.vocab_size, config.d_model, device, dtype) for _ in range(config.value_embeddings)]
        for table in tables:
            table.weight.detach().zero_()
        self.value_embeddings = nn.ModuleList(tables)
        return self.layers

    def forward(
        self,
        token_ids: Int[Tensor, "... seq"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "... seq vocab"]:
        """Return the logits, with the soft cap; the hidden states come before it."""
        logits, cap = super().forward(token_ids, token_positions, cache), self.config.logit_softcap
        return logits if cap is None else softcap(logits, cap)

    def hidden_states(
        self,
        token_ids: Int[Tensor, "... seq"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        """Return the hidden states after the final norm; see `BasicsTransformerLM.forward` for the arguments."""
        if token_ids.shape[-1] > self.context_length:
            raise ValueError(f"{token_ids.shape[-1]} tokens do not fit into the context length {self.context_length}")
        x = self.token_embeddings(token_ids)
        first = len(self.layers) - len(self.value_embeddings)  # of the blocks with value embeddings
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, TransformerBlock)
            value_embedding = self.value_embeddings[index - first](token_ids) if index >= first else None
            x = _block(layer, x, value_embedding, token_positions, cache[index] if cache else None)
        return self.ln_final(x)


def _block(
    block: TransformerBlock,
    x: Float[Tensor, "... seq d_model"],
    value_embedding: Float[Tensor, "... seq d_model"] | None,
    token_positions: Int[Tensor, "... seq"] | None,
    cache: KVCache | None,
) -> Float[Tensor, "... seq d_model"]:
    """Apply a block, in which each token adds its value embedding to its values."""
    if value_embedding is None:
        return block(x, token_positions, cache)
    attention, inner = block.attn, x if block.post_norm else block.ln1(x)
    values = attention.v_proj(inner)
    values = values + value_embedding.to(values.dtype)
    attended = attention.attend(attention.q_proj(inner), attention.k_proj(inner), values, token_positions, cache)
    if block.post_norm:
        x = block.ln1(x + attended)
        return block.ln2(x + block.ffn(x))
    x = x + attended
    return x + block.ffn(block.ln2(x))


def softcap(x: Float[Tensor, "..."], cap: float) -> Float[Tensor, "..."]:
    """Return cap · tanh(x / cap): close to x where |x| is small, and never beyond the cap (Gemma Team 2024)."""
    return cap * torch.tanh(x / cap)


def _allow_shapes(config: LeaderboardConfig) -> None:
    """Raise torch.compile's limit, beyond which it runs code uncompiled, to the number of shapes of a growing batch."""
    import torch._dynamo

    shapes = len({config.batch_shape(step) for step in range(1, config.steps + 1)})
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * (shapes + 1))  # with and without gradients, and a margin
