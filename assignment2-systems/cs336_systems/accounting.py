"""What parallel training costs, on paper: bytes held, bytes sent, and the batch at which computing takes longer.

Sizes are in bytes, times in seconds, rates per second; GB are 10^9 bytes. There are N devices, S bytes in a buffer,
and a stack of L blocks, each two linear layers [D F] and [F D], whose P = 2 D F L weights meet a batch of B tokens.
A number takes p bytes where it is computed with or sent. Two rules give nearly everything:

- A token and a weight meet once in the forward pass and twice in the backward pass (for the gradients of the
  layer's input and of its weight), in 2 operations each: 4 B D F and 8 B D F per block.
- All-gather, reduce-scatter and a broadcast of all shards let (N - 1)/N S bytes through each device's link. An
  all-reduce is a reduce-scatter and an all-gather, and costs two of them.

Sources: Rajbhandari et al. 2020 (ZeRO); Austin et al. 2025, "How to Scale Your Model", the chapter on training
("the scaling book" below), whose letters for a mesh are used here.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from rich.console import Console

from cs336_basics.accounting import parameter_counts
from cs336_basics.model import ModelConfig
from cs336_basics.strategy import resolve_device
from cs336_systems.measure import Measurement, Row, check_options, show
from cs336_systems.models import MODELS, SizeName

MB, GB = 1e6, 1e9
FP32, BF16 = 4, 2
#: Memory of a device as its maker names it: NVIDIA H100, Google TPU v5p.
H100_BYTES, TPU_V5P_BYTES = 80 * GB, 95 * GB

Stage = Literal[0, 1, 2, 3]
StatePrecision = Literal["fp32", "mixed"]


# Ring collectives


def gather_bytes(buffer_bytes: float, ranks: int) -> float:
    """Bytes each rank sends for an all-gather or a reduce-scatter of a whole of S bytes: (N - 1)/N S.

    Every rank needs what the other N - 1 hold, S/N each. If every rank broadcasts its own S/N, this is what a rank
    receives, and what it sends on average.
    """
    return (ranks - 1) / ranks * buffer_bytes


def ring_bytes(buffer_bytes: float, ranks: int) -> float:
    """Bytes each rank sends in a ring all-reduce: reduce-scatter and all-gather, 2 (N - 1)/N S."""
    return 2 * gather_bytes(buffer_bytes, ranks)


def ring_seconds(buffer_bytes: float, ranks: int, bytes_per_second: float, latency_s: float) -> float:
    """Time of a ring all-reduce: 2 (N - 1) rounds, in each of which S/N bytes go one hop on."""
    return 2 * (ranks - 1) * (latency_s + buffer_bytes / ranks / bytes_per_second)


def whole_ring_bytes(buffer_bytes: float, ranks: int) -> float:
    """Bytes each rank sends if whole buffers go round the ring and each rank adds up what passes: (N - 1) S.

    Every rank adds in an order of its own, so that for N > 2 replicas differ in their last bits; and it needs a
    second buffer for what it passes on.
    """
    return (ranks - 1) * buffer_bytes


def whole_ring_seconds(buffer_bytes: float, ranks: int, bytes_per_second: float, latency_s: float) -> float:
    """Time of it: N - 1 rounds, in each of which S bytes go one hop on."""
    return (ranks - 1) * (latency_s + buffer_bytes / bytes_per_second)


def crossover_bytes(ranks: int, bytes_per_second: float, latency_s: float) -> float:
    """The buffer below which whole buffers are faster: half as many hops outweigh N/2 times the bytes.

    l + S/W < 2 l + 2 S/(N W) is S < l W N/(N - 2). Two ranks send equally much either way: any buffer.
    """
    return math.inf if ranks <= 2 else latency_s * bytes_per_second * ranks / (ranks - 2)


# Weights, gradients, optimizer state


@dataclass(frozen=True)
class StateBytes:
    """Bytes per parameter of what lives from step to step, with AdamW."""

    weights: int
    gradients: int
    optimizer: int
    """What only the optimizer's step needs."""

    def per_rank(self, world_size: int, stage: Stage) -> float:
        """Bytes per parameter on each rank: ZeRO's stage 1 shards the optimizer's, 2 gradients too, 3 weights too."""
        parts = (self.optimizer, self.gradients, self.weights)
        return sum(parts[:stage]) / world_size + sum(parts[stage:])


