"""AdamW as one Triton kernel over all parameters at once.

    m ← β₁ m + (1 - β₁) g        v ← β₂ v + (1 - β₂) g²        θ ← decay · (θ - step_size · m / (√v + ε))

An update reads a parameter, its gradient and two moments, and writes three of them back: seven passes over memory, and
hardly any arithmetic. Written with one PyTorch operator per line it takes about twenty passes, and with one kernel per
parameter it takes hundreds of launches, most of them too small to fill a GPU. So one kernel gets a table with the
addresses of all tensors (as `multi_tensor_apply` in NVIDIA's Apex and PyTorch's `fused=True` do).

Source: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization"; the formula is that of Assignment 1's AdamW.
"""

# The arguments of kernels and autograd's contexts have no informative types.
# ruff: noqa: ANN001, ANN202

import functools
import math
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from cs336_basics.optimizer import AdamW
from cs336_systems.kernels.triton_support import check_device

_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
#: Elements that one program of the kernel updates.
BLOCK = 2048
#: int64 entries of each tensor in the kernel's table.
_ADDRESSES_AND_SIZE = 5


class FusedAdamW(AdamW):
    """`cs336_basics.optimizer.AdamW`, its reference, in one kernel: same arguments, same update, same state.

    State dicts can be exchanged between the two. Arithmetic is in float32. Moments of half-precision parameters have
    the parameters' dtype in both; the kernel rounds once per update, Assignment 1's AdamW after each line. Parameters
    with different numbers of steps, because some had no gradient before, take one launch for each number. Nothing waits
    for the GPU.

    Raises (in `step`):
        ValueError: a tensor is on a device where Triton cannot run, is not contiguous, or is neither float32,
            float16 nor bfloat16.
    """

    def _step_group(self, parameters: list[Tensor], group: dict) -> None:
        lr, (beta1, beta2), eps, weight_decay = group["lr"], group["betas"], group["eps"], group["weight_decay"]
        launches: dict[tuple, tuple[list[Tensor], ...]] = {}
        for parameter in parameters:  # check all of them before any state changes
            _check_parameter(parameter)
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state |= {"t": 0, "m": torch.zeros_like(parameter), "v": torch.zeros_like(parameter)}
            state["t"] += 1
            for name in ("m", "v"):  # a loaded state may have other strides
                state[name] = state[name].contiguous()
            tensors_of_launch = launches.setdefault((parameter.device, parameter.dtype, state["t"]), ([], [], [], []))
            for tensors, tensor in zip(tensors_of_launch, (parameter, parameter.grad, state["m"], state["v"])):
                tensors.append(tensor)
        for (_, _, t), lists in launches.items():
            step_size = lr * math.sqrt(1 - beta2**t) / (1 - beta1**t)
            adamw_step(*lists, step_size, beta1, beta2, eps, decay=1 - lr * weight_decay)


def _check_parameter(parameter: Tensor) -> None:
    remedy = "use cs336_basics.optimizer.AdamW"
    if parameter.dtype not in _DTYPES:
        raise ValueError(
            f"a parameter is {parameter.dtype}, but the kernel supports {', '.join(map(str, _DTYPES))}: {remedy}"
        )
    if not parameter.is_contiguous():
        raise ValueError(
            f"a parameter of shape {tuple(parameter.shape)} has strides {parameter.stride()}, but must be "
            f"contiguous: {remedy}"
        )
    gradient = parameter.grad
    if gradient is not None and (gradient.dtype != parameter.dtype or gradient.is_sparse):
        raise ValueError(
            f"a parameter is {parameter.dtype}, its gradient {gradient.dtype} and {gradient.layout}, but both must be "
            f"dense and of one dtype: {remedy}"
        )
    check_device(parameter, "a parameter is", remedy)


