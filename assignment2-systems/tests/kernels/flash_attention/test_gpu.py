"""The Triton kernels on a GPU: accuracy against float64 and PyTorch's FlashAttention-2, memory, compilation, training.

The yardstick for half precision is PyTorch's kernel: an implementation that rounds where it need not has more than
its error.
"""

import os
import random
import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from cs336_basics.model import BasicsTransformerLM, ModelConfig
from cs336_basics.nn_utils import cross_entropy
from cs336_systems.kernels.flash_attention import FlashAttentionTriton, flash_attention
from tests.reference_attention import (
    assert_errors_within,
    expected_results,
    plain_attention,
    random_inputs,
    relative_error,
    relative_errors,
    results,
)

pytestmark = pytest.mark.gpu

RANDOM_CASES = int(os.environ.get("CS336_RANDOM_CASES", "200"))
WIDTHS = [16, 32, 64, 128]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALVES]
LENGTHS = [(1, 1), (17, 17), (128, 128), (1000, 1000), (2048, 2048), (1, 1000), (1000, 1), (17, 300), (1000, 333)]
#: Of the results, relative to float64, where there is no other kernel to compare with. The L of every dtype
#: keeps to float32's.
BOUND = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}

attend = FlashAttentionTriton.apply


def gpu_inputs(shape, n_keys, dtype, seed=0):
    return random_inputs(shape, n_keys, dtype=dtype, device="cuda", seed=seed)


def shape_of(n_queries, n_keys, d):
    """Enough heads that an error is an average of some thousand entries, not an accident."""
    return (2, 4 if n_queries * n_keys > 10_000 else 64, n_queries, d)


def torch_flash_results(Q, K, V, dO, is_causal):
    """What PyTorch's FlashAttention-2 gives; without L. Gradients are float64 sums of those of its calls.

    It has no causal mask for n_queries ≠ n_keys: there the first queries see a square, the others see all keys.
    """
    square = min(Q.shape[-2], K.shape[-2])
    if is_causal:
        spans = [(slice(0, square), slice(0, square), True), (slice(square, None), slice(None), False)]
    else:
        spans = [(slice(None), slice(None), False)]
    O, dQ, dK, dV = (torch.zeros_like(tensor, dtype=torch.float64) for tensor in (Q, Q, K, V))
    for queries, keys, causal in spans:
        if not Q[..., queries, :].numel():
            continue
        leaves = [
            tensor[..., span, :].contiguous().requires_grad_()
            for tensor, span in ((Q.detach(), queries), (K.detach(), keys), (V.detach(), keys))
        ]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            part = scaled_dot_product_attention(*leaves, is_causal=causal)
        gradients = torch.autograd.grad(part, leaves, dO[..., queries, :].contiguous())
        O[..., queries, :] = part.double()
        dQ[..., queries, :] = gradients[0].double()
        dK[..., keys, :] += gradients[1].double()
        dV[..., keys, :] += gradients[2].double()
    return {"O": O, "dQ": dQ, "dK": dK, "dV": dV}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("d", WIDTHS)
def test_float32_equals_the_formula(d, lengths, is_causal):
    inputs = gpu_inputs(shape_of(*lengths, d), lengths[1], torch.float32)
    ours, expected = results(attend, *inputs, is_causal), expected_results(*inputs, is_causal)
    # With a single key dK is 0, and what comes out the rounding of a thousand terms.
    bound = 2e-5 if lengths == (1000, 1) else 1e-5
    assert_errors_within({"dK": ours["dK"]}, {"dK": expected.pop("dK")}, bound)
    assert_errors_within(ours, expected, 1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("d", WIDTHS)
def test_half_precision_is_as_exact_as_torch(d, dtype, lengths, is_causal):
    inputs = gpu_inputs(shape_of(*lengths, d), lengths[1], dtype)
    expected = expected_results(*inputs, is_causal)
    ours = relative_errors(results(attend, *inputs, is_causal), expected)
    assert ours.pop("L") <= 1e-5
    without_l = {name: value for name, value in expected.items() if name != "L"}
    theirs = relative_errors(torch_flash_results(*inputs, is_causal), without_l)
    # The constant is for results that are exact but for float32's rounding, as a gradient of 0 is.
    worse = {name: (ours[name], theirs[name]) for name in ours if ours[name] > 1.1 * theirs[name] + 1e-5}
    assert not worse, f"relative errors, ours and PyTorch's: {worse}"


@pytest.mark.parametrize("seed", range(RANDOM_CASES))
def test_random_shapes(seed):
    rng = random.Random(seed)
    d, dtype, is_causal = rng.choice(WIDTHS), rng.choice(DTYPES), rng.random() < 0.5
    leading = [(), (rng.randint(1, 5),), (rng.randint(1, 3), rng.randint(1, 5))][rng.randrange(3)]
    n_queries = rng.randint(1, 700)
    n_keys = n_queries if rng.random() < 0.3 else rng.randint(1, 700)
    inputs = gpu_inputs((*leading, n_queries, d), n_keys, dtype, seed)
    inputs = [layout(tensor, rng.choice(["contiguous", "transposed", "sliced"])) for tensor in inputs]
    ours, expected = results(attend, *inputs, is_causal), expected_results(*inputs, is_causal)
    assert_errors_within(ours, expected, BOUND[dtype])
    assert_errors_within({"L": ours["L"]}, {"L": expected["L"]}, 1e-5)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [2, 3, 8])