#: "fp32" is also training under autocast, which casts weights as they are used. "mixed" is ZeRO's section 3.1: half
#: precision for the passes; the master weights belong to the optimizer, beside its two moments.
STATE: dict[StatePrecision, StateBytes] = {
    "fp32": StateBytes(FP32, FP32, 2 * FP32),
    "mixed": StateBytes(BF16, BF16, FP32 + 2 * FP32),
}


def training_bytes_per_rank(
    num_parameters: int, world_size: int, stage: Stage, precision: StatePrecision = "fp32"
) -> float:
    """Bytes of weights, gradients and AdamW's state on each rank, if shards are even; stage 0 is plain DDP."""
    return num_parameters * STATE[precision].per_rank(world_size, stage)


def step_traffic_bytes(num_parameters: int, world_size: int, bytes_per_number: int = FP32) -> dict[str, float]:
    """Bytes each rank sends per training step, by method, gradients and weights sent in one dtype.

    DDP: all-reduce of gradients, 2 shares of (N - 1)/N S. Our sharded optimizer leaves that to DDP and then
    broadcasts what each rank has updated: 3 shares. ZeRO-1 and 2 reduce each gradient only to the rank that needs
    it (reduce-scatter), then all-gather weights: 2. ZeRO-3, which is FSDP, gathers weights in both passes and
    reduce-scatters gradients: 3.
    """
    shares = {"DDP": 2, "sharded optimizer": 3, "ZeRO-1": 2, "ZeRO-2": 2, "ZeRO-3": 3}
    return {name: n * gather_bytes(num_parameters * bytes_per_number, world_size) for name, n in shares.items()}


# A stack of linear layers on a mesh of devices


@dataclass(frozen=True)
class MlpStack:
    """L blocks of two linear layers, [D F] and [F D], and nothing else."""

    d_model: int
    d_ff: int
    blocks: int
    bytes_per_number: int = BF16
    """p: of activations, of the weights as they are computed with, and of all that is sent."""

    @property
    def num_parameters(self) -> int:
        return 2 * self.d_model * self.d_ff * self.blocks

    def state_bytes(self) -> int:
        """Master weights, gradients and AdamW's moments in float32."""
        return sum((STATE["fp32"].weights, STATE["fp32"].gradients, STATE["fp32"].optimizer)) * self.num_parameters

    def saved_bytes(self, tokens: float, tensor: int = 1) -> float:
        """What the backward pass needs of the forward pass: the input of every linear layer, p B L (D + F).

        Of F, tensor parallelism leaves each device its share; the gathered block input it keeps whole.
        """
        return self.bytes_per_number * tokens * self.blocks * (self.d_model + self.d_ff / tensor)

    def block_bytes(self) -> int:
        """The weights of a block as they are gathered and computed with."""
        return 2 * self.d_model * self.d_ff * self.bytes_per_number


@dataclass(frozen=True)
class Machine:
    """What one device does in a second."""

    flops_per_second: float
    """C."""
    bytes_per_second: float
    """W: what a device takes in along one axis of the mesh; on a TPU from both sides at once."""

    @property
    def intensity(self) -> float:
        """α = C/W: operations in the time of a byte."""
        return self.flops_per_second / self.bytes_per_second


@dataclass(frozen=True)
class Layout:
    """N = X · Y devices: X share the batch, and each of those is Y that share the columns of its matrices.

    With Y = 1 it is data parallelism, or FSDP if `sharded`; with X = 1 it is tensor parallelism.
    """

    name: str
    data: int
    """X."""
    tensor: int
    """Y."""
    data_axes: int = 1
    """M_X: axes of the mesh that X covers, each with a bandwidth of its own."""
    tensor_axes: int = 1
    """M_Y."""
    sharded: bool = True
    """Weights, gradients and optimizer state are sharded over X; else they are replicated over it."""

    @property
    def devices(self) -> int:
        return self.data * self.tensor


