"""What is sharded, when whole weights are there, in which precision they travel, and that nothing else changes."""

import copy
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cs336_basics.model import Embedding, Linear, TransformerBlock
from cs336_systems.parallel import FSDP
from cs336_systems.parallel.fsdp_unit import FSDPUnit
from cs336_systems.training.checkpointing import apply_checkpointing
from tests.toy_models import (
    OPTIMIZERS,
    assert_same,
    gradients_of,
    language,
    parameters_of,
    part,
    toy,
    train_alone,
    train_together,
)
from tests.workers import recorded_collectives

BLOCKS = (TransformerBlock, Linear, Embedding)
units = pytest.mark.parametrize("unit_classes", [(Linear, Embedding), BLOCKS], ids=["layers", "blocks"])


def one_pass(process, model, problem, step=0):
    """Forward and backward pass on this process's rows."""
    inputs, targets = (part(process, rows) for rows in problem.batches[step])
    loss = problem.loss(model, inputs, targets)
    loss.backward()
    model.finish_gradient_synchronization()
    return loss


def reference_gradients(problem, step=0):
    problem.loss(problem.model, *problem.batches[step]).backward()
    return gradients_of(problem.model)


def is_sharded(model):
    """No whole weight is there, and the modules show shards."""
    return (
        all(unit._flat.untyped_storage().size() == 0 for unit in model.units)
        and all(shard.ndim == 1 for unit in model.units for shard in unit.shards)
        and {p for u in model.units for p in u.shards} <= set(model.parameters())
    )


# --- exactness ---


def check_bitwise_like_halves(process, problem, unit_classes):
    problem = problem(torch.float32, rows=4)
    together = train_together(process, problem, partial(FSDP, unit_classes=unit_classes), OPTIMIZERS["our AdamW"])
    model = problem.model
    optimizer = OPTIMIZERS["our AdamW"](model.parameters())
    for step, (inputs, targets) in enumerate(problem.batches):
        halves = []
        for x, y in zip(inputs.chunk(2), targets.chunk(2)):
            optimizer.zero_grad()
            problem.loss(model, x, y).backward()
            halves.append([p.grad for p in model.parameters()])
        for p, first, second in zip(model.parameters(), *halves):
            p.grad = None if first is None else (first + second) / 2
        optimizer.step()
        assert_same(together[step], parameters_of(model))


@units
@pytest.mark.parametrize("problem", [toy, language])
def test_two_processes_are_bitwise_one_that_averages_two_halves(workers, problem, unit_classes):
    workers.run(check_bitwise_like_halves, 2, problem, unit_classes)


class Exact(nn.Module):
    """Whole numbers in, whole numbers out."""

    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.second = Embedding(5, 8), Linear(8, 8), Linear(8, 4)
        for parameter in self.parameters():
            parameter.data.random_(-2, 3)

    def forward(self, ids):
        return self.second(torch.relu(self.first(self.embedding(ids))))


def check_bitwise_like_the_whole_batch(process):
    torch.manual_seed(0)
    model = Exact()
    ids, weights = torch.randint(5, (2, 8)), torch.randint(-2, 3, (2, 8, 4)).float()
    alone, in_float64, sharded = model, copy.deepcopy(model).double(), FSDP(copy.deepcopy(model))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.25) for m in (alone, in_float64, sharded)]
    for inputs, factors in zip(ids, weights):
        for m, optimizer in zip((alone, in_float64, sharded), optimizers):
            x, w = (part(process, rows) for rows in (inputs, factors)) if m is sharded else (inputs, factors)
            optimizer.zero_grad()
            ((m(x) * w).sum() / len(x)).backward()
            if m is sharded:
                m.finish_gradient_synchronization()
            optimizer.step()
        assert_same(parameters_of(sharded), parameters_of(alone))
        assert_same(parameters_of(in_float64), {n: p.double() for n, p in parameters_of(alone).items()})  # no rounding


