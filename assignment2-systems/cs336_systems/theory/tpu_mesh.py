"""Parallel training of a stack of linear layers on a mesh of devices: time, memory, and compute-bound batches.

Sizes are in bytes, times in seconds, rates per second. A stack has L blocks, each two linear layers [D F] and [F D],
whose P = 2 D F L weights meet a batch of B tokens on N devices. A number takes p bytes where it is computed with or
sent. A token and a weight meet once in the forward pass and twice in the backward pass (for the gradients of the
layer's input and of its weight), in 2 operations each: 4 B D F and 8 B D F per block.

Source: Austin et al. 2025, "How to Scale Your Model", the chapter on training ("the scaling book" below), whose letters
for a mesh are used here.
"""

import math
from dataclasses import dataclass

from cs336_systems.theory.state import STATE
from cs336_systems.theory.units import BFLOAT16, GB

#: Memory of a device as its maker states it: NVIDIA H100, Google TPU v5p.
H100_BYTES, TPU_V5P_BYTES = 80 * GB, 95 * GB


@dataclass(frozen=True)
class MlpStack:
    """L blocks of two linear layers, [D F] and [F D], and nothing else."""

    d_model: int
    d_ff: int
    blocks: int
    bytes_per_number: int = BFLOAT16
    """p: for activations, for weights as they are computed with, and for everything that is sent."""

    @property
    def num_parameters(self) -> int:
        return 2 * self.d_model * self.d_ff * self.blocks

    def state_bytes(self) -> int:
        """Master weights, gradients and AdamW's moments in float32."""
        state = STATE["float32"]
        return (state.weights + state.gradients + state.optimizer) * self.num_parameters

    def saved_bytes(self, tokens: float, tensor: int = 1) -> float:
        """Activations that the backward pass needs: the input of every linear layer, p B L (D + F).

        With tensor parallelism each device keeps its share of F, but the whole gathered input of the block (D).
        """
        return self.bytes_per_number * tokens * self.blocks * (self.d_model + self.d_ff / tensor)

    def block_bytes(self) -> int:
        """Bytes of a block's weights as they are gathered and computed with."""
        return 2 * self.d_model * self.d_ff * self.bytes_per_number


@dataclass(frozen=True)
class Machine:
    """The speed of one device."""

    flops_per_second: float
    """C."""
    bytes_per_second: float
    """W: bandwidth into a device along one axis of the mesh; on a TPU from both sides at once."""

    @property
    def intensity(self) -> float:
        """α = C/W: operations that take as long as receiving a byte."""
        return self.flops_per_second / self.bytes_per_second


@dataclass(frozen=True)
class Layout:
    """N = X · Y devices: X groups share the batch, and the Y devices of a group share the columns of each matrix.

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
    """Weights, gradients and optimizer state are sharded over X; otherwise they are replicated over it."""

    @property
    def devices(self) -> int:
        return self.data * self.tensor


#: The model, devices and mesh of the course's communication_accounting. v5p: the scaling book's table of TPUs.
XXL = MlpStack(d_model=16_384, d_ff=53_248, blocks=126)
TPU_V5P = Machine(flops_per_second=4.6e14, bytes_per_second=2 * 9e10)
COURSE_LAYOUT = Layout("FSDP × TP", data=16, tensor=4, data_axes=2, tensor_axes=1)


@dataclass(frozen=True)
class PassTimes:
    """Seconds that every device spends in a pass on computing, on moving weights or gradients, and on activations."""

    compute: float
    weights: float
    activations: float

    def communication(self, at_once: bool = True) -> float:
        """The longer of the two if they run at the same time, on axes of their own; otherwise their sum."""
        return max(self.weights, self.activations) if at_once else self.weights + self.activations


def pass_times(stack: MlpStack, tokens: float, layout: Layout, machine: Machine) -> tuple[PassTimes, PassTimes]:
    """Times of the forward and the backward pass, for a batch of `tokens` on all devices together.

    Compute: 4 B D F/(N C) per block, and twice that backward.
    Weights: a device works with 1/Y of each, so that gathering the two of a block takes 2 p D F/(Y W M_X). FSDP
    gathers in both passes and reduce-scatters as many gradients; DP all-reduces gradients in the backward pass.
    Activations: a block gathers its input and reduce-scatters its output among Y devices, [B/X D] each:
    2 p B D/(X W M_Y). In the backward pass the roles are swapped, for gradients of the same shapes.

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
    """The fewest tokens per device, B/N, for which neither pass waits for communication; infinite if there are none.

    Computing takes at least as long as moving the weights, in either pass, if 4 B D F/(N C) >= 2 p D F/(Y W M_X),
    which is B/N >= p α/(2 Y M_X). The time to move activations grows with B, as computing does. It takes the fraction
    u = p α Y/(2 F M_Y) of the forward pass's computing time for any batch, which must not exceed 1, and u/2 of the
    backward pass's, where there is twice as much to compute. If weights and activations have to be moved one after the
    other, only 1 - u is left for the weights. So the forward pass decides, unless weights are replicated and nothing
    has to be gathered there.
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
    """The X with the least communication in the forward pass, for the N, M_X and M_Y of `layout`: √(B N M_X/(F M_Y)).

    With Y = N/X, moving the weights takes 2 p D F X/(N W M_X), which grows with X, and moving the activations takes
    2 p B D/(X W M_Y), which falls. Their sum is smallest, and so is their maximum, where they are equal.
    """
    return math.sqrt(tokens * layout.devices * layout.data_axes / (stack.d_ff * layout.tensor_axes))


def least_tokens(stack: MlpStack, layout: Layout, machine: Machine) -> float:
    """Tokens per device below which no split X · Y is compute bound: (p α/2)²/(F M_X M_Y).

    Weights and activations are moved at the same time. `compute_bound_tokens` falls with Y, and u <= 1 bounds Y by
    2 F M_Y/(p α); this is its value at that bound.
    """
    return (stack.bytes_per_number * machine.intensity / 2) ** 2 / (stack.d_ff * layout.data_axes * layout.tensor_axes)


def layout_bytes(stack: MlpStack, tokens: float, layout: Layout) -> float:
    """Memory per device: state, saved activations, and the weights of two blocks, one in use and one arriving."""
    state = stack.state_bytes() / layout.tensor / (layout.data if layout.sharded else 1)
    return state + stack.saved_bytes(tokens / layout.data, layout.tensor) + 2 * stack.block_bytes() / layout.tensor


def half_sharded_bytes(stack: MlpStack, tokens: int, devices: int, gathered_blocks: int = 0) -> float:
    """Memory per device if the state and every second layer's activations are sharded: (16 P + A/2)/N + A/2.

    A is what `tokens` tokens save for the backward pass. The course leaves out the weights that are gathered at that
    time; `gathered_blocks` adds the weights of that many blocks.
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