#: The model, devices and mesh of the course's communication_accounting. v5p: the scaling book's table of TPUs.
XXL = MlpStack(d_model=16_384, d_ff=53_248, blocks=126)
TPU_V5P = Machine(flops_per_second=4.6e14, bytes_per_second=2 * 9e10)
COURSE_LAYOUT = Layout("FSDP × TP", data=16, tensor=4, data_axes=2, tensor_axes=1)


@dataclass(frozen=True)
class PassTimes:
    """Seconds of a pass on every device: of computing, of moving weights or gradients, of moving activations."""

    compute: float
    weights: float
    activations: float

    def communication(self, at_once: bool = True) -> float:
        """The longer of the two if they run at once, on axes of their own; else their sum."""
        return max(self.weights, self.activations) if at_once else self.weights + self.activations


def pass_times(stack: MlpStack, tokens: float, layout: Layout, machine: Machine) -> tuple[PassTimes, PassTimes]:
    """Times of the forward and of the backward pass, for a batch of `tokens` on all devices together.

    Compute: 4 B D F/(N C) per block, and twice that backward.
    Weights: a device works with 1/Y of each, so that gathering a block's two takes 2 p D F/(Y W M_X). FSDP gathers
    forward, gathers again backward, and reduce-scatters as many gradients; DP all-reduces gradients backward.
    Activations: a block gathers its input and reduce-scatters its output among Y devices, [B/X D] each:
    2 p B D/(X W M_Y). Backward the roles are swapped, for gradients of the same shapes.

    The (N - 1)/N of a ring is taken as 1, as in the scaling book: communication is overstated by 1/(N - 1) of
    itself, N being X or Y.
    """
    s, blocks = stack, stack.blocks
    compute = 4 * tokens * s.d_model * s.d_ff * blocks / (layout.devices * machine.flops_per_second)
    gather = blocks * s.block_bytes() / (layout.tensor * machine.bytes_per_second * layout.data_axes)
    gather = gather if layout.data > 1 else 0.0
    stream = blocks * 2 * s.bytes_per_number * tokens * s.d_model / layout.data
    stream = stream / (machine.bytes_per_second * layout.tensor_axes) if layout.tensor > 1 else 0.0
    forward = PassTimes(compute, gather if layout.sharded else 0.0, stream)
    return forward, PassTimes(2 * compute, 2 * gather, stream)


def compute_bound_tokens(stack: MlpStack, layout: Layout, machine: Machine, at_once: bool = True) -> float:
    """Tokens per device, B/N, from which neither pass waits for communication; infinite if there is no such batch.

    Computing outlasts the weights' way, in either pass, if 4 B D F/(N C) >= 2 p D F/(Y W M_X):
    B/N >= p α/(2 Y M_X). The activations' way grows with B as computing does. Of the forward pass they take the
    part u = p α Y/(2 F M_Y) whatever the batch, which must not exceed 1; backward, where there is twice as much to
    compute, u/2. If both ways must be gone one after the other, 1 - u is left for the weights. So the forward pass
    decides, unless weights are replicated and wait for nothing there.
    """
    per_byte = stack.bytes_per_number * machine.intensity / 2
    for_weights = per_byte / (layout.tensor * layout.data_axes) if layout.data > 1 else 0.0
    part = per_byte * layout.tensor / (stack.d_ff * layout.tensor_axes) if layout.tensor > 1 else 0.0
    if part > 1:
        return math.inf
    if at_once or not for_weights:
        return for_weights
    left = 1 - (part if layout.sharded else part / 2)
    return for_weights / left if left else math.inf


