"""The fused optimizer against Assignment 1's AdamW, PyTorch's, and the formulas in float64."""

import copy

import pytest
import torch

from cs336_basics.optimizer import AdamW
from cs336_systems.kernels import adamw as module
from cs336_systems.kernels import triton_support
from cs336_systems.kernels.adamw import BLOCK, FusedAdamW, adamw_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1,), (3, 5), (0,), (), (BLOCK,), (BLOCK - 1,), (2, BLOCK + 7)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def parameters(dtype=torch.float32, shapes=SHAPES, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=rng).to(DEVICE, dtype)) for shape in shapes]


def set_gradients(ours, theirs, seed, skip=()):
    rng = torch.Generator().manual_seed(seed)
    for index, (one, other) in enumerate(zip(ours, theirs)):
        gradient = torch.randn(one.shape, generator=rng).to(DEVICE, one.dtype)
        one.grad = None if index in skip else gradient
        other.grad = None if index in skip else gradient.to(other.dtype)


def assert_equal(ours, theirs, rtol=3e-6, atol=1e-7):
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one.detach().double(), other.detach().double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("reference", [AdamW, torch.optim.AdamW])
@pytest.mark.parametrize("seed", range(3))
def test_ten_steps_equal_the_reference(reference, seed):
    ours, theirs = parameters(seed=seed), parameters(seed=seed)
    fused, plain = FusedAdamW(ours, **OPTIONS), reference(theirs, **OPTIONS)
    for step in range(10):
        set_gradients(ours, theirs, 100 * seed + step)
        fused.step()
        plain.step()
    # PyTorch puts eps elsewhere and decays first.
    assert_equal(ours, theirs, **({} if reference is AdamW else {"rtol": 1e-3, "atol": 1e-3}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_step_equals_float64(dtype):
    ours = parameters(dtype)
    theirs = [torch.nn.Parameter(parameter.detach().double()) for parameter in ours]
    set_gradients(ours, theirs, 1)
    FusedAdamW(ours, **OPTIONS).step()
    AdamW(theirs, **OPTIONS).step()
    rtol = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert_equal(ours, theirs, rtol=rtol, atol=1e-7 if dtype == torch.float32 else 1e-4)


def test_half_precision_over_many_steps_stays_close():
    ours = parameters(torch.bfloat16)
    theirs = [torch.nn.Parameter(parameter.detach().double()) for parameter in ours]
    fused, plain = FusedAdamW(ours, **OPTIONS), AdamW(theirs, **OPTIONS)
    for step in range(5):
        set_gradients(ours, theirs, step)
        fused.step()
        plain.step()
    assert_equal(ours, theirs, rtol=0.03, atol=0.02)


@pytest.mark.parametrize(("first", "second"), [(FusedAdamW, AdamW), (AdamW, FusedAdamW)])
def test_state_dicts_are_exchanged(first, second):
    ours, theirs = parameters(), parameters()
    optimizer, other = first(ours, **OPTIONS), second(theirs, lr=1.0)
    set_gradients(ours, theirs, 0)
    optimizer.step()
    with torch.no_grad():
        for one, two in zip(theirs, ours):
            one.copy_(two)
    saved = copy.deepcopy(optimizer.state_dict())
    assert set(saved["state"][0]) == {"t", "m", "v"}
    other.load_state_dict(saved)
    for step in range(1, 4):
        set_gradients(ours, theirs, step)
        optimizer.step()
        other.step()
    assert_equal(ours, theirs)
    mine, yours = optimizer.state_dict(), other.state_dict()
    assert mine["param_groups"] == yours["param_groups"]
    for index, state in mine["state"].items():
        assert state["t"] == yours["state"][index]["t"] == 4
        assert_equal([state["m"], state["v"]], [yours["state"][index][key] for key in ("m", "v")])


def test_groups_dtypes_and_missing_gradients():
    def build(optimizer_class):
        first, second = parameters(), parameters(seed=1)
        half = parameters(torch.float16, seed=2) if optimizer_class is FusedAdamW else []
        groups = [{"params": first + half}, {"params": second, "lr": 0.0, "weight_decay": 0.0}]
        return first + second, optimizer_class(groups, **OPTIONS)

    (ours, fused), (theirs, plain) = build(FusedAdamW), build(AdamW)
    start = [parameter.detach().clone() for parameter in ours]
    for step, skip in enumerate([(1, 3), (1,), (), (2,)]):
        set_gradients(ours, theirs, step, skip)
        fused.step()
        plain.step()
    assert_equal(ours, theirs)
    assert all(torch.equal(now, before) for now, before in zip(ours[len(SHAPES) :], start[len(SHAPES) :]))
    assert fused.state[ours[1]]["t"] == 2


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
def test_views_at_any_address(offset):
    """Parameters inside a flat buffer, as sharding makes them, may begin where no vector load can."""
    flat = torch.randn(2 * BLOCK + 16, device=DEVICE)
    before = flat.clone()
    size = BLOCK + 5
    ours = [torch.nn.Parameter(flat[offset : offset + size])]
    theirs = [torch.nn.Parameter(before[offset : offset + size].clone())]
    set_gradients(ours, theirs, 0)
    FusedAdamW(ours, **OPTIONS).step()
    AdamW(theirs, **OPTIONS).step()
    assert_equal(ours, theirs)
    assert torch.equal(flat[:offset], before[:offset])
    assert torch.equal(flat[offset + size :], before[offset + size :])


def test_a_transposed_gradient_meets_the_right_entries():
    ours, theirs = parameters(shapes=[(3, 5)]), parameters(shapes=[(3, 5)])
    gradient = torch.randn(5, 3, device=DEVICE).T
    ours[0].grad = torch.empty_strided((3, 5), (1, 3), device=DEVICE).copy_(gradient)
    theirs[0].grad = gradient.contiguous()
    FusedAdamW(ours, **OPTIONS).step()
    AdamW(theirs, **OPTIONS).step()
    assert_equal(ours, theirs)


def test_autograd_sees_the_change():
    parameter = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (parameter * parameter).sum()
    parameter.grad = torch.ones_like(parameter)
    FusedAdamW([parameter]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_closure_and_options_are_those_of_the_reference():
    parameter = torch.nn.Parameter(torch.tensor(2.0, device=DEVICE))

    def closure():
        loss = parameter**2
        loss.backward()
        return loss.item()

    assert FusedAdamW([parameter], lr=0.1).step(closure) == 4.0
    assert parameter.item() < 2.0
    assert FusedAdamW([parameter]).defaults == AdamW([parameter]).defaults
    with pytest.raises(ValueError, match="must"):
        FusedAdamW([parameter], lr=-1.0)


@pytest.mark.parametrize(
    ("parameter", "message"),
    [(torch.zeros(3, dtype=torch.float64), "float64.*AdamW"), (torch.zeros(3, 4).T, "contiguous.*AdamW")],
)
def test_what_the_kernel_cannot_do_is_refused(parameter, message):
    parameter = torch.nn.Parameter(parameter.to(DEVICE))
    parameter.grad = torch.zeros_like(parameter)
    with pytest.raises(ValueError, match=message):
        FusedAdamW([parameter]).step()


def test_a_refused_step_changes_nothing():
    fine, wrong = parameters(shapes=[(3,)])[0], torch.nn.Parameter(torch.ones(3, device=DEVICE, dtype=torch.float64))
    for parameter in (fine, wrong):
        parameter.grad = torch.ones_like(parameter)
    optimizer = FusedAdamW([fine, wrong])
    with pytest.raises(ValueError, match="float64"):
        optimizer.step()
    assert not optimizer.state


def test_a_gradient_of_another_dtype_is_refused():
    parameter = torch.nn.Parameter(torch.ones(8, device=DEVICE, dtype=torch.float16))
    parameter.grad_dtype = torch.float32
    parameter.grad = torch.full((8,), 0.5, device=DEVICE)
    with pytest.raises(ValueError, match=r"float16.*float32"):
        FusedAdamW([parameter]).step()


def test_a_loaded_state_may_have_other_strides():
    transposed = torch.nn.Parameter(torch.arange(12.0, device=DEVICE).view(3, 4).T)
    plain = torch.nn.Parameter(transposed.detach().clone(memory_format=torch.contiguous_format))
    source, fused = AdamW([transposed], **OPTIONS), FusedAdamW([plain], **OPTIONS)
    gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    transposed.grad = gradient.clone(memory_format=torch.preserve_format)
    source.step()
    fused.load_state_dict(copy.deepcopy(source.state_dict()))
    with torch.no_grad():
        plain.copy_(transposed)
    plain.grad = gradient.clone()
    source.step()
    fused.step()
    assert_equal([plain], [transposed])


def test_a_cpu_without_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(triton_support, "INTERPRETED", False)
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.zeros(3)
    with pytest.raises(ValueError, match=r"cs336_basics\.optimizer\.AdamW"):
        FusedAdamW([parameter]).step()


def test_tables_are_kept_while_addresses_stay():
    ours = parameters()
    optimizer = FusedAdamW(ours, **OPTIONS)
    set_gradients(ours, ours, 0)
    optimizer.step()
    misses = module._table.cache_info().misses
    optimizer.step()
    assert module._table.cache_info().misses == misses
    ours[0].grad = ours[0].grad.clone()
    optimizer.step()
    assert module._table.cache_info().misses == misses + 1


def test_operator_is_registered_as_pytorch_wants_it():
    tensors = [[torch.rand(shape, device=DEVICE) for shape in ((3,), (5, 2))] for _ in range(4)]
    torch.library.opcheck(adamw_step, (*tensors, 0.1, 0.9, 0.99, 1e-8, 0.9))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_large_parameters(dtype):
    shapes = [(1023, 517), (4096, 1024), (7,), *[(1 + 97 * i,) for i in range(200)]]
    ours = parameters(dtype, shapes)
    theirs = [torch.nn.Parameter(parameter.detach().double()) for parameter in ours]
    fused, plain = FusedAdamW(ours, **OPTIONS), AdamW(theirs, **OPTIONS)
    for step in range(3):
        set_gradients(ours, theirs, step)
        fused.step()
        plain.step()
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.03, "atol": 0.02}
    assert_equal(ours, theirs, **tolerance)


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    ours = parameters()
    optimizer = FusedAdamW(ours, **OPTIONS)
    set_gradients(ours, ours, 0)
    optimizer.step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        for parameter in ours:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
