"""The Transformer language model, from `torch.nn.Parameter` up.

Read it from top to bottom: linear map, embedding, norm, positions, feed-forward, attention, block, model.
Names of classes, parameters and state-dict entries are those of the course's staff package, so that this
file can stand in for it. Weights are [out in]; a module's `forward` takes any number of leading dimensions
where its type says `...`.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cs336_basics.nn_utils import silu, softcap, softmax, squared_relu

#: Causal attention of [... heads seq d_head] queries, keys and values.
CausalAttention = Callable[[Tensor, Tensor, Tensor], Tensor]
Norm = Literal["pre", "post", "none"]
Position = Literal["rope", "none"]
FFN = Literal["swiglu", "silu", "relu2"]


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a `BasicsTransformerLM`. The defaults are the course's TinyStories model."""

    vocab_size: int = 10_000
    """Number of token ids."""
    context_length: int = 256
    """The most tokens the model sees at once."""
    d_model: int = 512
    """Width of the residual stream."""
    num_layers: int = 4
    """Number of Transformer blocks."""
    num_heads: int = 16
    """Attention heads per block; d_model / num_heads is the width of a head."""
    d_ff: int | None = None
    """Inner width of the feed-forward network. Default: 8/3 d_model rounded to a multiple of 64 for SwiGLU,
    4 d_model for the others, which have about as many parameters."""
    rope_theta: float = 10_000.0
    """Base of RoPE's wavelengths."""
    norm: Norm = "pre"
    """Ablation. RMSNorm before each sublayer, after each residual sum, or nowhere."""
    position: Position = "rope"
    """Ablation. Rotary position embedding, or none (NoPE)."""
    ffn: FFN = "swiglu"
    """Gated feed-forward network, or a plain one with SiLU or with the square of ReLU."""
    tie_embeddings: bool = False
    """The head's matrix is the embeddings' (Press & Wolf 2017)."""
    qk_norm: bool = False
    """RMSNorm of every head's queries and keys, before RoPE (Henry et al. 2020; Dehghani et al. 2023)."""
    logit_softcap: float | None = None
    """Bound of the logits, which are bent towards it by a tanh (Gemma Team 2024). Default: none."""
    value_embeddings: int = 0
    """In so many blocks, the last ones, a token adds to its values a vector of its own, from a table that begins at
    zero (Jordan et al. 2024, "modded-nanogpt"; the idea of Zhou et al. 2024, "Value residual learning")."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}")
        if self.position == "rope" and self.d_model // self.num_heads % 2:
            raise ValueError(f"RoPE rotates pairs, but a head has odd width {self.d_model // self.num_heads}")
        if not 0 <= self.value_embeddings <= self.num_layers:
            raise ValueError(f"value_embeddings is {self.value_embeddings}, but there are {self.num_layers} blocks")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise ValueError(f"logit_softcap is {self.logit_softcap}, but must be positive, or None for no bound")

    @property
    def ffn_width(self) -> int:
        """`d_ff`, or its default."""
        if self.d_ff is not None:
            return self.d_ff
        return max(64, round(8 / 3 * self.d_model / 64) * 64) if self.ffn == "swiglu" else 4 * self.d_model


class Linear(nn.Module):
    """y = W x, without bias."""

    def __init__(
        self, d_in: int, d_out: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        std = math.sqrt(2 / (d_in + d_out))  # Glorot & Bengio 2010
        weight = torch.empty(d_out, d_in, device=device, dtype=dtype)
        self.weight = nn.Parameter(nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std))

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        return x @ self.weight.T


class Embedding(nn.Module):
    """A row of `weight` for every token id."""

    def __init__(
        self, vocab_size: int, d_model: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        weight = torch.empty(vocab_size, d_model, device=device, dtype=dtype)
        self.weight = nn.Parameter(nn.init.trunc_normal_(weight, std=1.0, a=-3.0, b=3.0))

    def forward(self, token_ids: Int[Tensor, "..."]) -> Float[Tensor, "... d_model"]:
        return self.weight[token_ids]


class RMSNorm(nn.Module):
    """x / √(mean(x²) + eps) · weight (Zhang & Sennrich 2019), computed in float32."""

    def __init__(
        self, hidden_size: int, eps: float = 1e-5, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.eps = eps

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        wide = x if x.dtype == torch.float64 else x.float()
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normalized * self.weight).to(x.dtype)


class Identity(nn.Module):
    """Stands where an ablation takes a module away."""

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return x


class RotaryEmbedding(nn.Module):
    """RoPE (Su et al. 2021): turn the pair (2k, 2k+1) by the angle position / theta^(2k/dim).

    The query-key product then depends on the distance of two positions alone. The tables of cosines and
    sines are shared by all layers and are no part of the state dict.
    """

    def __init__(
        self, context_length: int, dim: int, theta: float = 10_000.0, device: torch.device | None = None
    ) -> None:
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
        """Positions broadcast against the leading dimensions of `x`."""
        cos, sin = self.cos[positions], self.sin[positions]
        even, odd = x[..., 0::2], x[..., 1::2]
        rotated = torch.stack((cos * even - sin * odd, sin * even + cos * odd), dim=-1)
        return rotated.flatten(-2).to(x.dtype)


class SwiGLU(nn.Module):
    """W2(SiLU(W1 x) ⊙ W3 x) (Shazeer 2020)."""

    def __init__(
        self, d_model: int, d_ff: int, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device, dtype)
        self.w2 = Linear(d_ff, d_model, device, dtype)
        self.w3 = Linear(d_model, d_ff, device, dtype)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.w2(silu(self.w1(x)) * self.w3(x))


class PlainFeedForward(nn.Module):
    """W2(f(W1 x)): no gate, and an activation f of one's choice."""

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: Callable[[Tensor], Tensor],
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.w1 = Linear(d_model, d_ff, device, dtype)
        self.w2 = Linear(d_ff, d_model, device, dtype)
        self.activation = activation

    def forward(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
        return self.w2(self.activation(self.w1(x)))


def feed_forward(
    kind: FFN, d_model: int, d_ff: int, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """A feed-forward network by its name."""
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


class LayerCache:
    """Keys and values that one attention layer has computed: slot t of a row holds its position t."""

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
        """Write new keys and values into the slots of their positions; return all slots."""
        slots = positions[:, None, :, None].expand_as(keys)
        self.keys.scatter_(2, slots, keys.to(self.keys.dtype))
        self.values.scatter_(2, slots, values.to(self.values.dtype))
        return self.keys, self.values


class CausalMultiHeadSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and what came before (Vaswani et al. 2017, 3.2.2).

    Args:
        d_model: width of input and output; the heads share it evenly.
        num_heads: number of heads, stacked along the rows of the projections.
        positional_encoder: turns queries and keys by their positions; None for no positions.
        causal_attention: computes the attention in training, FlashAttention say. Default: this module's
            `scaled_dot_product_attention`, looked up at every call so that it can be replaced.
        qk_norm: normalise the queries and keys of every head, with gains that heads share.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        positional_encoder: RotaryEmbedding | None = None,
        causal_attention: CausalAttention | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        *,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(d_model, d_model, device, dtype)
        self.k_proj = Linear(d_model, d_model, device, dtype)
        self.v_proj = Linear(d_model, d_model, device, dtype)
        self.output_proj = Linear(d_model, d_model, device, dtype)
        d_head = d_model // num_heads
        self.q_norm = RMSNorm(d_head, device=device, dtype=dtype) if qk_norm else Identity()
        self.k_norm = RMSNorm(d_head, device=device, dtype=dtype) if qk_norm else Identity()
        self.positional_encoder = positional_encoder
        self.causal_attention = causal_attention

    def forward(
        self,
        x: Float[Tensor, "... seq d_model"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: LayerCache | None = None,
        more_values: Float[Tensor, "... seq d_model"] | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        """Attend within `x`, or, with a cache ([batch seq d_model] input), to all positions up to one's own.

        `more_values` are added to the values that `x` is projected to.
        """
        if token_positions is None:
            token_positions = torch.arange(x.shape[-2], device=x.device)
        values = self.v_proj(x)
        if more_values is not None:
            values = values + more_values.to(values.dtype)
        q, k, v = (
            rearrange(projected, "... seq (heads d) -> ... heads seq d", heads=self.num_heads)
            for projected in (self.q_proj(x), self.k_proj(x), values)
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.positional_encoder is not None:
            positions_of_heads = token_positions.unsqueeze(-2)
            q = self.positional_encoder(q, positions_of_heads)
            k = self.positional_encoder(k, positions_of_heads)

        if cache is not None:
            k, v = cache.update(k, v, token_positions)
            slots = torch.arange(k.shape[-2], device=x.device)
            mask = slots <= token_positions[:, None, :, None]
            attended = scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), mask)
        elif self.causal_attention is not None:
            attended = self.causal_attention(q, k, v)
        else:
            mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).tril()
            attended = scaled_dot_product_attention(q, k, v, mask)
        return self.output_proj(rearrange(attended, "... heads seq d -> ... seq (heads d)"))


class TransformerBlock(nn.Module):
    """Attention, then feed-forward, each added to the residual stream.

    "pre" is x + f(RMSNorm(x)) (Xiong et al. 2020), "post" RMSNorm(x + f(x)) (Vaswani et al. 2017),
    "none" x + f(x).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        positional_encoder: RotaryEmbedding | None = None,
        *,
        norm: Norm = "pre",
        ffn: FFN = "swiglu",
        qk_norm: bool = False,
        causal_attention: CausalAttention | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.post_norm = norm == "post"
        self.ln1 = Identity() if norm == "none" else RMSNorm(d_model, device=device, dtype=dtype)
        self.attn = CausalMultiHeadSelfAttention(
            d_model, num_heads, positional_encoder, causal_attention, device, dtype, qk_norm=qk_norm
        )
        self.ln2 = Identity() if norm == "none" else RMSNorm(d_model, device=device, dtype=dtype)
        self.ffn = feed_forward(ffn, d_model, d_ff, device, dtype)

    def forward(
        self,
        x: Float[Tensor, "... seq d_model"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: LayerCache | None = None,
        more_values: Float[Tensor, "... seq d_model"] | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        if self.post_norm:
            x = self.ln1(x + self.attn(x, token_positions, cache, more_values))
            return self.ln2(x + self.ffn(x))
        x = x + self.attn(self.ln1(x), token_positions, cache, more_values)
        return x + self.ffn(self.ln2(x))


class BasicsTransformerLM(nn.Module):
    """A decoder-only Transformer: token embedding, blocks, final norm, and a linear map to logits.

    The final norm belongs to pre-norm alone: post-norm blocks end in a norm of their own.
    Arguments: see `ModelConfig`, and `causal_attention` of `CausalMultiHeadSelfAttention`.
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
        norm: Norm = "pre",
        position: Position = "rope",
        ffn: FFN = "swiglu",
        tie_embeddings: bool = False,
        qk_norm: bool = False,
        logit_softcap: float | None = None,
        value_embeddings: int = 0,
        causal_attention: CausalAttention | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = ModelConfig(
            vocab_size, context_length, d_model, num_layers, num_heads, d_ff, rope_theta, norm, position, ffn,
            tie_embeddings, qk_norm, logit_softcap, value_embeddings,
        )  # fmt: skip
        self.vocab_size, self.context_length = vocab_size, context_length
        self.token_embeddings = Embedding(vocab_size, d_model, device, dtype)
        rope = RotaryEmbedding(context_length, d_model // num_heads, rope_theta, device) if position == "rope" else None
        self.layers = nn.ModuleList(
            TransformerBlock(
                d_model, num_heads, self.config.ffn_width, rope,
                norm=norm, ffn=ffn, qk_norm=qk_norm,
                causal_attention=causal_attention, device=device, dtype=dtype,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        tables = [Embedding(vocab_size, d_model, device, dtype) for _ in range(value_embeddings)]
        for table in tables:
            table.weight.detach().zero_()
        self.value_embeddings = nn.ModuleList(tables)
        self.ln_final = RMSNorm(d_model, device=device, dtype=dtype) if norm == "pre" else Identity()
        self.lm_head = Linear(d_model, vocab_size, device, dtype)
        if tie_embeddings:  # and begin as the head does: of embeddings of variance 1 logits would be far too large
            self.token_embeddings.weight = self.lm_head.weight

    @classmethod
    def from_config(cls, config: ModelConfig, **kwargs: object) -> "BasicsTransformerLM":
        """Build the model that `config` describes; `kwargs` are `causal_attention`, `device` and `dtype`."""
        return cls(**asdict(config), **kwargs)  # type: ignore[arg-type]

    def forward(
        self,
        token_ids: Int[Tensor, "... seq"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "... seq vocab"]:
        """Logits of the next token at every position.

        Args:
            token_ids: at most `context_length` tokens a row.
            token_positions: default 0, 1, 2, ...; a cache needs them given, [batch seq].
            cache: from `new_cache`; holds what earlier calls computed, so that only new tokens are passed.

        Raises:
            ValueError: the rows are longer than `context_length`.
        """
        logits = self.lm_head(self.hidden(token_ids, token_positions, cache))
        return logits if self.config.logit_softcap is None else softcap(logits, self.config.logit_softcap)

    def hidden(
        self,
        token_ids: Int[Tensor, "... seq"],
        token_positions: Int[Tensor, "... seq"] | None = None,
        cache: list[LayerCache] | None = None,
    ) -> Float[Tensor, "... seq d_model"]:
        """What the head makes logits of: the model up to its final norm, with the arguments of `forward`.

        Who applies the head applies the soft cap, too.
        """
        if token_ids.shape[-1] > self.context_length:
            raise ValueError(f"{token_ids.shape[-1]} tokens do not fit into the context length {self.context_length}")
        x = self.token_embeddings(token_ids)
        first = len(self.layers) - len(self.value_embeddings)  # of the blocks with value embeddings
        for index, layer in enumerate(self.layers):
            more_values = self.value_embeddings[index - first](token_ids) if index >= first else None
            x = layer(x, token_positions, cache[index] if cache else None, more_values)
        return self.ln_final(x)

    def new_cache(self, batch: int) -> list[LayerCache]:
        """An empty key-value cache for `batch` rows."""
        weight, heads = self.lm_head.weight, self.config.num_heads
        d_head = self.config.d_model // heads
        return [LayerCache(batch, heads, self.context_length, d_head, weight.device, weight.dtype) for _ in self.layers]

    def get_num_params(self, non_embedding: bool = True) -> int:
        """The number of parameters, without the token embeddings by default."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.token_embeddings.weight.numel() if non_embedding else total
