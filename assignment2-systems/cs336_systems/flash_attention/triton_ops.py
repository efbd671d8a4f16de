"""Running the Triton kernels: tile sizes, tensor descriptors, operators that torch.compile knows, and autograd."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from cs336_systems.flash_attention.shapes import check_inputs
from cs336_systems.flash_attention.triton_kernels import LOG2_E, delta_kernel, dkdv_kernel, dq_kernel, forward_kernel

#: Whether TRITON_INTERPRET=1 runs the kernels in Python, on CPU tensors.
INTERPRETED: bool = triton.knobs.runtime.interpret
MAX_HEAD_DIM = 128
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: Rows of a program of `delta_kernel`; its results are padded to whole tiles of this many.
DELTA_ROWS = 128


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts the scores into tiles, and what the compiler may spend on one."""

    queries: int
    keys: int
    warps: int
    stages: int
    """Tiles in flight from memory."""
    registers: int | None = None
    """The most registers a thread gets. Default: what the compiler wants."""


#: (kernel, WIDTH) -> tiles for 16-bit numbers, found by `python -m benchmarks.flash_tiles` on an H200. They are
#: fixed, and not tuned at the first call, so that nobody waits and the last bits do not depend on a race.
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
#: For smaller GPUs, on which the best tiles do not fit into shared memory.
SMALL_TILES = (Tiles(64, 64, 4, 2), Tiles(32, 32, 4, 2), Tiles(16, 16, 4, 1))
#: float32: products without tensor cores, which want small tiles.
FLOAT32_TILES = (Tiles(32, 32, 8, 2), Tiles(16, 16, 4, 1))


class FlashAttentionTriton(torch.autograd.Function):
    """FlashAttention-2 on a GPU: `FlashAttentionTriton.apply(Q, K, V, is_causal=False)`.

    Q is [... n_queries d], K and V are [... n_keys d], float32, float16 or bfloat16, of any strides, d at most 128;
    with `is_causal` query i attends to the keys j ≤ i. Returned is O [... n_queries d]. It and the gradients are
    deterministic. Saved for the backward pass are Q, K, V, O and L. Products of float32 are float32 throughout, unless
    `torch.set_float32_matmul_precision("high")` asks for TF32, which is many times faster.

    K and V may have fewer heads (the dimension before the sequence) than Q, which is grouped-query attention
    (Ainslie et al. 2023): query head h uses head h // (heads of Q / heads of K).

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
    """

    # Under torch.compile these two are traced. They do no more than call the operators, whose insides are not:
    # torch 2.13 mistakes sizes that a traced backward pass reads for others when shapes are dynamic. Second derivatives
    # raise, for `flash_backward` has none.
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
    """O, and the log-sum-exp of the scores L [... n_queries] in float32. Without any key they are 0 and -∞."""
    O, L = _flash_forward_outputs(Q, K, V, is_causal)
    if O.numel() == 0 or K.numel() == 0:
        return O.zero_(), L.fill_(-math.inf)
    q, k, v = (_copyable(_four_dimensions(x)) for x in (Q, K, V))
    with _written_to(O) as o:
        _run("forward", launch_forward, q, k, v, o, L, is_causal, Q.shape[-1] ** -0.5)
    return O, L


