"""The head of a language model and its loss in one operator, which never holds all logits at the same time.

    loss = mean over tokens of -log softmax(h Wᵀ)[target]        dlogits = (softmax(h Wᵀ) - onehot(target)) / tokens

For 32 768 tokens and a vocabulary of 50 257 the logits alone take 3.3 GB in bfloat16, and their float32 copies several
times that. Here the tokens are processed in chunks. A chunk's logits come from one matmul and are turned, in place,
into the gradient of the loss, from which two more matmuls compute the chunk's share of the gradients of `hidden` and
`weight`. All of this happens in the forward pass: the backward pass only multiplies by the incoming gradient, and no
matmul is computed twice.

Sources: the idea is that of Liger-Kernel (Hsu et al. 2024, section 3.2, "FusedLinearCrossEntropy"). Wijmans et al. 2024
("Cut your losses in large-vocabulary language models") go further and keep even a chunk's logits on chip, at the price
of computing them twice.
"""

# The arguments of kernels and autograd's contexts have no informative types.
# ruff: noqa: ANN001, ANN202

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from cs336_basics.nn_utils import cross_entropy
from cs336_systems.kernels.triton_support import check_device

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)

#: A chunk has about this many logits (256 MiB in bfloat16) ...
CHUNK_LOGITS = 2**27
#: ... but at least this many tokens: each chunk reads and writes the full gradient of `weight`, which only enough
#: arithmetic in its matmul can hide.
CHUNK_TOKENS_AT_LEAST = 2048


def linear_cross_entropy_reference(
    hidden: Float[Tensor, "*batch d_model"], weight: Float[Tensor, "vocab d_model"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """Compute the loss in plain PyTorch, with all logits: `cross_entropy(hidden @ weight.T, targets)`."""
    return cross_entropy(hidden @ weight.T, targets)


def linear_cross_entropy(
    hidden: Float[Tensor, "*batch d_model"],
    weight: Float[Tensor, "vocab d_model"],
    targets: Int[Tensor, "*batch"],
    chunk_tokens: int | None = None,
) -> Float[Tensor, ""]:
    """Compute the mean of -log softmax(hidden @ weight.T)[target] over all tokens, in nats, in float32.

    Under autocast `hidden` and `weight` are cast to its dtype, as in a linear layer; their gradients have the dtypes of
    `hidden` and `weight`. There are no second derivatives. A target that is not in [0, vocab) makes the loss NaN, since
    checking the targets would make the host wait for the GPU.

    Args:
        hidden: hidden states after the final norm.
        weight: weight of the head, one row per token id.
        targets: token ids.
        chunk_tokens: tokens whose logits exist at a time; default `default_chunk_tokens(vocab)`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or the tensors are where Triton cannot run.
    """
    _check_inputs(hidden, weight, targets, chunk_tokens)
    device_type = hidden.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
    gradients = torch.is_grad_enabled()
    loss, _, _ = _loss_and_gradients(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        targets.reshape(-1),
        chunk_tokens or default_chunk_tokens(weight.shape[0]),
        dtype,
        gradients and hidden.requires_grad,
        gradients and weight.requires_grad,
    )
    return loss


def default_chunk_tokens(vocab: int) -> int:
    """Return about `CHUNK_LOGITS` / vocab, at least `CHUNK_TOKENS_AT_LEAST`, and a multiple of 128."""
    return max(CHUNK_LOGITS // vocab, CHUNK_TOKENS_AT_LEAST) // 128 * 128


def _check_inputs(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None) -> None:
    # Plain `Tensor`s: this function is the check.
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1] or not weight.numel():
        raise ValueError(
            f"hidden is {tuple(hidden.shape)} and weight {tuple(weight.shape)}, but must be [... d_model] and "
            "[vocab d_model] with d_model and vocab of at least 1"
        )
    if hidden.shape[:-1] != targets.shape or targets.dtype not in _TARGET_DTYPES:
        raise ValueError(
            f"targets are {tuple(targets.shape)} of {targets.dtype}, but must be one token id for each of "
            f"{tuple(hidden.shape[:-1])}"
        )
    if hidden.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}, but the kernel computes in float32, float16 or "
            "bfloat16: cast them with .to(), or call linear_cross_entropy_reference"
        )
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        raise ValueError(
            f"hidden is {hidden.dtype} and weight {weight.dtype}: cast one of them with .to(), or use torch.autocast"
        )
    if not hidden.device == weight.device == targets.device:
        raise ValueError(
            f"hidden, weight and targets are on {hidden.device}, {weight.device} and {targets.device}: "
            "move them to one device with .to()"
        )
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, but must be at least 1")
    check_device(hidden, "the tensors are", "move them to a GPU, call linear_cross_entropy_reference")