def best_data_size(stack: MlpStack, tokens: float, layout: Layout) -> float:
    """X that moves fastest in the forward pass, for the N, M_X and M_Y of `layout`: √(B N M_X/(F M_Y)).

    With Y = N/X the weights take 2 p D F X/(N W M_X), which grows with X, and the activations 2 p B D/(X W M_Y),
    which falls. Their sum is least, and so is the longer one, where they are equal.
    """
    return math.sqrt(tokens * layout.devices * layout.data_axes / (stack.d_ff * layout.tensor_axes))


def least_tokens(stack: MlpStack, layout: Layout, machine: Machine) -> float:
    """Tokens per device below which no split X · Y is compute bound, both ways at once: (p α/2)²/(F M_X M_Y).

    `compute_bound_tokens` falls with Y, and u <= 1 bounds Y by 2 F M_Y/(p α): put in.
    """
    return (stack.bytes_per_number * machine.intensity / 2) ** 2 / (stack.d_ff * layout.data_axes * layout.tensor_axes)


def layout_bytes(stack: MlpStack, tokens: float, layout: Layout) -> float:
    """Memory per device: state, saved activations, and two blocks of weights in p bytes, one in use, one arriving."""
    state = stack.state_bytes() / layout.tensor / (layout.data if layout.sharded else 1)
    return state + stack.saved_bytes(tokens / layout.data, layout.tensor) + 2 * stack.block_bytes() / layout.tensor


def half_sharded_bytes(stack: MlpStack, tokens: int, devices: int, gathered_blocks: int = 0) -> float:
    """Memory per device if state and every second layer's activations are sharded: (16 P + A/2)/N + A/2.

    A is what `tokens` tokens save for the backward pass. The course leaves out the weights that are gathered at the
    time; `gathered_blocks` adds that many blocks of them.
    """
    half = stack.saved_bytes(tokens) / 2
    return (stack.state_bytes() + half) / devices + half + gathered_blocks * stack.block_bytes()


def devices_needed(stack: MlpStack, tokens: int, memory_bytes: float, gathered_blocks: int = 0) -> int:
    """The fewest devices on which `half_sharded_bytes` is below `memory_bytes`: N > (16 P + A/2)/(memory - rest)."""
    rest = stack.saved_bytes(tokens) / 2 + gathered_blocks * stack.block_bytes()
    if rest >= memory_bytes:
        raise ValueError(
            f"{tokens} tokens put {rest / GB:.4g} GB on every device, which has {memory_bytes / GB:g}; choose fewer"
        )
    return math.floor((stack.state_bytes() + stack.saved_bytes(tokens) / 2) / (memory_bytes - rest)) + 1


# FSDP of the assignment's models


def fsdp_units(config: ModelConfig) -> list[int]:
    """Weights of each Linear and Embedding in the order of the forward pass: what FSDP shards and gathers as one."""
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
    """Held: the largest two neighbours among the units, gathered in the compute dtype."""

    @property
    def sent(self) -> float:
        return 2 * self.gather + self.reduce_scatter + self.replicated


def fsdp_costs(config: ModelConfig, world_size: int, compute_bytes: int) -> FsdpCosts:
    """What FSDP costs if weights and gradients are sent in a compute dtype of `compute_bytes`.

    Weights are gathered once a pass. (The embedding's second gather could be saved: its gradient needs no weights.)
    One unit is prefetched, so that at most two are whole at a time.
    """
    units = fsdp_units(config)
    norms = parameter_counts(config)["norms"]
    share = gather_bytes(sum(units) * compute_bytes, world_size)
    return FsdpCosts(
        gather=share,
        reduce_scatter=share,
        replicated=ring_bytes(norms * FP32, world_size),
        state=training_bytes_per_rank(sum(units), world_size, 3) + training_bytes_per_rank(norms, world_size, 0),
        gathered_peak=compute_bytes * max(map(sum, pairwise(units))),
    )


# DDP with buckets


