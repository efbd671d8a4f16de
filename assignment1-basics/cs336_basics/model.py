"""The Transformer language model, built from `torch.nn.Parameter` up.

Read it from top to bottom: linear map, embedding, norm, positions, feed-forward network, attention, block, model.
The names of classes, parameters and state-dict entries are those of the course's staff package, so this file can
replace it. The shape of a model is a `ModelConfig`; a weight is [out in].

Shapes in the comments and types, checked by the tests:

    batch          B   sequences in a batch; `...` stands for any number of leading dimensions
    seq            T   tokens in a sequence; queries and keys in attention
    d_model        D   width of the residual stream
    heads          H   attention heads
    d_head             D / H, width of a head; d_k for queries and keys, d_v for values
    d_ff           F   inner width of the feed-forward network
    vocab          V   token ids
    slots              positions in a KV cache
"""

import math
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cs336_basics.model_config import FFN, ModelConfig
from cs336_basics.nn_utils import silu, softmax, squared_relu

Device = torch.device | None
Dtype = torch.dtype | None
#: Causal attention of [... heads seq d_head] queries, keys and values.
CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
#: The fields of `ModelConfig` that are arguments of the staff's model, in their order.
_SHAPE_FIELDS = [item.name for item in fields(ModelConfig)[:7]]


class Linear(nn.Module):
    """y = W x, without a bias."""

    def __init__(self, d_in: int, d_out: int, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        std = math.sqrt(2 / (d_in + d_out))  # Glorot & Bengio 2010
        weight = torch.empty(d_out, d_in, device=device, dtype=dtype)
        self.weight = nn.Parameter(nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std))

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return x @ self.weight.T


class Embedding(nn.Module):
    """Look up the row of `weight` that belongs to each token id."""

    def __init__(self, vocab_size: int, d_model: int, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, d_model, device=device, dtype=dtype)
        self.weight = nn.Parameter(nn.init.trunc_normal_(weight, std=1.0, a=-3.0, b=3.0))

    def forward(self, token_ids: Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        return self.weight[token_ids]


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight (Zhang & Sennrich 2019), computed in float32."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        wide = x if x.dtype == torch.float64 else x.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normalized * self.weight).to(x.dtype)


class Identity(nn.Module):
    """Return the input unchanged; takes the place of a module that an ablation removes."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return x


class RotaryEmbedding(nn.Module):
    """RoPE (Su et al. 2021): rotate the pair (2k, 2k+1) by the angle position / theta^(2k/dim).

    The dot product of a query and a key then depends only on the distance between their positions. All layers share
    the tables of cosines and sines, which are not in the state dict.
    """

    def __init__(self, context_length: int, dim: int, theta: float = 10_000.0, device: Device = None) -> None:
        super().__init__()
        frequencies = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles = torch.outer(torch.arange(context_length, dtype=torch.float64), frequencies)
        self.cos: Tensor
        self.sin: Tensor
        self.register_buffer("cos", angles.cos().float().to(device), persistent=False)
        self.register_buffer("sin", angles.sin().float().to(device), persistent=False)

    def forward(
        self, x: Float[Tensor, "... seq dim"], positions: Int[Tensor, "... seq"]
    ) -> Float[Tensor, "... seq dim"]:
        """Rotate `x`. The positions broadcast against its leading dimensions."""
        cos, sin = self.cos[positions], self.sin[positions]
        even, odd = x[..., 0::2], x[..., 1::2]
        rotated = torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1)
        return rotated.flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    """W2(SiLU(W1 x) ⊙ W3 x) (Shazeer 2020)."""

    def __init__(self, d_model: int, d_ff: int, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device, dtype)
        self.w2 = Linear(d_ff, d_model, device, dtype)
        self.w3 = Linear(d_model, d_ff, device, dtype)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class PlainFeedForward(nn.Module):
    """W2(f(W1 x)): a network without a gate, with activation f."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Callable[[Tensor], Tensor],
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device, dtype)
        self.w2 = Linear(d_ff, d_model, device, dtype)
        self.activation = activation

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.w2(self.activation(self.w1(x)))


def feed_forward(kind: FFN, d_model: int, d_ff: int, device: Device = None, dtype: Dtype = None) -> nn.Module:
    """Build a feed-forward network by its name."""
    if kind == "swiglu":
        return SwiGLU(d_model, d_ff, device, dtype)
    return PlainFeedForward(d_model, d_ff, silu if kind == "silu" else squared_relu, device, dtype)


