"""Weights, gradients and optimizer state on each rank, and the bytes that a training step sends.

Source: Rajbhandari et al. 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models".
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from cs336_basics.accounting import parameter_counts
from cs336_basics.model import ModelConfig
from cs336_systems.theory.collectives import gather_bytes, ring_bytes
from cs336_systems.theory.units import BFLOAT16, FLOAT32

Stage = Literal[0, 1, 2, 3]
StatePrecision = Literal["float32", "mixed"]


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter of what persists from step to step, with AdamW."""

    weights: int
    gradients: int
    optimizer: int
    """State that only the optimizer's step needs."""

    def per_rank(self, world_size: int, stage: Stage) -> float:
        """Bytes per parameter on each rank. ZeRO stage 1 shards optimizer state, 2 also gradients, 3 also weights."""
        parts = (self.optimizer, self.gradients, self.weights)
        return sum(parts[:stage]) / world_size + sum(parts[stage:])


#: "float32" also describes training under autocast, which casts weights as they are used. "mixed" is ZeRO's section
#: 3.1: half precision for the passes; the master weights belong to the optimizer, as do its two moments.
STATE: dict[StatePrecision, StateBytes] = {
    "float32": StateBytes(FLOAT32, FLOAT32, 2 * FLOAT32),
    "mixed": StateBytes(BFLOAT16, BFLOAT16, FLOAT32 + 2 * FLOAT32),
}


def training_bytes_per_rank(
    num_parameters: int, world_size: int, stage: Stage, precision: StatePrecision = "float32"
) -> float:
    """Bytes of weights, gradients and AdamW's state on each rank, if shards are even; stage 0 is plain DDP."""
    return num_parameters * STATE[precision].per_rank(world_size, stage)


def step_traffic_bytes(num_parameters: int, world_size: int, bytes_per_number: int = FLOAT32) -> dict[str, float]:
    """Bytes that each rank sends per training step, by method, with gradients and weights sent in one dtype.

    DDP all-reduces gradients: 2 shares of (N - 1)/N S. Our sharded optimizer leaves that to DDP and then broadcasts
    what each rank has updated: 3 shares. ZeRO-1 and 2 reduce each gradient only to the rank that needs it
    (reduce-scatter), then all-gather the weights: 2. ZeRO-3, which is FSDP, gathers weights in both passes and
    reduce-scatters gradients: 3.
    """
    shares = {"DDP": 2, "sharded optimizer": 3, "ZeRO-1": 2, "ZeRO-2": 2, "ZeRO-3": 3}
    return {name: n * gather_bytes(num_parameters * bytes_per_number, world_size) for name, n in shares.items()}


def fsdp_units(config: ModelConfig) -> list[int]:
    """Weights of each Linear and Embedding in the order of the forward pass: the units that FSDP shards and gathers."""
    counts = parameter_counts(config)
    d, layers = config.d_model, config.num_layers
    matrix = d * config.ffn_width
    block = [d * d] * 4 + [matrix] * (counts["feed-forward"] // (layers * matrix))
    return [counts["token embeddings"], *block * layers, counts["language-model head"]]


@dataclass(frozen=True)
class FsdpCosts:
    """Bytes on each rank: sent in a training step, and held."""

    gather: float
    """Sent: weights, in each of the two passes."""
    reduce_scatter: float
    """Sent: gradients."""
    replicated: float
    """Sent: gradients of the norms, all-reduced in float32."""
    state: float
    """Held: weights, gradients and AdamW's moments in float32, of the shards and of the replicated norms."""
    gathered_peak: float
    """Held: the largest two neighboring units, gathered in the compute dtype."""

    @property
    def sent(self) -> float:
        return 2 * self.gather + self.reduce_scatter + self.replicated


def fsdp_costs(config: ModelConfig, world_size: int, compute_bytes: int) -> FsdpCosts:
    """Costs of FSDP if weights and gradients are sent in a compute dtype of `compute_bytes`.

    Weights are gathered once per pass. (The embedding's second gather could be saved: its gradient needs no weights.)
    One unit is prefetched, so that at most two are unsharded at a time.
    """
    units = fsdp_units(config)
    norms = parameter_counts(config)["norms"]
    share = gather_bytes(sum(units) * compute_bytes, world_size)
    return FsdpCosts(
        gather=share,
        reduce_scatter=share,
        replicated=ring_bytes(norms * FLOAT32, world_size),
        state=training_bytes_per_rank(sum(units), world_size, 3) + training_bytes_per_rank(norms, world_size, 0),
        gathered_peak=compute_bytes * max(map(sum, pairwise(units))),
    )
