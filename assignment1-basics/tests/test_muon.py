"""Muon against PyTorch's own, NorMuon against its algorithm written out in float64."""

import copy

import pytest
import torch
from torch import nn

from cs336_basics.checkpoint import read_checkpoint, restore, save_checkpoint
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.model_config import ModelConfig
from cs336_basics.muon import Muon, NorMuon, orthogonalize
from cs336_basics.optimizer import AdamW, parameters_for

SHAPES = [(8, 8), (16, 40), (40, 16), (16, 40), (1, 5), (7, 1)]
CONFIG = ModelConfig(31, 8, 16, 2, 2, 24, qk_norm=True)


def matrices(seed=0):
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_muon_stays_with_torch(weight_decay):
    ours, theirs = matrices(), matrices()
    optimizer = Muon([{"params": ours, "matrices": True}], lr=0.02, weight_decay=weight_decay, momentum=0.9)
    reference = torch.optim.Muon(
        theirs, lr=0.02, weight_decay=weight_decay, momentum=0.9, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(20):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # products in bfloat16 are rounded in another order
    assert (ours[0] - matrices()[0]).abs().max() > 0.02


@pytest.mark.parametrize("shape", [(3, 64, 200), (2, 200, 64), (1, 32, 32), (1, 1, 9)])
def test_orthogonal_matrices_have_singular_values_of_about_one(shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    result = orthogonalize(x).float()
    # So short are rows that hardly count: a square Gaussian matrix has singular values near zero, which stay small.
    least = 0.6 if shape[1] != shape[2] else 0.0
    values = torch.linalg.svdvals(result)
    assert least < values.min()
    assert values.max() < 1.25
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    cosine = (result * (u @ vh)).sum() / result.norm() / (u @ vh).norm()
    assert cosine > 0.97


def test_normuon_is_the_algorithm_of_the_paper():
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(12, 20))
    optimizer = NorMuon(
        [{"params": [parameter], "matrices": True}], lr=0.1, betas=(0.9, 0.8), weight_decay=0.5, momentum=0.7
    )
    expected, moment, square = parameter.detach().double(), torch.zeros(12, 20).double(), torch.zeros(12).double()
    for _ in range(5):
        parameter.grad = torch.randn(12, 20)
        gradient = parameter.grad.double()
        moment = 0.7 * moment + 0.3 * gradient
        orthogonal = orthogonalize((0.7 * moment + 0.3 * gradient)[None].float())[0].double()
        square = 0.8 * square + 0.2 * orthogonal.square().mean(1)
        rows = orthogonal / (square.sqrt() + 1e-8)[:, None]
        step = 0.2 * 0.1 * (12 * 20) ** 0.5 / rows.norm() * rows
        expected = expected - 0.1 * 0.5 * expected - step
        before = parameter.detach().clone()
        optimizer.step()
        update = parameter.detach() - 0.95 * before
        assert update.square().mean().sqrt() == pytest.approx(0.1 * 0.2, rel=1e-4)
    torch.testing.assert_close(parameter.detach().double(), expected, rtol=0, atol=1e-3)


def test_all_but_the_matrices_of_blocks_are_adamws():
    torch.manual_seed(0)
    model = BasicsTransformerLM.from_config(CONFIG)
    twin = copy.deepcopy(model)
    groups = Muon.groups(model)
    inner = {name for name, p in model.named_parameters() if any(p is q for q in groups[0]["params"])}
    assert inner == {
        f"layers.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "ffn.w1", "ffn.w2", "ffn.w3")
    }
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    optimizer = Muon(groups, lr=0.01)
    reference = AdamW(twin.parameters(), lr=0.01)
    for _ in range(3):
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.randn_like(ours)
            theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs) == (name not in inner), name


def test_parameters_without_a_gradient_are_left_alone():
    a, b = matrices()[:2]
    before = b.detach().clone()
    a.grad = torch.randn_like(a)
    Muon([{"params": [a, b], "matrices": True}], lr=0.1).step()
    assert torch.equal(b, before)


@pytest.mark.parametrize("cls", [Muon, NorMuon])
def test_state_survives_a_checkpoint(cls, tmp_path):
    def new():
        torch.manual_seed(0)
        model = BasicsTransformerLM.from_config(CONFIG)
        return model, cls(parameters_for(cls, model), lr=0.01)

    def step(model, optimizer):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    straight, interrupted, resumed = new(), new(), new()
    torch.manual_seed(1)
    for _ in range(4):
        step(*straight)
    torch.manual_seed(1)
    for _ in range(2):
        step(*interrupted)
    save_checkpoint(*interrupted, 2, tmp_path / "checkpoint.pt")
    restore(read_checkpoint(tmp_path / "checkpoint.pt"), *resumed, tmp_path / "checkpoint.pt")
    for _ in range(2):
        step(*resumed)
    for a, b in zip(straight[0].parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(a, b)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"momentum 1\.0 must lie in"):
        Muon(matrices(), momentum=1.0)
    with pytest.raises(ValueError, match=r"a parameter of shape \(3,\) is not a matrix; leave it to AdamW"):
        Muon([{"params": [nn.Parameter(torch.ones(3))], "matrices": True}])
    with pytest.raises(ValueError, match="lr -1"):
        NorMuon(matrices(), lr=-1)
