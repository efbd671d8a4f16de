"""A stack of linear layers on a mesh: against PyTorch's counters, scans, and arithmetic by hand."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cs336_systems.instruments.checkpointing import saved_bytes
from cs336_systems.theory.tpu_mesh import (
    COURSE_LAYOUT,
    TPU_V5P,
    XXL,
    Layout,
    Machine,
    MlpStack,
    best_data_size,
    compute_bound_tokens,
    devices_needed,
    half_sharded_bytes,
    layout_bytes,
    least_tokens,
    pass_times,
)

SMALL = MlpStack(d_model=6, d_ff=10, blocks=3)


def linear_layers(stack):
    widths = [(stack.d_model, stack.d_ff), (stack.d_ff, stack.d_model)] * stack.blocks
    return nn.Sequential(*(nn.Linear(*width, bias=False, dtype=torch.bfloat16) for width in widths))


def test_stack_as_pytorch_counts_it():
    model, tokens = linear_layers(SMALL), 7
    x = torch.randn(tokens, SMALL.d_model, dtype=torch.bfloat16, requires_grad=True)
    assert sum(p.numel() for p in model.parameters()) == SMALL.num_parameters
    assert saved_bytes(lambda: model(x), model.parameters()) == SMALL.saved_bytes(tokens)
    assert sum(p.nbytes for p in model[:2].parameters()) == SMALL.block_bytes()

    machine, layout = Machine(flops_per_second=1.0, bytes_per_second=1.0), Layout("one device", 1, 1)
    forward, backward = pass_times(SMALL, tokens, layout, machine)
    with FlopCounterMode(display=False) as counted:
        y = model(x).sum()
    assert forward.compute == counted.get_total_flops()
    with FlopCounterMode(display=False) as counted:
        y.backward()
    assert backward.compute == counted.get_total_flops()
    assert forward.communication() == backward.communication() == 0


def test_pass_times_by_hand():
    # D 6, F 10, 3 blocks, 2 bytes; X 2 over 1 axis, Y 5 over 2, 40 tokens, one byte per second and axis.
    # Weights: 3 blocks of 2 matrices of 60 numbers, a fifth each: 3 · 2 · 60 · 2/5 = 144.
    # Activations: 3 blocks, in and out, 20 tokens of 6 numbers: 3 · 2 · 20 · 6 · 2/2 = 720.
    layout = Layout("both", data=2, tensor=5, data_axes=1, tensor_axes=2)
    forward, backward = pass_times(SMALL, 40, layout, Machine(10.0, 1.0))
    assert (forward.weights, forward.activations) == (144, 720)
    assert (backward.weights, backward.activations) == (288, 720)  # gathered again, and gradients scattered
    assert forward.compute == 40 * 2 * SMALL.num_parameters / 10 / 10
    assert (forward.communication(), forward.communication(at_once=False)) == (720, 864)
    forward, backward = pass_times(SMALL, 40, replace(layout, sharded=False), Machine(10.0, 1.0))
    assert (forward.weights, backward.weights) == (0, 288)  # all-reduce: two shares


LAYOUTS = [
    Layout("DP", 64, 1, data_axes=3, sharded=False),
    Layout("FSDP", 64, 1, data_axes=3),
    Layout("TP", 1, 16),
    COURSE_LAYOUT,
    Layout("TP inside DP", 8, 8, sharded=False),
    Layout("FSDP × TP", 4, 16, tensor_axes=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"{layout.name} {layout.data} {layout.tensor}")
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("stack", [XXL, replace(XXL, bytes_per_number=4), replace(XXL, bytes_per_number=1)])
def test_compute_bound_from_there_on(layout, at_once, stack):
    def bound(tokens_per_device):
        passes = pass_times(stack, tokens_per_device * layout.devices, layout, TPU_V5P)
        return all(one.compute >= one.communication(at_once) for one in passes)

    least = compute_bound_tokens(stack, layout, TPU_V5P, at_once)
    if math.isinf(least):
        assert not bound(1e12)
    else:
        assert bound(1.001 * least + 1e-6)
        assert least == 0 or not bound(0.999 * least)


def test_more_tensor_parallelism_than_f_allows_is_never_compute_bound():
    most = XXL.d_ff / TPU_V5P.intensity  # about 20.8
    assert compute_bound_tokens(XXL, Layout("TP", 1, 20), TPU_V5P) == 0
    assert math.floor(most) == 20
    assert compute_bound_tokens(XXL, Layout("TP", 1, 21), TPU_V5P) == math.inf
    # Exactly at the limit nothing is left for weights that must wait for the activations.
    even = Machine(XXL.d_ff / 4, 1.0)
    assert compute_bound_tokens(XXL, Layout("FSDP × TP", 2, 4), even) < math.inf
    assert compute_bound_tokens(XXL, Layout("FSDP × TP", 2, 4), even, at_once=False) == math.inf


@pytest.mark.parametrize("at_once", [True, False])
def test_best_split_by_scan(at_once):
    devices, tokens = 2**10, 2**21
    layout = Layout("", devices, 1, data_axes=2, tensor_axes=1)
    best = best_data_size(XXL, tokens, layout)

    def seconds(x):
        # pass_times wants whole numbers of devices: the same with D F/Y and B/X in floats.
        weights = 4 * XXL.d_model * XXL.d_ff / (devices / x) / (TPU_V5P.bytes_per_second * 2)
        activations = 4 * tokens / x * XXL.d_model / TPU_V5P.bytes_per_second
        return max(weights, activations) if at_once else weights + activations

    for x in (2, 32, 512):
        split = replace(layout, data=x, tensor=devices // x)
        forward, _ = pass_times(XXL, tokens, split, TPU_V5P)
        assert forward.communication(at_once) == pytest.approx(XXL.blocks * seconds(x))
    grid = [1.001**i for i in range(1, 6900)]
    assert grid[-1] > 900
    assert min(grid, key=seconds) == pytest.approx(best, rel=2e-3)


def test_no_split_is_compute_bound_with_fewer_tokens():
    machine = Machine(1000.0, 1.0)
    stack = MlpStack(d_model=8, d_ff=500_000, blocks=1)  # Y up to 500
    layout = Layout("", 2, 1, data_axes=2)
    least = least_tokens(stack, layout, machine)
    bounds = [compute_bound_tokens(stack, replace(layout, tensor=y), machine) for y in range(2, 1000)]
    assert min(bounds) == pytest.approx(least)
    assert bounds.index(min(bounds)) + 2 == 500


def test_layout_bytes_by_hand():
    # P = 360; state 16 P = 5760. 40 tokens save 2 · 3 · (6 + 10) bytes each. A block is 240 bytes, two are 480.
    assert layout_bytes(SMALL, 40, Layout("DP", 4, 1, sharded=False)) == 5760 + 10 * 96 + 480
    assert layout_bytes(SMALL, 40, Layout("FSDP", 4, 1)) == 1440 + 10 * 96 + 480
    assert layout_bytes(SMALL, 40, Layout("TP", 1, 5)) == 1152 + 40 * 2 * 3 * (6 + 2) + 96
    assert layout_bytes(SMALL, 40, Layout("both", 2, 5)) == 576 + 20 * 2 * 3 * (6 + 2) + 96


def test_memory_of_xxl_by_hand():
    assert XXL.num_parameters == 219_848_638_464
    assert XXL.state_bytes() == 4 * (219_848_638_464 * 4)
    assert XXL.saved_bytes(1) == 126 * 2 * (16_384 + 53_248) == 17_547_264
    assert math.ceil(XXL.state_bytes() / 80e9) == 44


@pytest.mark.parametrize("tokens", [1, 4096, 9000])
@pytest.mark.parametrize("blocks", [0, 2])
def test_fewest_devices_by_search(tokens, blocks):
    def held(devices):
        state = 16 * XXL.num_parameters / devices
        # Layer by layer: of two blocks, one keeps its inputs and one shards them.
        layers = [tokens * 2 * (XXL.d_model + XXL.d_ff) / (devices if block % 2 else 1) for block in range(XXL.blocks)]
        return state + sum(layers) + blocks * 4 * XXL.d_model * XXL.d_ff

    fewest = next(n for n in range(1, 10_000) if held(n) < 95e9)
    assert devices_needed(XXL, tokens, 95e9, blocks) == fewest
    assert half_sharded_bytes(XXL, tokens, fewest, blocks) == pytest.approx(held(fewest))


def test_a_device_that_is_exactly_full_is_not_enough():
    stack = MlpStack(d_model=1, d_ff=1, blocks=1)  # state 32 bytes, no tokens
    assert devices_needed(stack, 0, 16.0) == 3
    assert devices_needed(stack, 0, 16.1) == 2


def test_compute_bound_batch_of_the_course_by_hand():
    # 4 B D F/(64 C) >= 4 D F/(4 · 2 W): B/64 >= 4.6e14/(8 · 1.8e11).
    tokens = compute_bound_tokens(XXL, COURSE_LAYOUT, TPU_V5P)
    assert tokens == pytest.approx(319.44, abs=0.01)
    assert math.ceil(tokens * COURSE_LAYOUT.devices) == 20_445
    # The activations need 4 · 4.6e14/(1.8e11 · 53248) = 19.2 % of the time.
    one_by_one = compute_bound_tokens(XXL, COURSE_LAYOUT, TPU_V5P, at_once=False)
    assert one_by_one == pytest.approx(319.44 / (1 - 0.19197), rel=1e-4)