def ddp_overhead(total_bytes: float, bytes_per_second: float, call_s: float, buckets: float) -> float:
    """Seconds from the end of the backward pass until gradients are there: s/(n w) + n o, for n buckets.

    Computing a bucket's gradients takes t = s/(n w), by assumption as long as communicating them. The first
    all-reduce starts at t; from then on one follows the other, n of o + t each, for each comes after the gradients
    it needs. The last ends at t + n (o + t), when the backward pass has been over, since n t, for t + n o.
    """
    return total_bytes / (buckets * bytes_per_second) + buckets * call_s


def optimal_bucket_bytes(total_bytes: float, bytes_per_second: float, call_s: float) -> float:
    """Bytes in a bucket that make `ddp_overhead` least: √(o s w), where its terms are equal, at n = √(s/(o w)).

    The overhead is then 2 √(s o/w).
    """
    return math.sqrt(call_s * total_bytes * bytes_per_second)


# The command

#: What else reduces the batch, beyond what can be put into the formula.
TRICKS = (
    "Pipeline stages: of k stages each holds L/k blocks on N/k devices, so that the same batch gives a device k times "
    "the tokens, and a stage sends no more than [tokens D] on. The price is the bubble.",
    "Gradient accumulation does not help by itself: each micro-batch must be compute bound on its own, unless weights "
    "are gathered once for all of them, and kept.",
    "Collectives in pieces that overlap with the products they feed, so that what can run at once does.",
    "Replicas across slow links, shards within fast ones (HSDP): slow links carry one all-reduce of shards a step.",
)
BUFFER_MB = (0.001, 0.1, 1.0, 10.0, 100.0, 1000.0)
BUCKET_MB = (1.0, 10.0, 100.0, 1000.0)
RANKS = (2, 4, 8, 64)


