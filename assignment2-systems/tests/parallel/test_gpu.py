"""Data parallelism on GPUs: over NCCL in one process and, where there are two GPUs, in two; over gloo in two on one."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from cs336_basics.model import BasicsTransformerLM, Embedding, Linear, TransformerBlock
from cs336_basics.nn_utils import clip_gradient, cross_entropy
from cs336_basics.optimizer import AdamW
from cs336_systems.parallel import (
    FSDP,
    BucketedDataParallel,
    FlatDataParallel,
    NaiveDataParallel,
    OverlappedDataParallel,
    ShardedOptimizer,
)
from cs336_systems.parallel.process_group import run_on_ranks

pytestmark = pytest.mark.gpu
BLOCKS = (TransformerBlock, Linear, Embedding)
WRAPPERS = {
    "naive": NaiveDataParallel,
    "flat": FlatDataParallel,
    "overlapped": OverlappedDataParallel,
    "bucketed": lambda module: BucketedDataParallel(module, 0.05),
    "FSDP": FSDP,
    "FSDP of blocks": lambda module: FSDP(module, unit_classes=BLOCKS),
}


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory):
    if not torch.cuda.is_available():
        yield
        return
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield
    dist.destroy_process_group()


def language_model(layers=3):
    torch.manual_seed(0)
    return BasicsTransformerLM(101, 32, 64, layers, 4, 128, device="cuda")


def batches(steps=4):
    torch.manual_seed(1)
    ids = torch.randint(101, (steps, 4, 33), device="cuda")
    return list(zip(ids[..., :-1], ids[..., 1:]))


def trained(model, optimizer, finish=lambda: None, clip=None):
    for inputs, targets in batches():
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        finish()
        if clip:
            clip(0.5)
        optimizer.step()


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("optimizer_class", [AdamW, torch.optim.AdamW])
def test_training_is_that_without_it(wrap, optimizer_class):
    alone = language_model()
    trained(
        alone, optimizer_class(alone.parameters(), lr=1e-2), clip=lambda norm: clip_gradient(alone.parameters(), norm)
    )
    model = wrap(language_model())
    optimizer = optimizer_class(model.parameters(), lr=1e-2)
    trained(model, optimizer, model.finish_gradient_synchronization, model.clip_gradient)
    parameters = model.gather_full_params() if isinstance(model, FSDP) else dict(model.module.named_parameters())
    for name, expected in alone.named_parameters():
        torch.testing.assert_close(parameters[name], expected, rtol=1e-5, atol=1e-6)


def test_sharded_optimizer_around_the_fused_one():
    from cs336_systems.kernels.adamw import FusedAdamW

    alone, model = language_model(), language_model()
    trained(alone, AdamW(alone.parameters(), lr=1e-2))
    trained(model, ShardedOptimizer(model.parameters(), FusedAdamW, lr=1e-2))
    for ours, expected in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def gradients(model, compute_dtype=None, wrap=True):
    inputs, targets = batches(1)[0]
    wrapped = FSDP(model, compute_dtype, BLOCKS) if wrap else model
    cross_entropy(wrapped(inputs), targets).backward()
    if not wrap:
        return {name: p.grad for name, p in model.named_parameters()}
    wrapped.finish_gradient_synchronization()
    ranges = wrapped.shard_ranges()
    return {name: p.grad.view(ranges[name].shape) if name in ranges else p.grad for name, p in model.named_parameters()}


class Checkpointed(nn.Module):
    """Recomputes a block in the backward pass: its weights have to be gathered for that."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args):
        return checkpoint(self.block, *args, use_reentrant=False)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_fsdp_with_compiled_and_checkpointed_blocks(compiled, checkpointed):
    expected = gradients(language_model(), wrap=False)
    model = language_model()
    for number, block in enumerate(model.layers):
        if compiled:
            block.forward = torch.compile(block.forward)
        if checkpointed:
            model.layers[number] = Checkpointed(block)
    actual = gradients(model)
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, expected[name.replace(".block", "")], rtol=1e-4, atol=1e-6)