def test_grouped_queries_share_a_key_head(group, dtype, is_causal):
    Q, _, _, dO = gpu_inputs((2, 2 * group, 200, 64), 1, dtype, seed=0)
    _, K, V, _ = gpu_inputs((2, 2, 1, 64), 300, dtype, seed=1)
    ours = [tensor.detach().requires_grad_() for tensor in (Q, K, V)]
    theirs = [tensor.detach().double().requires_grad_() for tensor in (Q, K, V)]
    O = flash_attention(*ours, is_causal=is_causal)
    repeated = [tensor.repeat_interleave(group, dim=1) for tensor in theirs[1:]]
    expected, _ = plain_attention(theirs[0], *repeated, is_causal)
    gradients = torch.autograd.grad(O, ours, dO)
    expected_gradients = torch.autograd.grad(expected, theirs, dO.double())
    for result, reference in zip((O, *gradients), (expected, *expected_gradients)):
        assert relative_error(result, reference) <= BOUND[dtype]


def layout(tensor, kind):
    """The same numbers at other addresses."""
    if kind == "transposed" and tensor.dim() > 2:
        return tensor.transpose(0, -2).contiguous().transpose(0, -2)
    if kind == "transposed":
        return tensor.mT.contiguous().mT
    if kind == "sliced":  # as a chunk of a joint projection of queries, keys and values
        return torch.cat([torch.full_like(tensor, torch.nan), tensor, tensor], dim=-1).chunk(3, dim=-1)[1]
    return tensor


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [64, 128])
def test_huge_scores(d, dtype, is_causal):
    Q, K, V, dO = gpu_inputs((2, 300, d), 300, dtype)
    Q, K = 100 * Q, 100 * K
    ours = results(attend, Q, K, V, dO, is_causal)
    assert ours["L"].max() > 1e4
    expected = expected_results(Q, K, V, dO, is_causal)
    # Finite, which this checks first. Scores of 10⁴ have an error of 10⁻³ in float32, and so have probabilities.
    assert_errors_within({"O": ours["O"]}, {"O": expected["O"]}, 1e-2)
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [(1, 1), (17, 1000), (1000, 17), (333, 333), (1, 0), (17, 0), (0, 17)])
def test_nothing_is_left_unwritten(lengths, dtype, is_causal, poison_new_tensors):
    """Nor read before it is written: keys that no query sees get a gradient of 0."""
    inputs = gpu_inputs((2, 3, lengths[0], 64), lengths[1], dtype)
    expected = results(attend, *inputs, is_causal)
    poison_new_tensors()
    ours = results(attend, *inputs, is_causal)
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    assert all(torch.isfinite(tensor).all() for name, tensor in ours.items() if name != "L")
    assert not is_causal or not ours["dK"][..., lengths[0] :, :].any()
    assert torch.isfinite(ours["L"]).all() or lengths[1] == 0


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(100, 64), (1000, 128), (4096, 64), (1000, 20)])
def test_repeating_gives_the_same_bits(n, d, dtype, is_causal):
    inputs = gpu_inputs((2, 4, n, d), n, dtype)
    first = results(attend, *inputs, is_causal)
    for _ in range(2):
        again = results(attend, *inputs, is_causal)
        assert all(torch.equal(again[name], first[name]) for name in first)


def extra_memory(n):
    """Bytes that a forward and backward pass of length `n` needs beside its inputs, at its peak."""
    leaves = [tensor.requires_grad_() for tensor in gpu_inputs((1, n, 64), n, torch.bfloat16)[:3]]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend(*leaves, True).sum().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_memory_grows_with_the_length_not_its_square():
    extra_memory(1024)  # what is allocated once, such as workspaces, is not what is measured
    half, full = extra_memory(32_768), extra_memory(65_536)
    assert full < 1e9
    assert full / half < 2.2