def test_where_nothing_rounds_two_processes_are_bitwise_one(workers):
    workers.run(check_bitwise_like_the_whole_batch, 2)


# --- what is where ---


class Small(nn.Module):
    """Weights of fewer elements than there are processes, beside one of more."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = Linear(1, 1), Linear(1, 2), Linear(2, 1)

    def forward(self, x):
        return self.three(torch.tanh(self.two(torch.tanh(self.one(x)))))


def check_shards(process, make_model, unit_classes):
    model = make_model()
    expected = parameters_of(model)
    sharded = FSDP(model, unit_classes=unit_classes)
    assert is_sharded(sharded)
    full = sharded.gather_full_params()
    assert list(full) == list(expected)
    assert_same(full, expected)

    ranges = sharded.shard_ranges()
    names = [f"{name}.weight" for name, part in model.named_modules() if isinstance(part, Linear | Embedding)]
    assert sorted(ranges) == sorted(names)  # a tied weight by both its names
    elements = 0
    for name, (shape, start, stop) in ranges.items():
        if name not in expected:
            continue
        shard = sharded.module.get_parameter(name)
        assert shape == expected[name].shape
        assert torch.equal(shard, expected[name].reshape(-1)[start:stop])
        elements += stop - start
    return elements, {name: (start, stop) for name, (_, start, stop) in ranges.items()}


@units
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("problem", [toy, language])
def test_shards_make_up_the_weights(workers, world_size, problem, unit_classes):
    model = problem(torch.float32, 2).model
    elements, ranges = zip(*workers.run(check_shards, world_size, partial(copy.deepcopy, model), unit_classes))
    for name in ranges[0]:
        edges = [of_process[name] for of_process in ranges]
        whole = sum(stop - start for start, stop in edges)
        assert whole == model.get_parameter(name).numel()
    # Shares are even but for the padding of each unit, of which there are at most 16.
    assert max(elements) - min(elements) <= 16 * 64


@pytest.mark.parametrize("unit_classes", [(Linear,), (Small,)], ids=["each", "together"])
def test_weights_of_fewer_elements_than_processes(workers, unit_classes):
    workers.run(check_shards, 3, Small, unit_classes)
    workers.run(check_training_of_small_weights, 3, unit_classes)


def check_training_of_small_weights(process, unit_classes):
    model = Small().double()
    x = torch.randn(3, 2, 1, dtype=torch.float64)
    sharded = FSDP(copy.deepcopy(model), unit_classes=unit_classes)
    optimizers = [OPTIMIZERS["our AdamW"](m.parameters()) for m in (model, sharded)]
    for _ in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(x).square().mean().backward()
        sharded(x[process.rank]).square().mean().backward()
        sharded.finish_gradient_synchronization()
        torch.testing.assert_close(sharded.clip_gradient(0.1), nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        for optimizer in optimizers:
            optimizer.step()
        # A tolerance for the clipping: torch and we add another ε.
        assert_same(parameters_of(sharded), parameters_of(model), 1e-6)


def check_gradients_fit(process, compute_dtype, unit_classes):
    problem = language(torch.float32, 4)
    model = FSDP(problem.model, compute_dtype, unit_classes)
    one_pass(process, model, problem)
    assert is_sharded(model)
    for p in model.parameters():
        assert p.grad.shape == p.shape
        assert p.grad.dtype == p.dtype == torch.float32


@units
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16, torch.float16])
def test_gradients_have_shape_and_dtype_of_the_shards(workers, compute_dtype, unit_classes):
    workers.run(check_gradients_fit, 2, compute_dtype, unit_classes)


# --- when whole weights are there ---


@contextmanager
def recorded_units(model):
    """("unshard" | "reshard" | "done", number of the unit) in the order in which it happens; done: its forward pass."""
    events = []
    start_unshard, reshard = FSDPUnit.start_unshard, FSDPUnit.reshard

    def recorded_unshard(unit):
        if not (unit._is_unsharded or unit._unsharding):
            events.append(("unshard", model.units.index(unit)))
        start_unshard(unit)

    def recorded_reshard(unit):
        if unit._is_unsharded or unit._unsharding:
            events.append(("reshard", model.units.index(unit)))
        reshard(unit)

    handles = [
        module.register_forward_hook(lambda *_, number=number: events.append(("done", number)), prepend=True)
        for number, unit in enumerate(model.units)
        for module in unit.modules
    ]
    with (
        mock.patch.object(FSDPUnit, "start_unshard", recorded_unshard),
        mock.patch.object(FSDPUnit, "reshard", recorded_reshard),
    ):
        yield events
    for handle in handles:
        handle.remove()


def most_at_once(events):
    there, most = set(), 0
    for event, unit in events:
        if event == "unshard":
            there.add(unit)
        elif event == "reshard":
            there.discard(unit)
        most = max(most, len(there))
    return most


def check_units_at_once(process, unit_classes):
    problem = language(torch.float32, 4, num_layers=4)
    model = FSDP(problem.model, unit_classes=unit_classes)
    inputs, targets = (part(process, rows) for rows in problem.batches[0])
    for step in range(3):
        with recorded_units(model) as forward:
            loss = problem.loss(model, inputs, targets)
        with recorded_units(model) as backward:
            loss.backward()
        assert most_at_once(forward + backward) == 2
        if step:  # from the second step on the order of the units is known
            order = [unit for event, unit in forward if event == "done"]
            expected = [("unshard", order[0])]
            for unit, following in pairwise(order):
                expected += [("unshard", following), ("done", unit), ("reshard", unit)]
            assert forward == [*expected, ("done", order[-1])]  # which the backward pass begins with
            gathered = [unit for event, unit in backward if event == "unshard"]
            assert gathered == order[-2:0:-1]  # all but the embedding, the first, which the backward pass does not need
        model.finish_gradient_synchronization()
        assert is_sharded(model)


@units
def test_two_units_at_once_at_most(workers, unit_classes):
    workers.run(check_units_at_once, 2, unit_classes)


def check_overlap_of_reduce_scatter(process):
    problem = language(torch.float32, 4)
    model = FSDP(problem.model, unit_classes=BLOCKS)
    inputs, targets = (part(process, rows) for rows in problem.batches[0])
    loss = problem.loss(model, inputs, targets)
    with recorded_collectives() as calls:
        loss.backward()
    assert [name for name, *_ in calls].count("reduce_scatter") == len(model.units)
    with recorded_collectives() as calls:
        model.finish_gradient_synchronization()
    assert {name for name, *_ in calls} == {"all_reduce"}


def test_gradients_are_sent_in_the_backward_pass(workers):
    workers.run(check_overlap_of_reduce_scatter, 2)


# --- precision ---


def check_precision(process, compute_dtype, unit_classes):
    problem = language(torch.float32, 4)
    model = FSDP(copy.deepcopy(problem.model), compute_dtype, unit_classes)
    with recorded_collectives() as calls:
        one_pass(process, model, problem)
    travelled = {(name, dtype) for name, dtype, _ in calls}
    assert {dtype for name, dtype in travelled if name in ("all_gather", "reduce_scatter")} == {compute_dtype}
    assert {p.dtype for p in model.gather_full_params().values()} == {torch.float32}

    # The reference: a model of that dtype, except for its norms.
    reference = problem.model
    for module in reference.modules():
        if isinstance(module, Linear | Embedding):
            module.to(compute_dtype)
    expected = reference_gradients(problem)
    for name, gradient in gradients_of(model).items():
        assert gradient.dtype == torch.float32
        difference = (gradient - expected[name].float()).norm() / expected[name].float().norm()
        assert difference < 4 * torch.finfo(compute_dtype).eps, name


@units
@pytest.mark.parametrize("compute_dtype", [torch.bfloat16, torch.float16])
def test_weights_and_gradients_travel_in_the_compute_dtype(workers, compute_dtype, unit_classes):
    workers.run(check_precision, 2, compute_dtype, unit_classes)


def check_zero_grad_before_backward(process, unit_classes):
    problem = language(torch.float64, 4)
    model = FSDP(copy.deepcopy(problem.model), unit_classes=unit_classes)
    for step in range(3):
        for each, rows in ((model, partial(part, process)), (problem.model, lambda rows: rows)):
            loss = problem.loss(each, *map(rows, problem.batches[step]))
            assert not isinstance(each, FSDP) or all(p.ndim == 1 for p in each.parameters())
            each.zero_grad()  # must find the shards of the unit that waits for the backward pass, too
            loss.backward()
        model.finish_gradient_synchronization()
        assert_same(gradients_of(model), gradients_of(problem.model), 1e-12)


@units
def test_zero_grad_between_forward_and_backward_pass(workers, unit_classes):
    workers.run(check_zero_grad_before_backward, 2, unit_classes)


def check_float_inputs(process):
    seen = []
    model = FSDP(nn.Sequential(Linear(4, 4), nn.Identity(), Linear(4, 2)), torch.bfloat16)
    model.module[1].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert model(torch.ones(2, 4)).dtype == torch.bfloat16
    assert seen == [torch.bfloat16]


def test_inputs_are_cast(workers):
    workers.run(check_float_inputs, 2)


def check_full_precision_after_forward(process):
    problem = language(torch.float32, 4)
    expected = parameters_of(problem.model)
    model = FSDP(problem.model, torch.bfloat16)
    for _ in range(2):
        model(problem.batches[0][0])  # no backward pass: the last unit waits for it with whole weights
    assert_same(model.gather_full_params(), expected)
    model(problem.batches[0][0])
    assert "lm_head.weight" in model.shard_ranges()


def test_full_params_after_a_forward_pass_alone(workers):
    workers.run(check_full_precision_after_forward, 2)


# --- other ways to train ---


def check_evaluation_between(process, unit_classes):
    problem = language(torch.float64, 4)
    expected = reference_gradients(problem)
    model = FSDP(copy.deepcopy(problem.model), unit_classes=unit_classes)
    model.zero_grad()
    for _ in range(2):
        with torch.no_grad():
            torch.testing.assert_close(model(problem.batches[1][0]), problem.model(problem.batches[1][0]))
        assert is_sharded(model)
        model.zero_grad()
        one_pass(process, model, problem)
        assert_same(gradients_of(model), expected, 1e-12)
    inputs, targets = (part(process, rows) for rows in problem.batches[0])
    model.zero_grad()
    loss = problem.loss(model, inputs, targets)
    with torch.no_grad():  # even between a forward pass and its backward pass
        model(problem.batches[1][0])
    loss.backward()
    model.finish_gradient_synchronization()
    assert_same(gradients_of(model), expected, 1e-12)


@units
def test_evaluation_between_steps(workers, unit_classes):
    workers.run(check_evaluation_between, 2, unit_classes)


def check_two_forward_passes(process):
    problem = language(torch.float64, 4)
    model = FSDP(copy.deepcopy(problem.model))
    batches = [[part(process, rows) for rows in batch] for batch in problem.batches[:2]]
    sum(problem.loss(model, *batch) for batch in batches).backward()
    model.finish_gradient_synchronization()
    sum(problem.loss(problem.model, *batch) for batch in problem.batches[:2]).backward()
    assert_same(gradients_of(model), gradients_of(problem.model), 1e-12)


def test_two_forward_passes_and_one_backward_pass(workers):
    workers.run(check_two_forward_passes, 2)


def check_checkpointing(process, strategy, unit_classes):
    problem = language(torch.float32, 4, num_layers=4)
    plain = FSDP(copy.deepcopy(problem.model), unit_classes=unit_classes)
    model = FSDP(copy.deepcopy(problem.model), unit_classes=unit_classes)
    apply_checkpointing(model.module, strategy)
    for step in range(2):
        for each in (plain, model):
            each.zero_grad()
            one_pass(process, each, problem, step)
        assert_same(gradients_of(model), gradients_of(plain))
    assert is_sharded(model)


@units
@pytest.mark.parametrize("strategy", ["block", "group", "nested"])
def test_gradient_checkpointing(workers, strategy, unit_classes):
    workers.run(check_checkpointing, 2, strategy, unit_classes)


def check_checkpoint_of_the_model(process):
    """The last unit runs in the region, so that the first whole weights of the backward pass are repeated ones."""
    problem = language(torch.float32, 4)
    plain, model = (FSDP(copy.deepcopy(problem.model)) for _ in range(2))
    inner = model.module.forward
    model.module.forward = lambda ids: checkpoint(inner, ids, use_reentrant=False)
    for step in range(2):
        for each in (plain, model):
            each.zero_grad()
            one_pass(process, each, problem, step)
        assert_same(gradients_of(model), gradients_of(plain))


def test_checkpointing_everything(workers):
    workers.run(check_checkpoint_of_the_model, 2)


def check_compile(process):
    problem = language(torch.float32, 4, num_layers=1)
    plain, model = (FSDP(copy.deepcopy(problem.model), unit_classes=BLOCKS) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("default")  # the compiler's own
        torch._dynamo.reset()
        for block in model.module.layers:
            block.forward = torch.compile(block.forward, backend="aot_eager")
        for step in range(2):
            for each in (plain, model):
                each.zero_grad()
                one_pass(process, each, problem, step)
            assert_same(gradients_of(model), gradients_of(plain), 1e-6)
        torch._dynamo.reset()


def test_compiled_blocks(workers):
    workers.run(check_compile, 2)


def check_accumulated_shares(process):
    problem = toy(torch.float64, 8)
    model = FSDP(copy.deepcopy(problem.model))
    for step in range(3):  # a message a step, and shares added up
        one_pass(process, model, problem, step)
        reference_gradients(problem, step)
    assert_same(gradients_of(model), gradients_of(problem.model), 1e-12)


def test_shares_of_gradients_add_up(workers):
    workers.run(check_accumulated_shares, 2)


def check_exception(process, unit_classes):
    problem = language(torch.float64, 4)
    model = FSDP(copy.deepcopy(problem.model), unit_classes=unit_classes)
    one_pass(process, model, problem)
    with mock.patch.object(model.module.layers[1].ffn, "forward", side_effect=KeyError), pytest.raises(KeyError):
        one_pass(process, model, problem)
    assert all(p.ndim == 1 for p in model.parameters())
    model.zero_grad()
    one_pass(process, model, problem)
    assert is_sharded(model)
    assert_same(gradients_of(model), reference_gradients(problem), 1e-12)


@units
def test_goes_on_after_an_exception(workers, unit_classes):
    workers.run(check_exception, 2, unit_classes)


def check_deterministic(process):
    problem = language(torch.float32, 4)
    torch.use_deterministic_algorithms(True)
    try:
        model = FSDP(copy.deepcopy(problem.model), torch.bfloat16)
        one_pass(process, model, problem)
        train_together(process, problem, FSDP, OPTIMIZERS["our AdamW"])
    finally:
        torch.use_deterministic_algorithms(False)


def test_deterministic_algorithms(workers):
    workers.run(check_deterministic, 2)  # warnings are errors in there


# --- tied and frozen weights ---


def tie_embeddings(model):
    model.lm_head.weight = model.token_embeddings.weight


def tie_within_a_block(model):
    model.layers[0].attn.q_proj.weight = model.layers[0].attn.k_proj.weight


def tie_across_blocks(model):
    model.layers[0].ffn.w1.weight = model.layers[1].ffn.w1.weight


def share_a_module(model):
    model.layers[0].ffn = model.layers[1].ffn


def share_a_block(model):
    model.layers[0] = model.layers[1]


def freeze_some(model):
    for block in model.layers:
        block.attn.q_proj.weight.requires_grad_(False)
        block.ffn.w2.weight.requires_grad_(False)


def freeze_a_block(model):
    model.layers[1].requires_grad_(False)


def freeze_embeddings(model):
    model.token_embeddings.requires_grad_(False)


def freeze_all_but_norms(model):
    model.requires_grad_(False)
    for block in model.layers:
        block.ln1.requires_grad_(True)


def check_changed_model(process, change, unit_classes):
    problem = language(torch.float64, 4, steps=3)
    change(problem.model)
    alone = train_alone(problem, OPTIMIZERS["our AdamW"])
    together = train_together(process, problem, partial(FSDP, unit_classes=unit_classes), OPTIMIZERS["our AdamW"])
    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs, 1e-10)

    model = FSDP(copy.deepcopy(problem.model), unit_classes=unit_classes)
    one_pass(process, model, problem)
    assert is_sharded(model)
    assert [p.grad is None for p in model.parameters()] == [not p.requires_grad for p in model.parameters()]
    # Twice through one graph.
    loss = problem.loss(model, *(part(process, rows) for rows in problem.batches[1]))
    for _ in range(2):
        loss.backward(retain_graph=True)
    model.finish_gradient_synchronization()
    for step in (0, 1, 1):
        expected = reference_gradients(problem, step)
    assert_same(gradients_of(model), expected, 1e-12)


CHANGES = [
    tie_embeddings, tie_within_a_block, tie_across_blocks, share_a_module, share_a_block,
    freeze_some, freeze_a_block, freeze_embeddings, freeze_all_but_norms,
]  # fmt: skip


@units
@pytest.mark.parametrize("change", CHANGES)
def test_tied_and_frozen_weights(workers, change, unit_classes):
    workers.run(check_changed_model, 2, change, unit_classes)


def check_tied_elsewhere(process):
    model = nn.ModuleDict({"ours": Linear(3, 3), "other": nn.Linear(3, 3)})
    model["other"].weight = model["ours"].weight
    with pytest.raises(ValueError, match=r"other.weight of Linear is tied to a weight that is sharded"):
        FSDP(model)


def test_no_weight_is_tied_to_what_cannot_be_sharded(workers):
    workers.run(check_tied_elsewhere, 2)


def check_several_dtypes(process):
    model = nn.Sequential(Linear(3, 3), Linear(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weights of torch.float32 and torch.float64"):
        FSDP(model, unit_classes=(nn.Sequential,))


def test_a_unit_has_one_dtype(workers):
    workers.run(check_several_dtypes, 2)


class Pick(nn.Module):
    """Two weights of one unit, of which a process uses only those it is told to."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = Linear(6, 5), Linear(6, 5), Linear(6, 5)

    def forward(self, x, names):
        return sum(getattr(self, name)(x) for name in names)


