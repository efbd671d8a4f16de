"""Formulas against simulations, scans and counted bytes; the course's numbers against arithmetic by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cs336_basics.model import BasicsTransformerLM, Embedding, Linear, ModelConfig
from cs336_systems.accounting import (
    COURSE_LAYOUT,
    STATE,
    TPU_V5P,
    XXL,
    Accounting,
    Layout,
    Machine,
    MlpStack,
    best_data_size,
    compute_bound_tokens,
    crossover_bytes,
    ddp_overhead,
    devices_needed,
    fsdp_costs,
    fsdp_units,
    gather_bytes,
    half_sharded_bytes,
    layout_bytes,
    least_tokens,
    optimal_bucket_bytes,
    pass_times,
    ring_bytes,
    ring_seconds,
    step_traffic_bytes,
    training_bytes_per_rank,
    whole_ring_bytes,
    whole_ring_seconds,
)
from cs336_systems.checkpointing import saved_bytes
from cs336_systems.models import MODELS

# Ring collectives


class Ring:
    """Ranks that hold lists of numbers of a byte each and send in rounds, all at once, to their right."""

    def __init__(self, ranks, size):
        self.ranks, self.size = ranks, size
        self.buffers = [[(rank + 2) * (i + 1) for i in range(size)] for rank in range(ranks)]
        self.expected = [sum(column) for column in zip(*self.buffers)]
        self.rounds = []  # bytes that each rank sent

    def send(self, messages):
        """What every rank receives from its left."""
        assert len({len(message) for message in messages}) == 1
        self.rounds.append(len(messages[0]))
        return [list(messages[rank - 1]) for rank in range(self.ranks)]

    def seconds(self, bytes_per_second, latency):
        return sum(latency + sent / bytes_per_second for sent in self.rounds)


def standard(ranks, size):
    ring, chunk = Ring(ranks, size), size // ranks

    def part(rank, number):
        start = number % ranks * chunk
        return ring.buffers[rank][start : start + chunk]

    for add, first in ((True, 0), (False, 1)):  # reduce-scatter, then all-gather
        for step in range(ranks - 1):
            received = ring.send([part(rank, rank + first - step) for rank in range(ranks)])
            for rank, message in enumerate(received):
                start = (rank - 1 + first - step) % ranks * chunk
                for i, value in enumerate(message, start):
                    ring.buffers[rank][i] = ring.buffers[rank][i] + value if add else value
    return ring


def whole(ranks, size):
    ring = Ring(ranks, size)
    passing = [list(buffer) for buffer in ring.buffers]
    for _ in range(ranks - 1):
        passing = ring.send(passing)
        ring.buffers = [[a + b for a, b in zip(*pair)] for pair in zip(ring.buffers, passing)]
    return ring


@pytest.mark.parametrize("ranks", [2, 3, 4, 7])
@pytest.mark.parametrize("size", [84, 420])
def test_all_reduces_as_simulated(ranks, size):
    for simulate, sent, seconds in (
        (standard, ring_bytes, ring_seconds),
        (whole, whole_ring_bytes, whole_ring_seconds),
    ):
        ring = simulate(ranks, size)
        assert all(buffer == ring.expected for buffer in ring.buffers)
        assert sum(ring.rounds) == pytest.approx(sent(size, ranks))
        assert ring.seconds(13.0, 0.7) == pytest.approx(seconds(size, ranks, 13.0, 0.7))
    # The two halves of a standard one are a reduce-scatter and an all-gather.
    assert sum(standard(ranks, size).rounds[: ranks - 1]) == pytest.approx(gather_bytes(size, ranks))


@pytest.mark.parametrize("ranks", [3, 4, 8, 64])
def test_below_the_crossover_whole_buffers_win(ranks):
    link = 450e9, 5e-6
    size = crossover_bytes(ranks, *link)
    assert whole_ring_seconds(size, ranks, *link) == pytest.approx(ring_seconds(size, ranks, *link))
    assert whole_ring_seconds(0.99 * size, ranks, *link) < ring_seconds(0.99 * size, ranks, *link)
    assert whole_ring_seconds(1.01 * size, ranks, *link) > ring_seconds(1.01 * size, ranks, *link)


def test_two_ranks_have_no_crossover():
    assert crossover_bytes(2, 450e9, 5e-6) == math.inf
    for size in (1.0, 1e12):
        assert whole_ring_bytes(size, 2) == ring_bytes(size, 2) == size
        assert whole_ring_seconds(size, 2, 450e9, 5e-6) < ring_seconds(size, 2, 450e9, 5e-6)


def test_all_ranks_broadcasting_their_shards_send_what_an_all_gather_does():
    ranks, shard = 5, 3
    received = [0] * ranks
    sent = 0
    for owner in range(ranks):
        for hop in range(1, ranks):
            received[(owner + hop) % ranks] += shard
            sent += shard
    assert set(received) == {gather_bytes(ranks * shard, ranks)}
    assert sent / ranks == gather_bytes(ranks * shard, ranks)


# Weights, gradients, optimizer state


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp32", (16_000, 10_000, 7_000, 4_000)), ("mixed", (16_000, 7_000, 5_500, 4_000))],
)
def test_zero_by_hand(precision, expected):
    # 1000 parameters on 4 ranks. fp32: 4 + 4 + 8/4 = 10, 4 + 4/4 + 8/4 = 7; mixed: 2 + 2 + 12/4 = 7, 2 + 14/4 = 5.5.
    for stage, bytes_held in enumerate(expected):
        assert training_bytes_per_rank(1000, 4, stage, precision) == bytes_held
        assert training_bytes_per_rank(1000, 1, stage, precision) == 16_000


def test_zero_papers_numbers():
    # Rajbhandari et al. 2020, figure 1: 7.5 billion parameters, 64 ranks: 120, 31.4, 16.6 and 1.9 GB.
    held = [training_bytes_per_rank(7_500_000_000, 64, stage, "mixed") / 1e9 for stage in range(4)]
    assert held == pytest.approx([120, 31.4, 16.6, 1.9], abs=0.06)


def test_state_is_what_adamw_holds():
    model = nn.Linear(16, 8)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    parameters = list(model.parameters())
    moments = [value for state in optimizer.state.values() for key, value in state.items() if key != "step"]
    held = sum(tensor.nbytes for tensor in (*parameters, *(p.grad for p in parameters), *moments))
    assert training_bytes_per_rank(16 * 8 + 8, 1, 0) == held
    assert STATE["fp32"].optimizer == sum(tensor.nbytes for tensor in moments) / (16 * 8 + 8)


def test_traffic_by_hand():
    # 1000 float32 parameters, 4 ranks: a share is 3000 bytes.
    assert step_traffic_bytes(1000, 4) == {
        "DDP": 6000, "sharded optimizer": 9000, "ZeRO-1": 6000, "ZeRO-2": 6000, "ZeRO-3": 9000
    }  # fmt: skip
    assert step_traffic_bytes(1000, 4, bytes_per_number=2)["DDP"] == 3000
    assert set(step_traffic_bytes(1000, 1).values()) == {0}


# A stack of linear layers on a mesh

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


# The course's communication_accounting


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


# FSDP of the assignment's models


@pytest.mark.parametrize("config", [*MODELS.values(), ModelConfig(67, 16, 16, 3, 2, d_ff=24, ffn="silu", norm="none")])
def test_fsdp_units_are_the_models_modules(config):
    with torch.device("meta"):
        model = BasicsTransformerLM(
            config.vocab_size, config.context_length, config.d_model, config.num_layers, config.num_heads,
            config.d_ff, config.rope_theta, norm=config.norm, ffn=config.ffn,
        )  # fmt: skip
    found = [module.weight for module in model.modules() if isinstance(module, Linear | Embedding)]
    assert sorted(fsdp_units(config)) == sorted(weight.numel() for weight in found)
    assert fsdp_units(config)[0] == model.token_embeddings.weight.numel()
    costs = fsdp_costs(config, 2, 4)
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    assert costs.replicated == norms * 4
    assert costs.state == pytest.approx(16 * (sum(p.numel() for p in model.parameters()) + norms) / 2)


@pytest.mark.parametrize("compute_bytes", [2, 4])
def test_fsdp_by_hand(compute_bytes):
    # Vocabulary 100, d 8, d_ff 16, two blocks: 800 + 2 · (4 · 64 + 3 · 128) + 800 = 2880 in units, 40 in norms.
    config = ModelConfig(vocab_size=100, context_length=4, d_model=8, num_layers=2, num_heads=2, d_ff=16)
    costs = fsdp_costs(config, 4, compute_bytes)
    assert fsdp_units(config)[:8] == [800, 64, 64, 64, 64, 128, 128, 128]
    assert costs.gather == costs.reduce_scatter == 2160 * compute_bytes
    assert costs.replicated == 2 * 30 * 4
    assert costs.sent == 3 * 2160 * compute_bytes + 240
    assert costs.state == 720 * 16 + 40 * 16
    assert costs.gathered_peak == (128 + 800) * compute_bytes  # the last matrix of a block and the head


# DDP with buckets


def simulated_overhead(total, bandwidth, call, buckets):
    each = total / buckets / bandwidth
    computed = sent = 0.0
    for _ in range(buckets):
        computed += each
        sent = max(computed, sent) + call + each
    return sent - computed


@pytest.mark.parametrize("buckets", [1, 2, 13, 200])
@pytest.mark.parametrize("call", [0.0, 0.003, 0.5])
def test_overhead_as_simulated(buckets, call):
    expected = simulated_overhead(7.0, 3.0, call, buckets)
    assert ddp_overhead(7.0, 3.0, call, buckets) == pytest.approx(expected)


def test_best_bucket_by_scan():
    total, bandwidth, call = 8e9, 450e9, 3e-5
    best = min(range(1, 2000), key=lambda n: simulated_overhead(total, bandwidth, call, n))
    assert total / optimal_bucket_bytes(total, bandwidth, call) == pytest.approx(best, abs=1)
    least = ddp_overhead(total, bandwidth, call, total / optimal_bucket_bytes(total, bandwidth, call))
    assert least == pytest.approx(2 * math.sqrt(total * call / bandwidth))


# The command


def refuse(constant):
    raise AssertionError(f"{constant} is no JSON")


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    Accounting(out=tmp_path, device="cpu").execute()
    text = (tmp_path / "accounting.json").read_text(encoding="utf-8")
    result = json.loads(text, parse_constant=refuse)
    rows = {}
    for row in result["rows"]:
        rows.setdefault(row["table"].partition(":")[0], []).append(row)
    sharded = {row["what"]: row["devices"] for row in rows["communication_accounting (a, b)"]}
    assert (sharded["sharded, below 95 GB each"], sharded["the same and two gathered blocks"]) == (61, 69)
    bound = rows["communication_accounting (c, d)"]
    assert (bound[0]["X"], bound[0]["Y"], bound[0]["batch"]) == (16, 4, 20_445)
    never = {
        row["strategy"]: row["bound_from_per_device"]
        for row in rows["data_parallel_calcs, fsdp_calcs, tp_calcs, fsdp_tp_calcs"]
    }
    assert never["TP"] == "never"
    assert [row["best"] for row in rows["ddp_bucketed_benchmarking (b)"]].count("best") == 1

    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if not line.startswith("written")]
    assert max(map(len, lines)) <= 100
    for line in lines:  # no table is cut
        assert not line.startswith("│") or line.endswith("│")
    assert "Gradient accumulation" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 1}, "--world-size is 1, but must be at least 2"),
        ({"ring": 1}, "--ring is 1, but must be at least 2"),
        ({"memory_tokens": 0}, "--memory-tokens is 0, but must be at least 1"),
        ({"link_gb_per_s": 0.0}, "--link-gb-per-s is 0.0, but must be positive"),
        ({"call_overhead_us": math.inf}, "--call-overhead-us is inf, but must be positive"),
        ({"memory_tokens": 20_000}, "20000 tokens put 175.5 GB on every device, which has 95; choose fewer"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        Accounting(out=Path("unused"), device="cpu", **options).execute()
