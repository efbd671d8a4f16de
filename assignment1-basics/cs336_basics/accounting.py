"""Calculate what a model costs from its configuration: parameters, floating-point operations and memory.

A matrix multiplication (matmul) of [m k] and [k n] takes 2 m k n operations: one multiplication and one addition per
term. FLOPs count only matmuls, because everything else is less than one percent of a Transformer's operations.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cs336_basics.model_config import ModelConfig

if TYPE_CHECKING:
    from rich.table import Table

#: Operations of AdamW per parameter and step: m takes 3 and v takes 4; the square root, + ε, m / (...), · α and
#: θ - ... take 5, and the decay θ - α λ θ takes 2.
ADAMW_FLOPS_PER_PARAMETER = 14

#: Peak rate of dense matmuls in FLOP/s, from the makers' data sheets: part of a device's name -> (bfloat16, TF32).
PEAK_FLOPS = {
    "H200": (989e12, 495e12),
    "H100 PCIe": (756e12, 378e12),
    "H100": (989e12, 495e12),
    "A100": (312e12, 156e12),
    "L40S": (362e12, 183e12),
    "RTX 4090": (165e12, 83e12),
}


@dataclass(frozen=True)
class MatMul:
    """A matmul [rows inner] · [inner columns], done `times` times in a forward pass."""

    name: str
    rows: int
    inner: int
    columns: int
    times: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inner * self.columns * self.times


@dataclass(frozen=True)
class Memory:
    """Memory in bytes at the peak of a training step."""

    parameters: int
    gradients: int
    optimizer_state: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer_state + self.activations


def parameter_counts(config: ModelConfig) -> dict[str, int]:
    """Count the trainable parameters by component; the values sum to the model's total."""
    d, layers = config.d_model, config.num_layers
    qk_norms = 2 * d // config.num_heads if config.qk_norm else 0
    block_norms = 0 if config.norm == "none" else 2 * d
    return {
        "token embeddings": config.vocab_size * d,
        "attention": layers * 4 * d * d,
        "feed-forward": layers * _ffn_matrices(config) * d * config.ffn_width,
        "norms": layers * (block_norms + qk_norms) + (d if config.norm == "pre" else 0),
        "language-model head": 0 if config.tie_embeddings else d * config.vocab_size,
    }


def matmuls(config: ModelConfig, batch_size: int = 1, sequence_length: int | None = None) -> list[MatMul]:
    """List the matmuls of a forward pass.

    Attention is counted over all pairs of positions, which is what it computes without a kernel that skips the masked
    half.
    """
    seq = sequence_length or config.context_length
    tokens, d, layers, heads = batch_size * seq, config.d_model, config.num_layers, config.num_heads
    d_head, d_ff = d // heads, config.ffn_width
    up = _ffn_matrices(config) - 1
    return [
        MatMul("query, key and value projections", tokens, d, d, 3 * layers),
        MatMul("scores Q Kᵀ", seq, d_head, seq, batch_size * heads * layers),
        MatMul("weighted values", seq, seq, d_head, batch_size * heads * layers),
        MatMul("output projection", tokens, d, d, layers),
        MatMul("feed-forward W1, W3" if up == 2 else "feed-forward W1", tokens, d, d_ff, up * layers),
        MatMul("feed-forward W2", tokens, d_ff, d, layers),
        MatMul("language-model head", tokens, d, config.vocab_size, 1),
    ]


def forward_flops(config: ModelConfig, batch_size: int = 1, sequence_length: int | None = None) -> int:
    """Count the floating-point operations of a forward pass."""
    return sum(matmul.flops for matmul in matmuls(config, batch_size, sequence_length))


def training_flops(config: ModelConfig, batch_size: int = 1, sequence_length: int | None = None) -> int:
    """Count the operations of a forward and a backward pass, which takes twice as many as the forward pass.

    Every matmul Y = X W leads to two in the backward pass, for the gradients of X and W (Kaplan et al. 2020, 2.1).
    """
    return 3 * forward_flops(config, batch_size, sequence_length)


def activation_counts(config: ModelConfig, batch_size: int = 1, sequence_length: int | None = None) -> dict[str, int]:
    """Count the numbers that a forward pass keeps for the backward pass, if each operation keeps its output.

    The operations are those that the course counts (adamwAccounting): both norms, projections, scores, softmax,
    weighted values, output projection and feed-forward network of every block; the final norm, the logits and the
    cross-entropy.
    """
    seq = sequence_length or config.context_length
    d, layers = config.d_model, config.num_layers
    stream = batch_size * seq * d
    inner = batch_size * seq * config.ffn_width
    logits = batch_size * seq * config.vocab_size
    inner_outputs = 4 if config.ffn == "swiglu" else 2  # W1 x, SiLU, and W3 x and the product
    return {
        "norms": 0 if config.norm == "none" else layers * 2 * stream + (stream if config.norm == "pre" else 0),
        "attention projections": layers * (3 + 1) * stream,
        "scores and softmax": layers * 2 * batch_size * config.num_heads * seq * seq,
        "weighted values": layers * stream,
        "feed-forward": layers * (inner_outputs * inner + stream),
        "logits and cross-entropy": 2 * logits,
    }


