"""Launch the Triton kernels: tile sizes, tensor descriptors, operators for torch.compile, and autograd."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from cs336_systems.kernels.flash_attention.shapes import check_inputs
from cs336_systems.kernels.flash_attention.triton_kernels import (
    LOG2_E,
    delta_kernel,
    dkdv_kernel,
    dq_kernel,
    forward_kernel,
)
from cs336_systems.kernels.triton_support import INTERPRETED, check_device

MAX_HEAD_DIM = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Rows of a program of `delta_kernel`; its results are padded to whole tiles of this many rows.
DELTA_ROWS = 128


@dataclass(frozen=True)
class Tiles:
    """The size of a kernel's tiles of scores, and the resources that the compiler may use for one."""

    block_m: int
    """Queries."""
    block_n: int
    """Keys."""
    warps: int
    stages: int
    """Tiles in flight from memory."""
    registers: int | None = None
    """The most registers per thread. Default: the compiler's choice."""


#: (kernel, HEAD_DIM) -> tiles for 16-bit numbers, found by `python -m cs336_systems.instruments.kernels.flash_tiles` on
#: an H200. They are fixed, not tuned at the first call, so that no call waits and no bit depends on timing.
TILES: dict[tuple[str, int], Tiles] = {
    ("forward", 16): Tiles(64, 128, 4, 3),
    ("forward", 32): Tiles(64, 128, 4, 3),
    ("forward", 64): Tiles(64, 128, 4, 3),
    ("forward", 128): Tiles(128, 64, 4, 2),
    ("dkdv", 16): Tiles(128, 64, 4, 3),
    ("dkdv", 32): Tiles(128, 64, 4, 3),
    ("dkdv", 64): Tiles(128, 64, 4, 2),
    ("dkdv", 128): Tiles(64, 128, 8, 3),
    ("dq", 16): Tiles(64, 64, 4, 3, registers=168),
    ("dq", 32): Tiles(64, 128, 4, 3),
    ("dq", 64): Tiles(128, 64, 4, 3),
    ("dq", 128): Tiles(128, 64, 8, 3),
}
#: Tiles for float32, found with `--dtype float32` on an H100.
FLOAT32_TILES: dict[tuple[str, int], Tiles] = {
    ("forward", 16): Tiles(64, 128, 4, 2),
    ("forward", 32): Tiles(64, 128, 4, 2),
    ("forward", 64): Tiles(128, 64, 8, 2),
    ("forward", 128): Tiles(128, 64, 8, 2),
    ("dkdv", 16): Tiles(64, 64, 4, 2),
    ("dkdv", 32): Tiles(64, 128, 8, 2),
    ("dkdv", 64): Tiles(64, 128, 8, 2),
    ("dkdv", 128): Tiles(64, 32, 8, 2),
    ("dq", 16): Tiles(64, 128, 4, 2),
    ("dq", 32): Tiles(64, 128, 4, 2),
    ("dq", 64): Tiles(128, 64, 8, 2),
    ("dq", 128): Tiles(16, 64, 4, 2),
}
#: Tiles for TF32, and for smaller GPUs, where the best tiles do not fit into shared memory.
SMALL_TILES = (Tiles(64, 64, 4, 2), Tiles(32, 32, 4, 2), Tiles(16, 16, 4, 1))