def test_fsdp_in_bfloat16_is_as_exact_as_a_bfloat16_model():
    exact = gradients(language_model(), wrap=False)
    half = {name: g.float() for name, g in gradients(language_model().bfloat16(), wrap=False).items()}
    ours = gradients(language_model(), torch.bfloat16)
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        error = (gradient - exact[name]).norm() / exact[name].norm()
        usual = (half[name] - exact[name]).norm() / exact[name].norm()
        assert error < 1.5 * usual + 1e-3, name


def test_whole_weights_are_there_only_while_they_are_used():
    torch.manual_seed(0)
    model = BasicsTransformerLM(100, 32, 512, 16, 8, 2048, device="cuda")
    block_bytes = 2 * sum(p.numel() for p in model.layers[0].parameters())
    wrapped = FSDP(model, torch.bfloat16, BLOCKS)
    inputs = torch.randint(100, (1, 32), device="cuda")
    for _ in range(2):  # the first pass does not gather ahead yet
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with torch.no_grad():
            wrapped(inputs)
        assert torch.cuda.memory_allocated() - before < block_bytes / 10
        assert torch.cuda.max_memory_allocated() - before < 3.6 * block_bytes  # two blocks, and one cast to bfloat16
    # In a backward pass come gradients, whole ones of two units at most, and the shares of them all in float32.
    torch.cuda.reset_peak_memory_stats()
    wrapped(inputs).float().square().mean().backward()
    wrapped.finish_gradient_synchronization()
    shares = sum(p.grad.nbytes for p in wrapped.parameters())
    assert torch.cuda.max_memory_allocated() - before < shares + 9 * block_bytes
    del wrapped, model


def test_the_host_does_not_wait_for_the_gpu():
    """A step's launches end long before the GPU has done its work: nothing in it waits."""
    model = FSDP(language_model(), unit_classes=BLOCKS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs, targets = batches(1)[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy(model(inputs), targets).backward()
        model.finish_gradient_synchronization()
        model.clip_gradient(1.0)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_bucketed_waits_for_nothing_either():
    model = BucketedDataParallel(copy.deepcopy(language_model()))
    inputs, targets = batches(1)[0]
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_entropy(model(inputs), targets).backward()
        model.finish_gradient_synchronization()
        model.clip_gradient(1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
containers = pytest.mark.parametrize(
    ("wrapper", "sharded_optimizer"), [*((name, False) for name in WRAPPERS), ("bucketed", True)]
)


def check_two_processes(process, wrapper, sharded_optimizer):
    """Each of two processes trains on its half of every batch: the parameters are those of one on whole batches.

    In float64, as AdamW makes steps of one size out of gradients that are all rounding error.
    """
    alone, own = language_model().double(), language_model().double()
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.add_(process.rank)  # all start from the first process's
    model = WRAPPERS[wrapper](own)
    optimizer_alone = AdamW(alone.parameters(), lr=1e-2)
    parameters = model.parameters()
    optimizer = ShardedOptimizer(parameters, AdamW, lr=1e-2) if sharded_optimizer else AdamW(parameters, lr=1e-2)
    for inputs, targets in batches():
        optimizer_alone.zero_grad()
        cross_entropy(alone(inputs), targets).backward()
        clip_gradient(alone.parameters(), 0.5)
        optimizer_alone.step()
        optimizer.zero_grad()
        mine, theirs = inputs.chunk(2)[process.rank], targets.chunk(2)[process.rank]
        cross_entropy(model(mine), theirs).backward()
        model.finish_gradient_synchronization()
        model.clip_gradient(0.5)
        optimizer.step()
    whole = model.gather_full_params() if isinstance(model, FSDP) else dict(model.module.named_parameters())
    for name, expected in alone.named_parameters():
        torch.testing.assert_close(whole[name], expected, rtol=1e-9, atol=1e-9)


@two_gpus
@containers
def test_two_processes_train_as_one(wrapper, sharded_optimizer):
    run_on_ranks(check_two_processes, 2, wrapper, sharded_optimizer, device="cuda", timeout_s=120)


@containers
def test_two_processes_train_as_one_over_gloo(wrapper, sharded_optimizer):
    """On one GPU that they share, or on one each."""
    arguments = (check_two_processes, 2, wrapper, sharded_optimizer)
    run_on_ranks(*arguments, backend="gloo", device="cuda", timeout_s=120)