def training_memory(
    config: ModelConfig, batch_size: int = 1, sequence_length: int | None = None, bytes_per_number: int = 4
) -> Memory:
    """Calculate the peak memory of a training step with AdamW if all numbers have the same size."""
    parameters = bytes_per_number * sum(parameter_counts(config).values())
    activations = bytes_per_number * sum(activation_counts(config, batch_size, sequence_length).values())
    return Memory(parameters, gradients=parameters, optimizer_state=2 * parameters, activations=activations)


def max_batch_size(
    config: ModelConfig, memory_bytes: float, sequence_length: int | None = None, bytes_per_number: int = 4
) -> int:
    """Return the largest batch size whose `training_memory` fits; 0 if not even one sequence fits."""
    one = training_memory(config, 1, sequence_length, bytes_per_number)
    return max(0, int((memory_bytes - (one.total - one.activations)) // one.activations))


def adamw_step_flops(config: ModelConfig) -> int:
    """Count the operations of one AdamW step; see `ADAMW_FLOPS_PER_PARAMETER`."""
    return ADAMW_FLOPS_PER_PARAMETER * sum(parameter_counts(config).values())


def training_days(
    config: ModelConfig, batch_size: int, steps: int, flops_per_second: float, utilization: float = 0.5
) -> float:
    """Return the days that training takes on hardware of a peak rate, of which the share `utilization` is reached."""
    total = steps * (training_flops(config, batch_size) + adamw_step_flops(config))
    return total / (flops_per_second * utilization) / 86_400


def peak_flops(device_name: str, precision: Literal["float32", "bfloat16"]) -> float | None:
    """Return the peak rate that a training run on this device is compared with; None if the device is not known.

    For float32 it is the rate of TF32, which `train` uses on GPUs.
    """
    for part, (bfloat16, tf32) in PEAK_FLOPS.items():
        if all(word in device_name for word in part.split()):
            return bfloat16 if precision == "bfloat16" else tf32
    return None


def model_flops_utilization(
    config: ModelConfig, tokens_per_second: float, peak: float, sequence_length: int | None = None
) -> float:
    """Return the share of the peak rate that goes into the model's matmuls (MFU; Chowdhery et al. 2022, appendix B).

    Attention counts over all pairs of positions; recomputed activations do not count.
    """
    seq = sequence_length or config.context_length
    return tokens_per_second * training_flops(config, sequence_length=seq) / seq / peak


def print_tables(name: str, config: ModelConfig, batch_size: int, memory_gb: float, bytes_per_number: int) -> None:
    """Print the parameters, the matmuls of a forward pass, and the memory of a training step as tables.

    Args:
        name: what the tables call the model.
        config: the model.
        batch_size: sequences per step.
        memory_gb: memory of a GPU, in GB (10^9 bytes), for which the largest batch is printed.
        bytes_per_number: 4 for float32, 2 for bfloat16.
    """
    from rich.console import Console

    counts = parameter_counts(config)
    parameters = _table(f"{name}: parameters", "component", "parameters", "share")
    for component, count in counts.items():
        parameters.add_row(component, f"{count:,}", f"{count / sum(counts.values()):.1%}")
    parameters.add_section()
    parameters.add_row("total", f"{sum(counts.values()):,}", "")

    total = forward_flops(config, batch_size)
    title = f"matmuls of a forward pass, {batch_size} x {config.context_length} tokens"
    forward = _table(title, "matmul", "shape", "times", "FLOPs", "share")
    for matmul in matmuls(config, batch_size):
        shape = rf"\[{matmul.rows} x {matmul.inner}] \[{matmul.inner} x {matmul.columns}]"
        forward.add_row(matmul.name, shape, f"{matmul.times:,}", f"{matmul.flops:.4g}", f"{matmul.flops / total:.1%}")
    forward.add_section()
    forward.add_row("total", "", "", f"{total:.4g}", "")

    memory = training_memory(config, batch_size, bytes_per_number=bytes_per_number)
    step = _table(f"a training step with AdamW, {bytes_per_number} bytes per number", "memory", "GB")
    for part in ("parameters", "gradients", "optimizer_state", "activations", "total"):
        step.add_row(part.replace("_", " "), f"{getattr(memory, part) / 1e9:.2f}")

    console = Console()
    for table in (parameters, forward, step):
        console.print(table)
    largest = max_batch_size(config, memory_gb * 1e9, bytes_per_number=bytes_per_number)
    console.print(f"largest batch in {memory_gb:g} GB: {largest}")
    console.print(f"one AdamW step: {adamw_step_flops(config):.4g} FLOPs")


def _table(title: str, first: str, *numbers: str) -> "Table":
    """Make a table whose columns after the first are right-aligned."""
    from rich.table import Table

    table = Table(first, title=title, title_justify="left")
    for column in numbers:
        table.add_column(column, justify="right")
    return table


def _ffn_matrices(config: ModelConfig) -> int:
    return 3 if config.ffn == "swiglu" else 2