def test_compiled_equals_eager():
    """In a process of its own: here the package's functions are wrapped in type checks, which break the graph."""
    program = """
import torch
from cs336_systems.kernels.flash_attention import FlashAttentionTriton

for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
    for is_causal in (False, True):
        torch.compiler.reset()  # or so many variants would reach the limit of recompilations
        compiled = torch.compile(FlashAttentionTriton.apply, fullgraph=True)
        for shape in ((4, 256, 64), (2, 3, 100, 64)):
            inputs = [torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True) for _ in range(3)]
            arguments = (*inputs, True) if is_causal else inputs
            O, expected = compiled(*arguments), FlashAttentionTriton.apply(*arguments)
            dO = torch.randn_like(O)
            ours = (O, *torch.autograd.grad(O, inputs, dO))
            theirs = (expected, *torch.autograd.grad(expected, inputs, dO))
            for one, other in zip(ours, theirs):
                assert (one - other).norm() <= tolerance * other.norm(), (dtype, is_causal, shape)

# As the leaderboard times it, with the gradient of a sum, which has strides of 0.
torch.compiler.reset()
q, k, v = torch.randn(3, 16, 1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
torch.compile(FlashAttentionTriton.apply)(*leaves, True).sum().backward()
assert all(leaf.grad.isfinite().all() for leaf in leaves)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def test_tf32_on_request_only():
    inputs = gpu_inputs((2, 4, 300, 64), 300, torch.float32)
    expected = expected_results(*inputs, True)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high")
        errors = relative_errors(results(attend, *inputs, True), expected)
    finally:
        torch.set_float32_matmul_precision(before)
    assert 1e-5 < errors["O"] < 3e-3  # it is TF32
    assert max(errors.values()) < 5e-3
    assert_errors_within(results(attend, *inputs, True), expected, 1e-5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("d", [1, 20, 80, 100])
def test_widths_between(d, dtype):
    inputs = gpu_inputs((2, 4, 300, d), 300, dtype)
    assert_errors_within(results(attend, *inputs, True), expected_results(*inputs, True), BOUND[dtype])


def test_cuda_graph():
    q, k, v, dO = gpu_inputs((2, 4, 300, 64), 300, torch.bfloat16)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compiled before the capture
        torch.autograd.grad(attend(*leaves, True), leaves, dO)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = torch.autograd.grad(attend(*leaves, True), leaves, dO)
    with torch.no_grad():
        q.copy_(q.flip(2))
    graph.replay()
    expected = torch.autograd.grad(attend(*leaves, True), leaves, dO)
    assert all(torch.equal(one, other) for one, other in zip(gradients, expected))


class RecordCalls(TorchDispatchMode):
    """Remembers the calls of this package's own operators. Their gradients are `FlashAttentionTriton`'s business."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if getattr(function, "namespace", "") == "cs336_systems":
            detached = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
            self.calls.append((function, *detached))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_causal", [False, True])
def test_operators_are_registered_as_torch_wants_them(is_causal):
    """Schema, fake tensors and tracing of whatever a forward and backward pass calls."""
    inputs = gpu_inputs((2, 100, 32), 70, torch.float16)
    with RecordCalls() as recorder:
        results(attend, *inputs, is_causal)
    assert len(recorder.calls) == 2
    for function, args, kwargs in recorder.calls:
        torch.library.opcheck(function, args, kwargs)


def loss_curve(causal_attention, autocast_dtype):
    """60 steps of a small model on rows x[t + 1] = x[t] + step (mod 61), one of 8 steps a row: it must look back."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=61, context_length=128, d_model=128, num_layers=2, num_heads=4, d_ff=256)
    model = BasicsTransformerLM.from_config(config, causal_attention=causal_attention, device="cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rng = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        start, step = (torch.randint(high, (16, 1), generator=rng) for high in (61, 8))
        rows = ((start + step * torch.arange(102)) % 61).cuda()  # 101 tokens in, which is no multiple of a tile
        with torch.autocast("cuda", dtype=autocast_dtype, enabled=autocast_dtype is not None):
            loss = cross_entropy(model(rows[:, :-1]), rows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).float().cpu()


@pytest.mark.parametrize(("autocast_dtype", "bound"), [(None, 1e-3), (torch.bfloat16, 0.05)])
def test_training_follows_plain_attention(autocast_dtype, bound):
    plain, flash = loss_curve(None, autocast_dtype), loss_curve(flash_attention, autocast_dtype)
    assert plain[-1] < plain[0] / 2  # there was something to learn
    assert (flash - plain).abs().max() < bound