@torch.library.custom_op("cs336_systems::flash_backward", mutates_args=())
def flash_backward(
    Q: Tensor, K: Tensor, V: Tensor, O: Tensor, L: Tensor, dO: Tensor, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV: the backward pass of `flash_forward`, whose arguments and results it takes, with dO like O."""
    dQ, dK, dV = _flash_backward_outputs(Q, K, V, O, L, dO, is_causal)
    if Q.numel() == 0 or K.numel() == 0:
        return dQ.zero_(), dK.zero_(), dV.zero_()
    scale = Q.shape[-1] ** -0.5
    q, k, v, o, do = (_copyable(_four_dimensions(x)) for x in (Q, K, V, O, dO))
    with torch.cuda.device_of(Q):
        delta, log2_L = launch_delta(o, do, L)
    with _written_to(dK) as dk, _written_to(dV) as dv:
        _run("dkdv", launch_dkdv, q, k, v, do, log2_L, delta, dk, dv, is_causal, scale)
    with _written_to(dQ) as dq:
        _run("dq", launch_dq, q, k, v, do, log2_L, delta, dq, is_causal, scale)
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
    """An empty tensor of the shape of `x`; [... batch heads sequence d] lies in memory as [... batch sequence heads d].

    That is how a Transformer has its heads before and after attention, so that joining them copies nothing.
    """
    if x.dim() < 4:
        return x.new_empty(x.shape)
    *leading, heads, sequence, d = x.shape
    return x.new_empty(*leading, sequence, heads, d).transpose(-2, -3)


def launch_forward(
    tiles: Tiles, Q: Tensor, K: Tensor, V: Tensor, O: Tensor, L: Tensor, is_causal: bool, scale: float
) -> None:
    """Write O and L."""
    batch, heads, n_queries, _ = Q.shape
    forward_kernel[(batch * heads * triton.cdiv(n_queries, tiles.queries),)](
        *_descriptors(tiles.queries, Q), *_descriptors(tiles.keys, K, V), *_descriptors(tiles.queries, O), L,
        n_queries, K.shape[2], heads, heads // K.shape[1], scale * LOG2_E.value,
        **_constants(tiles, Q, is_causal),
    )  # fmt: skip


def launch_delta(O: Tensor, dO: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """D = rowsum(O ∘ dO) and L log₂e, each [batch heads n_queries] padded to whole tiles."""
    batch, heads, n_queries, _ = O.shape
    tiles = triton.cdiv(n_queries, DELTA_ROWS)
    delta, log2_L = O.new_empty(2, batch, heads, tiles * DELTA_ROWS, dtype=torch.float32)
    delta_kernel[(batch * heads * tiles,)](
        *_descriptors(DELTA_ROWS, O, dO), L.contiguous(), delta, log2_L, n_queries, tiles * DELTA_ROWS, heads,
        WIDTH=_width(O), QUERIES=DELTA_ROWS,
    )  # fmt: skip
    return delta, log2_L


def launch_dkdv(
    tiles: Tiles, Q: Tensor, K: Tensor, V: Tensor, dO: Tensor, log2_L: Tensor, delta: Tensor, dK: Tensor, dV: Tensor,
    is_causal: bool, scale: float,
) -> None:  # fmt: skip
    """Write dK and dV."""
    (batch, heads, n_queries, _), (_, kv_heads, n_keys, _) = Q.shape, K.shape
    q, do = _descriptors(tiles.queries, Q, dO)
    dkdv_kernel[(batch * kv_heads * triton.cdiv(n_keys, tiles.keys),)](
        q, *_descriptors(tiles.keys, K, V), do, log2_L, delta, *_descriptors(tiles.keys, dK, dV),
        n_queries, delta.shape[-1], n_keys, kv_heads, heads // kv_heads, scale * LOG2_E.value,
        GROUPED=heads > kv_heads, SETTLE=not INTERPRETED and Q.dtype != torch.float32,
        **_constants(tiles, Q, is_causal),
    )  # fmt: skip


def launch_dq(
    tiles: Tiles, Q: Tensor, K: Tensor, V: Tensor, dO: Tensor, log2_L: Tensor, delta: Tensor, dQ: Tensor,
    is_causal: bool, scale: float,
) -> None:  # fmt: skip
    """Write dQ."""
    batch, heads, n_queries, _ = Q.shape
    q, do, dq = _descriptors(tiles.queries, Q, dO, dQ)
    dq_kernel[(batch * heads * triton.cdiv(n_queries, tiles.queries),)](
        q, *_descriptors(tiles.keys, K, V), do, log2_L, delta, dq, n_queries, delta.shape[-1], K.shape[2],
        heads, heads // K.shape[1], scale * LOG2_E.value,
        **_constants(tiles, Q, is_causal),
    )  # fmt: skip


def _check_kernels_can_run(Q: Tensor) -> None:
    if not (Q.is_cuda or INTERPRETED):
        raise ValueError(
            f"FlashAttentionTriton needs an NVIDIA GPU, but its inputs are on {Q.device}: "
            "use FlashAttentionPyTorch, or set TRITON_INTERPRET=1 to run the kernels in Python"
        )
    if INTERPRETED and Q.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter multiplies bfloat16 wrongly: use float32 or float16 there")
    if Q.dtype not in DTYPES:
        raise ValueError(
            f"FlashAttentionTriton computes in float32, float16 and bfloat16, but its inputs are {Q.dtype}: "
            "cast them, or use FlashAttentionPyTorch"
        )
    if Q.shape[-1] > MAX_HEAD_DIM:
        raise ValueError(
            f"FlashAttentionTriton takes heads of width at most {MAX_HEAD_DIM}, but d is {Q.shape[-1]}: "
            "use more and narrower heads, or FlashAttentionPyTorch"
        )


def _four_dimensions(x: Tensor) -> Tensor:
    """[... heads sequence d] as [batch heads sequence d], d padded with zeros to what the copy engine can move."""
    x = x.flatten(0, -4) if x.dim() > 4 else x.reshape(*[1] * (4 - x.dim()), *x.shape)
    step = 16 // x.element_size()
    missing = max(16, -(-x.shape[-1] // step) * step) - x.shape[-1]
    return pad(x, (0, missing)) if missing else x


@contextmanager
def _written_to(x: Tensor) -> Iterator[Tensor]:
    """`x` in four dimensions to write to: a view of it, or, where d is padded, a tensor that is copied to it later."""
    view = _four_dimensions(x)
    yield view
    if view.shape[-1] != x.shape[-1]:
        x.copy_(view[..., : x.shape[-1]].reshape(x.shape))


def _copyable(x: Tensor) -> Tensor:
    """`x`, or a copy where its address or strides are not those that the copy engine takes."""
    *outer, inner = x.stride()
    aligned = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in outer)
    if inner == 1 and aligned and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _descriptors(rows: int, *tensors: Tensor) -> list[TensorDescriptor]:
    """Descriptors of [batch heads sequence d] tensors that load and store blocks of [1 1 rows D]."""
    return [TensorDescriptor(x, [*x.shape], [*x.stride()], [1, 1, rows, _width(x)]) for x in tensors]


def _width(x: Tensor) -> int:
    return triton.next_power_of_2(x.shape[-1])


def _constants(tiles: Tiles, Q: Tensor, is_causal: bool) -> dict[str, Any]:
    return {
        "WIDTH": _width(Q), "QUERIES": tiles.queries, "KEYS": tiles.keys, "STAGES": tiles.stages, "CAUSAL": is_causal,
        "PRECISION": "tf32" if _tf32() else "ieee", "num_warps": tiles.warps, "maxnreg": tiles.registers,
    }  # fmt: skip


def _tf32() -> bool:
    """Whether TF32 is asked for; `torch.set_float32_matmul_precision` sets this too."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


#: Tiles that did not fit on a device: (device, kernel, ...).
_too_large: set[tuple[Any, ...]] = set()


def tiles_for(kernel: str, d: int, dtype: torch.dtype) -> Sequence[Tiles]:
    """The tiles of a kernel ("forward", "dkdv" or "dq"), the best first; later ones need less shared memory."""
    if dtype == torch.float32:
        return SMALL_TILES if _tf32() else FLOAT32_TILES
    return (TILES[kernel, d], *SMALL_TILES)


def _run(kernel: str, launch: Callable[..., None], Q: Tensor, K: Tensor, *arguments: Any) -> None:
    """Launch with the best tiles that fit into the device's shared memory.

    What has not fitted once is remembered, with everything that the kernel is compiled for: so no call's tiles
    depend on the calls before it.
    """
    *_, is_causal, _ = arguments
    candidates = tiles_for(kernel, _width(Q), Q.dtype)
    with torch.cuda.device_of(Q):
        for tiles in candidates:
            key = (Q.device, kernel, _width(Q), Q.dtype, _tf32(), is_causal, Q.shape[1] // K.shape[1], tiles)
            if key in _too_large:
                continue
            try:
                return launch(tiles, Q, K, *arguments)
            except OutOfResources:
                _too_large.add(key)
        raise RuntimeError(f"none of the tiles {candidates} fits on {Q.device}")