@torch.library.custom_op("cs336_systems::adamw_step", mutates_args=("parameters", "first_moments", "second_moments"))
def adamw_step(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first_moments: list[Tensor],
    second_moments: list[Tensor],
    step_size: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> None:
    """Update tensors of one dtype on one device in place, all with one launch.

    Parameters, first moments (m) and second moments (v) must be contiguous; other gradients are copied first.
    """
    gradients = [gradient.contiguous() for gradient in gradients]
    device = parameters[0].device
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    sizes = tuple(parameter.numel() for parameter in parameters)
    addresses = tuple(
        tensor.data_ptr() for tensors in (parameters, gradients, first_moments, second_moments) for tensor in tensors
    )
    table, aligned = _table(addresses, sizes, device, stream)
    blocks = _blocks(sizes, device, stream)
    if not len(blocks):
        return
    with torch.cuda.device_of(parameters[0]):
        _adamw_kernel[(len(blocks),)](
            table, blocks, float(step_size), float(decay),
            1 - beta1, float(beta2), 1 - beta2, float(eps),  # not in the kernel, where float32 would lose four digits
            DTYPE=_DTYPES[parameters[0].dtype], ALIGNED=aligned, BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip


@adamw_step.register_fake
def _(*arguments: object) -> None:
    return None


# Both caches are used at every step. Gradients get new addresses when `zero_grad` drops them, but the allocator soon
# hands out the same ones again. An entry of another stream may still be in transit, so the stream is a key.
@functools.lru_cache(maxsize=64)
def _table(
    addresses: tuple[int, ...], sizes: tuple[int, ...], device: torch.device, stream: int
) -> tuple[Tensor, bool]:
    """Return [tensor, (θ, g, m, v, number of elements)], addresses in bytes, and whether vector loads are possible."""
    columns = torch.tensor([*addresses, *sizes], dtype=torch.int64, device="cpu").view(_ADDRESSES_AND_SIZE, -1)
    return _to(columns.T.contiguous(), device), all(address % 16 == 0 for address in addresses)


@functools.lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    """Return [program, (tensor, block of that tensor)]."""
    counts = [triton.cdiv(size, BLOCK) for size in sizes]
    block = torch.cat([torch.arange(count, device="cpu") for count in counts])
    tensor = torch.repeat_interleave(torch.tensor(counts, device="cpu"))
    return _to(torch.stack([tensor, block], dim=1).int(), device)


def _to(table: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting. The allocator does not reuse pinned memory until copies from it are done."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@triton.jit
@no_type_check  # the shape checker of the tests wraps functions, and Triton needs the function itself
def _adamw_kernel(
    table_ptr, blocks_ptr, step_size, decay, weight1, beta2, weight2, eps,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Update one block of one tensor; `weight1` and `weight2` are 1 - β₁ and 1 - β₂."""
    program = tl.program_id(0)
    row_ptr = table_ptr + 5 * tl.load(blocks_ptr + 2 * program)
    start = tl.load(blocks_ptr + 2 * program + 1).to(tl.int64) * BLOCK
    theta = _pointers(row_ptr, start, DTYPE, ALIGNED, BLOCK)
    g = _pointers(row_ptr + 1, start, DTYPE, ALIGNED, BLOCK)
    m = _pointers(row_ptr + 2, start, DTYPE, ALIGNED, BLOCK)
    v = _pointers(row_ptr + 3, start, DTYPE, ALIGNED, BLOCK)
    left = tl.load(row_ptr + 4) - start
    # A mask of unknown length would split vector loads, and only the last block of a tensor needs one.
    if left >= BLOCK:
        _update(theta, g, m, v, left, step_size, decay, weight1, beta2, weight2, eps, False, BLOCK)
    else:
        _update(theta, g, m, v, left, step_size, decay, weight1, beta2, weight2, eps, True, BLOCK)


@triton.jit
@no_type_check
def _pointers(entry_ptr, start, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """Return pointers to the block that begins `start` elements after the address in the table."""
    pointers = tl.load(entry_ptr).to(tl.pointer_type(DTYPE)) + start + tl.arange(0, BLOCK)
    if ALIGNED:  # in bytes; the compiler cannot know this about an address that is read from memory
        pointers = tl.multiple_of(pointers, 16)
    return pointers


@triton.jit
@no_type_check
def _update(
    theta_ptrs, g_ptrs, m_ptrs, v_ptrs, left, step_size, decay, weight1, beta2, weight2, eps,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    mask = None
    if MASKED:
        mask = tl.arange(0, BLOCK) < left
    theta = tl.load(theta_ptrs, mask=mask).to(tl.float32)
    g = tl.load(g_ptrs, mask=mask).to(tl.float32)
    m = tl.load(m_ptrs, mask=mask).to(tl.float32)
    v = tl.load(v_ptrs, mask=mask).to(tl.float32)
    m += weight1 * (g - m)
    v = beta2 * v + weight2 * g * g
    theta = (theta - step_size * tl.div_rn(m, tl.sqrt_rn(v) + eps)) * decay
    tl.store(theta_ptrs, theta.to(theta_ptrs.dtype.element_ty), mask=mask)
    tl.store(m_ptrs, m.to(m_ptrs.dtype.element_ty), mask=mask)
    tl.store(v_ptrs, v.to(v_ptrs.dtype.element_ty), mask=mask)