@torch.library.custom_op("cs336_systems::linear_cross_entropy", mutates_args=())
def _loss_and_gradients(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, dtype: torch.dtype,
    hidden_gradient: bool, weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the loss and, if requested, its gradients, otherwise empty tensors.

    Args:
        hidden: [tokens d_model].
        weight: [vocab d_model].
        targets: [tokens].
        chunk_tokens: tokens whose logits exist at a time.
        dtype: of the logits and the operands of the matmuls.
        hidden_gradient: compute the gradient of the *sum* of the losses by `hidden`, [tokens d_model] in `dtype`: with
            the mean's factor 1/tokens, float16 would lose its small entries.
        weight_gradient: compute the gradient of the mean by `weight`, [vocab d_model] in float32.
    """
    tokens, d_model = hidden.shape
    vocab = weight.shape[0]
    # Matmuls and vector loads are fast only if rows begin at multiples of 16 bytes: 50 257 is rounded up with rows of
    # zeros, which the kernel leaves out of the softmax.
    width = vocab if vocab % 16 == 0 else triton.cdiv(vocab, 64) * 64
    loss, d_hidden, d_weight = _outputs(hidden, weight, width, dtype, hidden_gradient, weight_gradient)
    if tokens == 0:
        return loss.fill_(torch.nan), d_hidden, d_weight[:vocab].zero_()

    matrix = weight.to(dtype)
    if width != vocab:
        matrix = weight.new_zeros(width, d_model, dtype=dtype)
        matrix[:vocab] = weight
    losses = torch.empty(tokens, device=hidden.device)
    chunk = triton.cdiv(tokens, triton.cdiv(tokens, chunk_tokens))  # chunks of one size
    chunk = min(chunk_tokens, triton.cdiv(chunk, 128) * 128)
    buffer = torch.empty(min(chunk, tokens), width, device=hidden.device, dtype=dtype)
    block = min(triton.next_power_of_2(width), 8192)
    with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            hidden_chunk = hidden[part].to(dtype)
            logits = buffer[: len(hidden_chunk)]
            torch.mm(hidden_chunk, matrix.T, out=logits)
            _cross_entropy_kernel[(len(logits),)](
                logits, targets[part].contiguous(), losses[part], vocab, width,
                GRADIENT=hidden_gradient or weight_gradient, BLOCK=block, num_warps=max(4, block // 512),
            )  # fmt: skip
            if hidden_gradient:
                torch.mm(logits, matrix, out=d_hidden[part])
            if weight_gradient:
                _accumulate(d_weight, logits, hidden_chunk, beta=float(start > 0), alpha=1 / tokens)
    torch.mean(losses, 0, out=loss)
    return loss, d_hidden, d_weight[:vocab] if weight_gradient else d_weight


@no_type_check  # torch.compile calls it with a symbolic `width`, which is not an `int` to the checker of the tests
def _outputs(
    hidden: Tensor, weight: Tensor, width: int, dtype: torch.dtype, hidden_gradient: bool, weight_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    float32 = {"device": hidden.device, "dtype": torch.float32}
    return (
        torch.empty((), **float32),
        torch.empty(hidden.shape if hidden_gradient else 0, device=hidden.device, dtype=dtype),
        torch.empty((width, weight.shape[1]) if weight_gradient else 0, **float32),
    )


def _accumulate(total: Tensor, d_logits: Tensor, hidden: Tensor, beta: float, alpha: float) -> None:
    """Set total to beta · total + alpha · d_logitsᵀ hidden, summed in float32 for any dtype of the factors."""
    if d_logits.dtype == total.dtype or not total.is_cuda:
        total.addmm_(d_logits.T.to(total.dtype), hidden.to(total.dtype), beta=beta, alpha=alpha)
    else:
        torch.addmm(total, d_logits.T, hidden, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)


@_loss_and_gradients.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, dtype: torch.dtype,
    hidden_gradient: bool, weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _outputs(hidden, weight, weight.shape[0], dtype, hidden_gradient, weight_gradient)


@no_type_check
def _setup_context(ctx, inputs, output) -> None:
    hidden, weight, *_, ctx.hidden_gradient, ctx.weight_gradient = inputs
    _, d_hidden, d_weight = output
    ctx.tokens, ctx.dtypes = hidden.shape[0], (hidden.dtype, weight.dtype)
    ctx.save_for_backward(d_hidden, d_weight)
    ctx.mark_non_differentiable(d_hidden, d_weight)
    ctx.set_materialize_grads(False)  # otherwise zeros of the size of `weight` would stand for gradients of gradients


@no_type_check
def _backward(ctx, d_loss, _d_hidden, _d_weight):
    if torch.is_grad_enabled():
        raise RuntimeError("linear_cross_entropy has no second derivatives: leave out create_graph=True")
    if d_loss is None:
        return (None,) * 7
    d_hidden, d_weight = ctx.saved_tensors
    hidden_dtype, weight_dtype = ctx.dtypes
    return (
        # In half precision the factor would be rounded, and with it all entries in the same direction.
        (d_hidden.float() * (d_loss / ctx.tokens)).to(hidden_dtype) if ctx.hidden_gradient else None,
        (d_weight * d_loss).to(weight_dtype) if ctx.weight_gradient else None,
        *(None,) * 5,
    )


_loss_and_gradients.register_autograd(_backward, setup_context=_setup_context)


@triton.jit
@no_type_check  # the shape checker of the tests wraps functions, and Triton needs the function itself
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, vocab, width, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute one token's loss, and replace its logits by softmax(logits) - onehot(target).

    A row has `width` columns in memory. Columns from `vocab` on are padding; they are ignored and become 0. Masks
    compare with `width`, a multiple of 16, so that they do not split vector loads.
    """
    token = tl.program_id(0).to(tl.int64)
    logits_ptr += token * width
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets_ptr + token)
    known = (target >= 0) & (target < vocab)
    # Read this before other threads of this program overwrite it.
    target_logit = tl.load(logits_ptr + target, mask=known, other=0.0).to(tl.float32)

    # Milakov & Gimelshein 2018: the sum is rescaled when the maximum grows.
    maximum = -float("inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        logits = tl.load(logits_ptr + start + columns, mask=start + columns < width, other=0.0).to(tl.float32)
        logits = tl.where(start + columns < vocab, logits, -float("inf"))
        larger = tl.maximum(maximum, tl.max(logits, 0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(logits - larger), 0)
        maximum = larger
    total = tl.where(known, total, float("nan"))
    tl.store(losses_ptr + token, (maximum - target_logit) + tl.log(total))

    if GRADIENT:
        for start in range(0, width, BLOCK):
            inside = start + columns < width
            logits = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
            logits = tl.where(start + columns < vocab, logits, -float("inf"))
            gradient = tl.exp(logits - maximum) / total - tl.where(start + columns == target, 1.0, 0.0)
            tl.store(logits_ptr + start + columns, gradient.to(logits_ptr.dtype.element_ty), mask=inside)