class FlashAttentionTriton(torch.autograd.Function):
    """FlashAttention-2 on a GPU: `FlashAttentionTriton.apply(Q, K, V, is_causal=False)`.

    Q is [... n_queries d], K and V are [... n_keys d], float32, float16 or bfloat16, with any strides, d at most 128;
    with `is_causal` query i attends to the keys j ≤ i. It returns O [... n_queries d]. O and the gradients are
    deterministic. Q, K, V, O and L are saved for the backward pass. A float32 matmul consists of three TF32 matmuls and
    is about as exact (`precision_of`); `torch.set_float32_matmul_precision("high")` asks for a single one.

    K and V may have fewer heads (the dimension before the sequence) than Q, which is grouped-query attention
    (Ainslie et al. 2023): query head h uses head h // (heads of Q / heads of K).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """

    # Under torch.compile these two methods are traced. They only call the operators, which are opaque to the tracer:
    # with dynamic shapes, torch 2.13 confuses the sizes that a traced backward pass reads. Second derivatives raise an
    # error, because `flash_backward` has no derivative.
    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, is_causal: bool = False) -> Tensor:
        check_inputs(Q, K, V, grouped=True)
        _check_kernels_can_run(Q)
        O, L = flash_forward(Q, K, V, is_causal)
        ctx.save_for_backward(Q, K, V, O, L)
        ctx.is_causal = is_causal
        return O

    @staticmethod
    def backward(ctx: Any, dO: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        Q, K, V, O, L = ctx.saved_tensors
        dQ, dK, dV = flash_backward(Q, K, V, O, L, dO, ctx.is_causal)
        return dQ, dK, dV, None


@torch.library.custom_op("cs336_systems::flash_forward", mutates_args=())
def flash_forward(Q: Tensor, K: Tensor, V: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Compute O, and the log-sum-exp of the scores L [... n_queries] in float32. Without any key they are 0 and -∞."""
    O, L = _flash_forward_outputs(Q, K, V, is_causal)
    if O.numel() == 0 or K.numel() == 0:
        return O.zero_(), L.fill_(-math.inf)
    q, k, v, o = _copyable(Q), _copyable(K), _copyable(V), _four_dimensions(O)
    with torch.cuda.device_of(Q):
        _run("forward", launch_forward, q, k, v, o, L, is_causal, Q.shape[-1] ** -0.5)
    _copy_back(O, o)
    return O, L


@torch.library.custom_op("cs336_systems::flash_backward", mutates_args=())
def flash_backward(
    Q: Tensor, K: Tensor, V: Tensor, O: Tensor, L: Tensor, dO: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dQ, dK and dV from the arguments and results of `flash_forward`, and dO of the shape of O."""
    dQ, dK, dV = _flash_backward_outputs(Q, K, V, O, L, dO, is_causal)
    if Q.numel() == 0 or K.numel() == 0:
        return dQ.zero_(), dK.zero_(), dV.zero_()
    scale = Q.shape[-1] ** -0.5
    q, k, v, do = _copyable(Q), _copyable(K), _copyable(V), _copyable(dO)
    dq, dk, dv = _four_dimensions(dQ), _four_dimensions(dK), _four_dimensions(dV)
    with torch.cuda.device_of(Q):
        delta, log2_L = launch_delta(_copyable(O), do, L)
        _run("dkdv", launch_dkdv, q, k, v, do, log2_L, delta, dk, dv, is_causal, scale)
        _run("dq", launch_dq, q, k, v, do, log2_L, delta, dq, is_causal, scale)
    for X, x in ((dQ, dq), (dK, dk), (dV, dv)):
        _copy_back(X, x)
    return dQ, dK, dV


@flash_forward.register_fake
def _flash_forward_outputs(Q: Tensor, K: Tensor, V: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    return _new_like(Q), Q.new_empty(Q.shape[:-1], dtype=torch.float32)


@flash_backward.register_fake
def _flash_backward_outputs(
    Q: Tensor, K: Tensor, V: Tensor, O: Tensor, L: Tensor, dO: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _new_like(Q), _new_like(K), _new_like(V)


def _new_like(x: Tensor) -> Tensor:
    """Allocate a tensor of the shape of `x`, [... batch heads sequence d], in the layout [... batch sequence heads d].

    This is a Transformer's layout before and after attention, so that joining the heads copies nothing.
    """
    if x.dim() < 4:
        return x.new_empty(x.shape)
    *leading, heads, sequence, d = x.shape
    return x.new_empty(*leading, sequence, heads, d).transpose(-2, -3)


def launch_forward(
    tiles: Tiles, Q: Tensor, K: Tensor, V: Tensor, O: Tensor, L: Tensor, is_causal: bool, scale: float
) -> None:
    """Write O and L."""
    batch, heads, n_queries, d = Q.shape
    (q, o), (k, v) = _descriptors(tiles.block_m, Q, O), _descriptors(tiles.block_n, K, V)
    forward_kernel[(batch * heads * triton.cdiv(n_queries, tiles.block_m),)](
        q, k, v, o, L, n_queries, K.shape[2], heads, heads // K.shape[1], scale * LOG2_E.value,
        **_constants(tiles, d, Q.dtype, is_causal),
    )  # fmt: skip


def launch_delta(O: Tensor, dO: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """Compute D = rowsum(O ∘ dO) and L log₂e, each [batch heads n_queries] padded to whole tiles."""
    batch, heads, n_queries, d = O.shape
    tiles = triton.cdiv(n_queries, DELTA_ROWS)
    delta, log2_L = O.new_empty(2, batch, heads, tiles * DELTA_ROWS, dtype=torch.float32)
    delta_kernel[(batch * heads * tiles,)](
        *_descriptors(DELTA_ROWS, O, dO), L.contiguous(), delta, log2_L, n_queries, tiles * DELTA_ROWS, heads,
        HEAD_DIM=_padded_head_dim(d), BLOCK_M=DELTA_ROWS,
    )  # fmt: skip
    return delta, log2_L


def launch_dkdv(
    tiles: Tiles, Q: Tensor, K: Tensor, V: Tensor, dO: Tensor, log2_L: Tensor, delta: Tensor, dK: Tensor, dV: Tensor,
    is_causal: bool, scale: float,
) -> None:  # fmt: skip
    """Write dK and dV."""
    (batch, heads, n_queries, d), (_, kv_heads, n_keys, _) = Q.shape, K.shape
    (q, do), (k, v, dk, dv) = _descriptors(tiles.block_m, Q, dO), _descriptors(tiles.block_n, K, V, dK, dV)
    dkdv_kernel[(batch * kv_heads * triton.cdiv(n_keys, tiles.block_n),)](
        q, k, v, do, log2_L, delta, dk, dv,
        n_queries, delta.shape[-1], n_keys, kv_heads, heads // kv_heads, scale * LOG2_E.value,
        GROUPED=heads > kv_heads, WAIT_FOR_DOTS=not INTERPRETED and Q.dtype != torch.float32,
        **_constants(tiles, d, Q.dtype, is_causal),
    )  # fmt: skip


def launch_dq(
    tiles: Tiles, Q: Tensor, K: Tensor, V: Tensor, dO: Tensor, log2_L: Tensor, delta: Tensor, dQ: Tensor,
    is_causal: bool, scale: float,
) -> None:  # fmt: skip
    """Write dQ."""
    batch, heads, n_queries, d = Q.shape
    (q, do, dq), (k, v) = _descriptors(tiles.block_m, Q, dO, dQ), _descriptors(tiles.block_n, K, V)
    dq_kernel[(batch * heads * triton.cdiv(n_queries, tiles.block_m),)](
        q, k, v, do, log2_L, delta, dq,
        n_queries, delta.shape[-1], K.shape[2], heads, heads // K.shape[1], scale * LOG2_E.value,
        **_constants(tiles, d, Q.dtype, is_causal),
    )  # fmt: skip


def _check_kernels_can_run(Q: Tensor) -> None:
    check_device(Q, "FlashAttentionTriton needs an NVIDIA GPU, but its inputs are", "use FlashAttentionPyTorch")
    if INTERPRETED and Q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16")
    if Q.dtype not in DTYPES:
        raise ValueError(
            f"FlashAttentionTriton computes in float32, float16 and bfloat16, but its inputs are {Q.dtype}: "
            "cast them, or use FlashAttentionPyTorch"
        )
    if Q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"FlashAttentionTriton takes heads of width at most {MAX_HEAD_DIM}, but d is {Q.shape[-1]}: "
            "use more heads of a smaller width, or FlashAttentionPyTorch"
        )


# The rest of this file runs at every call, while a GPU with a short sequence has nothing else to do: it is kept short.


def _four_dimensions(x: Tensor) -> Tensor:
    """View [... heads sequence d] as [batch heads sequence d], with d padded with zeros to what the TMA can move."""
    if x.dim() != 4:
        x = x.flatten(0, -4) if x.dim() > 4 else x.reshape(*[1] * (4 - x.dim()), *x.shape)
    d = x.shape[-1]
    missing = 16 - d if d < 16 else -d % (16 // x.element_size())  # rows of at least 16 numbers, whole 16 bytes
    return pad(x, (0, missing)) if missing else x


def _copyable(x: Tensor) -> Tensor:
    """Return `x` in four dimensions, or a copy if the TMA does not accept its address or strides."""
    x = _four_dimensions(x)
    *outer, inner = x.stride()
    size = x.element_size()
    if inner == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride * size % 16 == 0 for stride in outer):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _copy_back(X: Tensor, x: Tensor) -> None:
    """Fill `X` from `x`, its four-dimensional form, if that is a padded copy and not a view."""
    if x.shape[-1] != X.shape[-1]:
        X.copy_(x[..., : X.shape[-1]].reshape(X.shape))


def _descriptors(rows: int, *tensors: Tensor) -> list[TensorDescriptor]:
    """Describe [batch heads sequence d] tensors for loads and stores of blocks [1 1 rows HEAD_DIM]."""
    descriptors = []
    for x in tensors:
        # This bypasses the constructor, which checks what `_copyable` has ensured and takes longer than the rest.
        descriptor = object.__new__(TensorDescriptor)
        descriptor.base, descriptor.shape, descriptor.strides = x, [*x.shape], [*x.stride()]
        descriptor.block_shape = [1, 1, rows, _padded_head_dim(x.shape[-1])]
        descriptors.append(descriptor)
    return descriptors


@functools.cache
def _padded_head_dim(d: int) -> int:
    return triton.next_power_of_2(d)


def _constants(tiles: Tiles, d: int, dtype: torch.dtype, is_causal: bool) -> dict[str, Any]:
    return _constants_of(tiles, d, is_causal, precision_of(dtype))


@functools.cache
def _constants_of(tiles: Tiles, d: int, is_causal: bool, precision: str) -> dict[str, Any]:
    return {
        "HEAD_DIM": _padded_head_dim(d), "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "STAGES": tiles.stages,
        "CAUSAL": is_causal, "PRECISION": precision, "num_warps": tiles.warps, "maxnreg": tiles.registers,
    }  # fmt: skip


def precision_of(dtype: torch.dtype) -> str:
    """Return how matmuls are computed, in Triton's terms.

    Tensor cores cannot multiply float32, only TF32, which has 11 of its 24 bits. "tf32x3" splits x into TF32 numbers
    x₁ + x₂ and sums x₁y₁ + x₁y₂ + x₂y₁ in float32 (Ootomo and Yokota 2022): about the errors of matmuls without tensor
    cores, in a quarter to a twelfth of their time. PyTorch's memory-efficient attention does the same.
    """
    if dtype != torch.float32:
        return "ieee"
    # torch.set_float32_matmul_precision sets this too.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


#: Tiles that did not fit on a device: (device, kernel, ...).
_too_large: set[tuple[Any, ...]] = set()


def tiles_for(kernel: str, d: int, dtype: torch.dtype) -> Sequence[Tiles]:
    """Return the tiles of a kernel ("forward", "dkdv" or "dq"), the best first; later ones need less shared memory."""
    return _tiles_of(kernel, d, precision_of(dtype))


@functools.cache
def _tiles_of(kernel: str, d: int, precision: str) -> Sequence[Tiles]:
    if precision == "tf32":
        return SMALL_TILES
    best = (FLOAT32_TILES if precision == "tf32x3" else TILES)[kernel, d]
    return (best, *(tiles for tiles in SMALL_TILES if tiles.block_m * tiles.block_n < best.block_m * best.block_n))


def _run(kernel: str, launch: Callable[..., None], Q: Tensor, K: Tensor, *arguments: Any) -> None:
    """Launch with the best tiles that fit into the device's shared memory.

    Tiles that did not fit are remembered together with everything that the kernel is compiled for, so that the tiles of
    a call do not depend on the calls before it.
    """
    *_, is_causal, _ = arguments
    candidates = tiles_for(kernel, _padded_head_dim(Q.shape[-1]), Q.dtype)
    for tiles in candidates:
        key = (Q.device, Q.dtype, kernel, tiles, Q.shape[-1], Q.shape[1] // K.shape[1], is_causal)
        if key in _too_large:
            continue
        try:
            return launch(tiles, Q, K, *arguments)
        except OutOfResources:
            _too_large.add(key)
    raise RuntimeError(f"none of the tiles {candidates} fits on {Q.device}")