def scaled_dot_product_attention(
    Q: Float[Tensor, "... queries d_k"],
    K: Float[Tensor, "... keys d_k"],
    V: Float[Tensor, "... keys d_v"],
    mask: Bool[Tensor, "... queries keys"] | None = None,
) -> Float[Tensor, "... queries d_v"]:
    """softmax(Q Kᵀ / √d_k) V (Vaswani et al. 2017, section 3.2.1). A query attends where `mask` is True."""
    scores = Q @ K.transpose(-2, -1) / math.sqrt(Q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return softmax(scores, dim=-1) @ V


class KVCache:
    """The keys and values that one attention layer has computed: slot t of a sequence holds its position t."""

    def __init__(
        self, batch: int, heads: int, slots: int, d_head: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.keys = torch.zeros(batch, heads, slots, d_head, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)

    def update(
        self,
        keys: Float[Tensor, "batch heads seq d_head"],
        values: Float[Tensor, "batch heads seq d_head"],
        positions: Int[Tensor, "batch seq"],
    ) -> tuple[Float[Tensor, "batch heads slots d_head"], Float[Tensor, "batch heads slots d_head"]]:
        """Write new keys and values into the slots of their positions, and return all slots."""
        slots = positions[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, slots, keys.to(self.keys.dtype))
        self.values.scatter_(2, slots, values.to(self.values.dtype))
        return self.keys, self.values


class CausalMultiHeadSelfAttention(nn.Module):
    """Multi-head self-attention in which a token attends to itself and to earlier tokens (Vaswani et al. 2017, 3.2.2).

    Args:
        d_model: width of input and output, which the heads share evenly.
        num_heads: number of heads, stacked along the rows of the projections.
        positional_encoder: rotates queries and keys by their positions. Default: no positions.
        causal_attention: computes the attention in training, for example with FlashAttention. Default: this module's
            `scaled_dot_product_attention`, looked up at every call so that it can be replaced.
        config: says whether queries and keys are normalized (QK-norm), with gains that all heads share.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        positional_encoder: RotaryEmbedding | None = None,
        causal_attention: CausalAttention | None = None,
        device: Device = None,
        dtype: Dtype = None,
        *,
        config: ModelConfig | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(d_model, d_model, device, dtype)
        self.k_proj = Linear(d_model, d_model, device, dtype)
        self.v_proj = Linear(d_model, d_model, device, dtype)
        self.output_proj = Linear(d_model, d_model, device, dtype)
        d_head, qk_norm = d_model // num_heads, config is not None and config.qk_norm
        self.q_norm = RMSNorm(d_head, device=device, dtype=dtype) if qk_norm else Identity()
        self.k_norm = RMSNorm(d_head, device=device, dtype=dtype) if qk_norm else Identity()
        self.positional_encoder = positional_encoder
        self.causal_attention = causal_attention

    def forward(
        self,
        x: Float[Tensor, "... seq d_model"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        """Attend within `x` or, with a cache ([batch seq d_model] input), to all positions up to each token's own."""
        values = self.v_proj(x)  # first: the order of these calls is the order of the sums in the backward pass
        return self.attend(self.q_proj(x), self.k_proj(x), values, token_positions, cache)

    def attend(
        self,
        queries: Float[Tensor, "... seq d_model"],
        keys: Float[Tensor, "... seq d_model"],
        values: Float[Tensor, "... seq d_model"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        """Compute the output of `forward` from the projections of its input."""
        seq, device = queries.shape[-2], queries.device
        if token_positions is None:
            token_positions = torch.arange(seq, device=device)
        q, k, v = (
            rearrange(projected, "... seq (heads d) -> ... heads seq d", heads=self.num_heads)
            for projected in (queries, keys, values)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.positional_encoder is not None:
            positions = token_positions.unsqueeze(-2)  # the same for every head
            q, k = self.positional_encoder(q, positions), self.positional_encoder(k, positions)

        if cache is not None:
            k, v = cache.update(k, v, token_positions)
            mask = torch.arange(k.shape[-2], device=device) <= token_positions[:, None, :, None]
            attended = scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), mask)
        elif self.causal_attention is not None:
            attended = self.causal_attention(q, k, v)
        else:
            mask = torch.ones(seq, seq, dtype=torch.bool, device=device).tril()
            attended = scaled_dot_product_attention(q, k, v, mask)
        return self.output_proj(rearrange(attended, "... heads seq d -> ... seq (heads d)"))


class TransformerBlock(nn.Module):
    """Attention, then a feed-forward network, each added to the residual stream.

    `config` says where the norms are: "pre" is x + f(RMSNorm(x)) (Xiong et al. 2020), "post" is RMSNorm(x + f(x))
    (Vaswani et al. 2017), "none" is x + f(x). It also names the feed-forward network; its shape fields are not used.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        positional_encoder: RotaryEmbedding | None = None,
        *,
        config: ModelConfig | None = None,
        causal_attention: CausalAttention | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        config = config or ModelConfig()
        self.post_norm = config.norm == "post"
        self.ln1 = Identity() if config.norm == "none" else RMSNorm(d_model, device=device, dtype=dtype)
        self.attn = CausalMultiHeadSelfAttention(
            d_model, num_heads, positional_encoder, causal_attention, device, dtype, config=config
        )
        self.ln2 = Identity() if config.norm == "none" else RMSNorm(d_model, device=device, dtype=dtype)
        self.ffn = feed_forward(config.ffn, d_model, d_ff, device, dtype)

    def forward(
        self,
        x: Float[Tensor, "... seq d_model"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: KVCache | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        if self.post_norm:
            x = self.ln1(x + self.attn(x, token_positions, cache))
            return self.ln2(x + self.ffn(x))
        x = x + self.attn(self.ln1(x), token_positions, cache)
        return x + self.ffn(self.ln2(x))


class BasicsTransformerLM(nn.Module):
    """A decoder-only Transformer: token embedding, blocks, final norm, and a linear map to logits.

    Only pre-norm models have a final norm; post-norm blocks end with a norm of their own.

    Args:
        vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta: see `ModelConfig`.
        config: everything else about the model; the first seven arguments take precedence over its fields.
        causal_attention: see `CausalMultiHeadSelfAttention`.
    """

    def __init__(
        self,
        vocab_size: int,
        context_length: int,
        d_model: int,
        num_layers: int,
        num_heads: int,
        d_ff: int | None = None,
        rope_theta: float = 10_000.0,
        *,
        config: ModelConfig | None = None,
        causal_attention: CausalAttention | None = None,
        device: Device = None,
        dtype: Dtype = None,
    ) -> None:
        super().__init__()
        shape: Any = zip(_SHAPE_FIELDS, (vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta))
        self.config = config = replace(config or ModelConfig(), **dict(shape))
        self.vocab_size, self.context_length = vocab_size, context_length
        self.token_embeddings = Embedding(vocab_size, d_model, device, dtype)
        self.layers = self._build_layers(causal_attention, device, dtype)
        self.ln_final = RMSNorm(d_model, device=device, dtype=dtype) if config.norm == "pre" else Identity()
        self.lm_head = Linear(d_model, vocab_size, device, dtype)
        if config.tie_embeddings:  # start with the head's values: embeddings of variance 1 would make logits too large
            self.token_embeddings.weight = self.lm_head.weight

    def _build_layers(self, causal_attention: CausalAttention | None, device: Device, dtype: Dtype) -> nn.ModuleList:
        config, rope = self.config, None
        if config.position == "rope":
            rope = RotaryEmbedding(config.context_length, config.d_model // config.num_heads, config.rope_theta, device)
        shared: Any = {"config": config, "causal_attention": causal_attention, "device": device, "dtype": dtype}
        return nn.ModuleList(
            TransformerBlock(config.d_model, config.num_heads, config.ffn_width, rope, **shared)
            for _ in range(config.num_layers)
        )

    @classmethod
    def from_config(cls, config: ModelConfig, **kwargs: object) -> "BasicsTransformerLM":
        """Build the model that `config` describes; `kwargs` are `causal_attention`, `device` and `dtype`."""
        return cls(*[getattr(config, name) for name in _SHAPE_FIELDS], config=config, **kwargs)  # type: ignore[arg-type]

    def forward(
        self,
        token_ids: Int[Tensor, "... seq"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "... seq vocab"]:
        """Return the logits of the next token at every position.

        Args:
            token_ids: at most `context_length` tokens per sequence.
            token_positions: default 0, 1, 2, ...; required with a cache, as [batch seq].
            cache: made by `new_cache`; holds what earlier calls computed, so that only new tokens need to be passed.

        Raises:
            ValueError: the sequences are longer than `context_length`.
        """
        return self.lm_head(self.hidden_states(token_ids, token_positions, cache))

    def hidden_states(
        self,
        token_ids: Int[Tensor, "... seq"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: list[KVCache] | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        """Return the hidden states after the final norm, before the output head; see `forward` for the arguments."""
        if token_ids.shape[-1] > self.context_length:
            raise ValueError(f"{token_ids.shape[-1]} tokens do not fit into the context length {self.context_length}")
        x = self.token_embeddings(token_ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, token_positions, cache[index] if cache else None)
        return self.ln_final(x)

    def new_cache(self, batch: int) -> list[KVCache]:
        """Return an empty KV cache for `batch` sequences, one part per block."""
        weight, heads = self.lm_head.weight, self.config.num_heads
        d_head = self.config.d_model // heads
        return [KVCache(batch, heads, self.context_length, d_head, weight.device, weight.dtype) for _ in self.layers]

    def get_num_params(self, non_embedding: bool = True) -> int:
        """Return the number of parameters, by default without the token embeddings."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.token_embeddings.weight.numel() if non_embedding else total
