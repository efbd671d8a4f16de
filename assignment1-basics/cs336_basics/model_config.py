"""Options of a model: its shape, and how text is sampled from it. Importing them does not import PyTorch."""

from dataclasses import dataclass
from typing import Literal

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
    """Attention heads per block. A head is d_model / num_heads wide."""
    d_ff: int | None = None
    """Inner width of the feed-forward network. Default: 8/3 d_model rounded to a multiple of 64 for SwiGLU, and
    4 d_model for the others, which gives them about as many parameters."""
    rope_theta: float = 10_000.0
    """Base of RoPE's wavelengths."""
    norm: Norm = "pre"
    """Ablation: RMSNorm before each sublayer, after each residual sum, or nowhere."""
    position: Position = "rope"
    """Ablation: rotary position embedding, or none (NoPE)."""
    ffn: FFN = "swiglu"
    """Feed-forward network: the gated SwiGLU, or one without a gate whose activation is SiLU or squared ReLU."""
    tie_embeddings: bool = False
    """Use one matrix for the token embeddings and the output head (Press & Wolf 2017)."""
    qk_norm: bool = False
    """Apply RMSNorm to each head's queries and keys, before RoPE (Henry et al. 2020; Dehghani et al. 2023)."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "d_model", "num_layers", "num_heads", "d_ff"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} is not a multiple of num_heads {self.num_heads}")
        if self.position == "rope" and self.d_model // self.num_heads % 2:
            raise ValueError(f"RoPE rotates pairs, but a head has odd width {self.d_model // self.num_heads}")

    @property
    def ffn_width(self) -> int:
        """`d_ff`, or its default."""
        if self.d_ff is not None:
            return self.d_ff
        return max(64, round(8 / 3 * self.d_model / 64) * 64) if self.ffn == "swiglu" else 4 * self.d_model


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 256
    """The most tokens to generate for each prompt."""
    temperature: float = 1.0
    """Divides the logits: below 1 the choice is bolder, above 1 more varied; 0 always takes the most likely token."""
    top_k: int | None = None
    """Choose only among the k most likely tokens."""
    top_p: float | None = None
    """Choose only among the smallest set of most likely tokens whose probabilities sum to at least this (nucleus
    sampling)."""
    seed: int | None = 0
    """Seed of the random choices. None makes different choices every time."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, but must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, but must not be negative; 0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}, but must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, but must be above 0 and at most 1")