@dataclass(frozen=True)
class Accounting(Measurement):
    """Calculate memory, communication and compute-bound batches of parallel training; nothing is measured."""

    memory_tokens: int = 4096
    """Tokens whose activations the XXL model saves for the backward pass."""
    batch_tokens: int = 32_768
    """Tokens of the batch on which the parallel strategies are compared."""
    size: SizeName = "xl"
    """The model that is replicated, or whose optimizer is sharded."""
    world_size: int = 2
    """Ranks over which it is."""
    ring: int = 8
    """Ranks in the ring on which two all-reduces are compared."""
    link_gb_per_s: float = 450.0
    """Bandwidth of a GPU's link in one direction; by default NVLink 4 of an H100, as in its data sheet."""
    hop_latency_us: float = 5.0
    """Latency of a hop in the ring (an assumption)."""
    call_overhead_us: float = 30.0
    """Overhead of a call of all-reduce (an assumption)."""
    name: str = "accounting"

    def execute(self) -> None:
        check_options(self, "memory_tokens", "batch_tokens")
        check_options(self, "world_size", "ring", least=2)
        for option in ("link_gb_per_s", "hop_latency_us", "call_overhead_us"):
            if not 0 < getattr(self, option) < math.inf:
                raise ValueError(f"--{option.replace('_', '-')} is {getattr(self, option)}, but must be positive")
        best = best_data_size(XXL, self.batch_tokens, COURSE_LAYOUT)
        tables = {
            "communication_accounting (a, b): memory of XXL": self.memory_rows(),
            "communication_accounting (c, d): forward pass of XXL, tokens from which it is compute bound": batch_rows(),
            "data_parallel_calcs, fsdp_calcs, tp_calcs, fsdp_tp_calcs: XXL on TPU v5p": self.strategy_rows(),
            f"alternate_ring_all_reduce: sent by each of {self.ring} ranks, and time": self.ring_rows(),
            "alternate_ring_all_reduce: whole buffers are faster up to": self.crossover_rows(),
            "optimizer_state_sharding_accounting: bytes per parameter": zero_rows(),
            f"optimizer_state_sharding_accounting: {self.size} in fp32, a step of each rank": self.traffic_rows(),
            "fsdp_accounting: per rank and step": self.fsdp_rows(),
            f"ddp_bucketed_benchmarking (b): {self.size}, time after the backward pass": self.bucket_rows(),
        }
        console = Console()
        for title, rows in tables.items():
            show(title, rows, settings=("tokens", "ranks"))
            for line in TRICKS if "(c, d)" in title else ():
                console.print(f"- {line}", highlight=False, markup=False)
            if "fsdp_tp_calcs" in title:
                console.print(f"Forward, FSDP × TP would communicate least at X = {best:.2f}.", highlight=False)
        file = self.result_file("closed-form accounting of parallel training", resolve_device(self.device))
        rows = [{"table": title} | row for title, rows in tables.items() for row in rows]
        file.write(rows, tricks=TRICKS, best_data_size=best)
        file.announce()

    def memory_rows(self) -> list[Row]:
        """XXL on one device, then with its state and half of its activations sharded."""
        tokens = self.memory_tokens
        state, saved = XXL.state_bytes(), XXL.saved_bytes(tokens)
        held = {
            "float32 master weights": FP32 * XXL.num_parameters,
            "float32 gradients": FP32 * XXL.num_parameters,
            "float32 AdamW moments": 2 * FP32 * XXL.num_parameters,
            "all of these": state,
            "saved for backward: bfloat16 inputs of linear layers": saved,
            "all together": state + saved,
        }
        rows: list[Row] = [
            {"what": what, "devices": 1, "GB": size / GB, "H100s": math.ceil(size / H100_BYTES)}
            for what, size in held.items()
        ]
        for what, blocks in (("sharded, below 95 GB each", 0), ("the same and two gathered blocks", 2)):
            devices = devices_needed(XXL, tokens, TPU_V5P_BYTES, blocks)
            size = half_sharded_bytes(XXL, tokens, devices, blocks)
            rows.append({"what": what, "devices": devices, "GB": size / GB})
        return [{"tokens": tokens} | row for row in rows]

    def strategy_rows(self) -> list[Row]:
        """All strategies on as many devices as the course's mesh has, with all of its axes."""
        course, tokens = COURSE_LAYOUT, self.batch_tokens
        devices, axes = course.devices, course.data_axes + course.tensor_axes
        layouts = [
            Layout("DP", devices, 1, data_axes=axes, sharded=False),
            Layout("FSDP", devices, 1, data_axes=axes),
            Layout("TP", 1, devices, tensor_axes=axes),
            course,
            min(_splits(course), key=lambda split: pass_times(XXL, tokens, split, TPU_V5P)[0].communication()),
        ]
        return [{"tokens": tokens, **_strategy_row(tokens, layout)} for layout in layouts]

    def ring_rows(self) -> list[Row]:
        """Both all-reduces, over sizes of the buffer: bytes that each rank sends, and time."""
        link = self.link_gb_per_s * GB, self.hop_latency_us / 1e6
        rows = []
        for size in BUFFER_MB:
            row = {"buffer_MB": size, "ring_MB": ring_bytes(size, self.ring)}
            row |= {"whole_MB": whole_ring_bytes(size, self.ring)}
            row |= {"ring_us": ring_seconds(size * MB, self.ring, *link) * 1e6}
            rows.append(row | {"whole_us": whole_ring_seconds(size * MB, self.ring, *link) * 1e6})
        return rows

    def crossover_rows(self) -> list[Row]:
        """The buffer at which they take equally long."""
        link = self.link_gb_per_s * GB, self.hop_latency_us / 1e6
        return [{"ring of": ranks, "MB": _or(crossover_bytes(ranks, *link) / MB, "any size")} for ranks in RANKS]

    def traffic_rows(self) -> list[Row]:
        """Our sharded optimizer beside DDP and ZeRO: bytes sent, and held from step to step."""
        count, ranks = sum(parameter_counts(MODELS[self.size]).values()), self.world_size
        stages: tuple[Stage, ...] = (0, 1, 1, 2, 3)
        rows = []
        for (method, sent), stage in zip(step_traffic_bytes(count, ranks).items(), stages):
            held = training_bytes_per_rank(count, ranks, stage)
            rows.append({"method": method, "ranks": ranks, "sent_GB": sent / GB, "held_GB": held / GB})
        return rows

    def fsdp_rows(self) -> list[Row]:
        """The assignment's models, with both compute dtypes."""
        rows = []
        for size, config in MODELS.items():
            for name, compute_bytes in (("bf16", BF16), ("fp32", FP32)):
                costs = fsdp_costs(config, self.world_size, compute_bytes)
                row: Row = {"size": size, "compute": name, "ranks": self.world_size}
                row |= {"gather_forward_MB": costs.gather / MB, "gather_backward_MB": costs.gather / MB}
                row |= {"reduce_scatter_MB": costs.reduce_scatter / MB, "norms_MB": costs.replicated / MB}
                rows.append(row | {"gathered_peak_MB": costs.gathered_peak / MB, "state_MB": costs.state / MB})
        return rows

    def bucket_rows(self) -> list[Row]:
        """The course's bucket sizes and the best one; w is what the ring makes of the link."""
        total = FP32 * sum(parameter_counts(MODELS[self.size]).values())
        bandwidth = total / ring_bytes(total, self.world_size) * self.link_gb_per_s * GB
        overhead_s = self.call_overhead_us / 1e6
        best = optimal_bucket_bytes(total, bandwidth, overhead_s) / MB
        rows = []
        for size in sorted((*BUCKET_MB, best)):
            buckets = max(1.0, total / (size * MB))
            after = ddp_overhead(total, bandwidth, overhead_s, buckets)
            rows.append({"bucket_MB": size, "buckets": buckets, "after_ms": after * 1e3, "best": size == best})
        return [row | {"best": "best" if row["best"] else None} for row in rows]