class TwoPicks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Pick(), Pick()

    def forward(self, x, first, second):
        return self.first(x, first) * self.second(x, second)


def check_different_weights(process):
    torch.manual_seed(0)
    alone = TwoPicks().double()
    model = FSDP(copy.deepcopy(alone), unit_classes=(Pick,))
    x = torch.randn(4, 6, dtype=torch.float64)
    used = [("a", "ab"), ("ab", "b"), ("b", "a")]  # "c" by nobody; complete units on no process, or on some
    for _ in range(2):
        model(x, *used[process.rank]).square().mean().backward()
        model.finish_gradient_synchronization()
        sum(alone(x, *names).square().mean() / 3 for names in used[: process.world_size]).backward()
    model.finish_gradient_synchronization()  # once more does no harm
    ranges = model.shard_ranges()
    for (name, ours), theirs in zip(model.module.named_parameters(), alone.parameters(), strict=True):
        if theirs.grad is None:
            assert ours.grad is None, name
        else:
            expected = theirs.grad.flatten()[ranges[name].start : ranges[name].stop]
            torch.testing.assert_close(ours.grad, expected, rtol=1e-12, atol=1e-14)


def test_processes_that_use_different_weights_of_a_unit(workers):
    workers.run(check_different_weights, 3)


class CheckpointInside(nn.Module):
    """A unit of which a part is computed again in the backward pass, without the unit's own hooks."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Linear(6, 6), Linear(6, 6)

    def forward(self, x):
        return self.b(torch.utils.checkpoint.checkpoint(lambda y: torch.relu(self.a(y)), x, use_reentrant=False))


def check_checkpoint_inside(process):
    torch.manual_seed(0)
    alone = nn.Sequential(CheckpointInside(), CheckpointInside())
    model = FSDP(copy.deepcopy(alone), unit_classes=(CheckpointInside,))
    x = torch.randn(4, 6)
    for each in (alone, model):
        each(x).square().mean().backward()
    model.finish_gradient_synchronization()
    ranges = model.shard_ranges()
    for (name, ours), theirs in zip(model.module.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.flatten()[ranges[name].start : ranges[name].stop])


def test_a_checkpoint_inside_of_a_unit(workers):
    workers.run(check_checkpoint_inside, 2)


class Chain(nn.Module):
    """Runs the layers it is told to."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Linear(6, 6) for _ in range(3))

    def forward(self, x, which):
        for number in which:
            x = self.layers[number](x)
        return x