def batch_rows() -> list[Row]:
    """The course's mesh, and the same with the tricks that the formula knows."""
    eight_bits = replace(XXL, bytes_per_number=1)
    widest = min(_splits(COURSE_LAYOUT), key=lambda layout: compute_bound_tokens(XXL, layout, TPU_V5P))
    cases = {
        "weights and activations at once": (XXL, COURSE_LAYOUT, True),
        "one after the other": (XXL, COURSE_LAYOUT, False),
        "sent in 8 bits": (eight_bits, COURSE_LAYOUT, True),
        "as much TP as pays": (XXL, widest, True),
    }
    rows: list[Row] = []
    for what, (stack, layout, at_once) in cases.items():
        tokens = compute_bound_tokens(stack, layout, TPU_V5P, at_once)
        row: Row = {"what": what, "X": layout.data, "Y": layout.tensor, "per_device": tokens}
        rows.append(row | {"batch": math.ceil(tokens * layout.devices)})
    least = least_tokens(XXL, COURSE_LAYOUT, TPU_V5P)
    return [*rows, {"what": "bound for any X · Y", "per_device": least}]


def zero_rows() -> list[Row]:
    """ZeRO's stages for both precisions and some numbers of ranks."""
    return [
        {"precision": precision, "stage": stage, **{f"{n} ranks": state.per_rank(n, stage) for n in RANKS}}
        for precision, state in STATE.items()
        for stage in (0, 1, 2, 3)
    ]


def _splits(layout: Layout) -> list[Layout]:
    """All X · Y of its devices that have both."""
    n = layout.devices
    return [replace(layout, data=x, tensor=n // x) for x in range(2, n) if n % x == 0]


def _strategy_row(tokens: int, layout: Layout) -> Row:
    forward, backward = pass_times(XXL, tokens, layout, TPU_V5P)
    return {
        "strategy": layout.name,
        "X": layout.data,
        "Y": layout.tensor,
        "GB": layout_bytes(XXL, tokens, layout) / GB,
        "forward_compute_ms": forward.compute * 1e3,
        "forward_comm_ms": forward.communication() * 1e3,
        "backward_compute_ms": backward.compute * 1e3,
        "backward_comm_ms": backward.communication() * 1e3,
        "bound_from_per_device": _or(compute_bound_tokens(XXL, layout, TPU_V5P), "never"),
    }


def _or(number: float, word: str) -> float | str:
    """A word in place of infinity, which JSON does not know."""
    return number if math.isfinite(number) else word