def check_layers_of_other_microbatches(process):
    torch.manual_seed(0)
    alone = Chain()
    model = FSDP(copy.deepcopy(alone))
    x = torch.randn(4, 6)
    with model.no_sync():
        model(x, (0, 1)).square().mean().backward()
    model(x, (0, 2)).square().mean().backward()
    model.finish_gradient_synchronization()
    (alone(x, (0, 1)).square().mean() + alone(x, (0, 2)).square().mean()).backward()
    assert_gradients_are_shares(model, alone)


def assert_gradients_are_shares(model, alone):
    ranges = model.shard_ranges()
    for (name, ours), theirs in zip(model.module.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad.flatten()[ranges[name].start : ranges[name].stop])


def test_a_microbatch_may_run_other_layers(workers):
    workers.run(check_layers_of_other_microbatches, 2)


def check_abandoned_pass(process):
    torch.manual_seed(0)
    alone = Chain()
    model = FSDP(copy.deepcopy(alone))
    x = torch.randn(4, 6)
    model(x, (0, 1, 2)).square().mean().backward()
    model.zero_grad()
    with model.no_sync():
        model(x, (0, 1, 2)).square().mean().backward()
    model.zero_grad()
    model(x, (0, 1, 2)).square().mean().backward()
    model.finish_gradient_synchronization()
    alone(x, (0, 1, 2)).square().mean().backward()
    assert_gradients_are_shares(model, alone)


def test_zero_grad_abandons_a_backward_pass(workers):
    workers.run(check_abandoned_pass, 2)


def check_two_backward_passes(process):
    torch.manual_seed(0)
    alone = Chain()
    model = FSDP(copy.deepcopy(alone))
    x = torch.randn(4, 6)
    for each in (alone, model):
        first, second = each(x, (0,)).sum(), each(x, (0, 1)).sum()
        first.backward()
        (2 * second).backward()
    model.finish_gradient_synchronization()
    alone.layers[2].weight.grad = None
    ranges = model.shard_ranges()
    for name in ("layers.0.weight", "layers.1.weight"):
        expected = alone.get_parameter(name).grad.flatten()[ranges[name].start : ranges[name].stop]
        torch.testing.assert_close(model.module.get_parameter(name).grad, expected)


def test_two_backward_passes_add_up(workers):
    workers.run(check_two_backward_passes, 2)


def check_moving(process):
    model = FSDP(Chain())
    with pytest.raises(RuntimeError, match="move or cast the module before wrapping it"):
        model.double()


def test_shards_cannot_be_cast(workers):
    workers.run(check_moving, 1)
