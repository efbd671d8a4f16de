"""Bytes of the training state against arithmetic by hand, ZeRO's paper, AdamW itself, and the modules of a model."""

import pytest
import torch
from torch import nn

from cs336_basics.model import BasicsTransformerLM, Embedding, Linear, ModelConfig
from cs336_systems.theory.state import STATE, fsdp_costs, fsdp_units, step_traffic_bytes, training_bytes_per_rank
from cs336_systems.training.choices import SIZES, model_config


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("float32", (16_000, 10_000, 7_000, 4_000)), ("mixed", (16_000, 7_000, 5_500, 4_000))],
)
def test_zero_by_hand(precision, expected):
    # 1000 parameters on 4 ranks. float32: 4 + 4 + 8/4 = 10, 4 + 4/4 + 8/4 = 7; mixed: 2 + 2 + 12/4 = 7, 2 + 14/4 = 5.5.
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
    assert STATE["float32"].optimizer == sum(tensor.nbytes for tensor in moments) / (16 * 8 + 8)


def test_traffic_by_hand():
    # 1000 float32 parameters, 4 ranks: a share is 3000 bytes.
    assert step_traffic_bytes(1000, 4) == {
        "DDP": 6000, "sharded optimizer": 9000, "ZeRO-1": 6000, "ZeRO-2": 6000, "ZeRO-3": 9000
    }  # fmt: skip
    assert step_traffic_bytes(1000, 4, bytes_per_number=2)["DDP"] == 3000
    assert set(step_traffic_bytes(1000, 1).values()) == {0}


@pytest.mark.parametrize(
    "config", [*map(model_config, SIZES), ModelConfig(67, 16, 16, 3, 2, d_ff=24, ffn="silu", norm="none")]
)
def test_fsdp_units_are_the_models_modules(config):
    with torch.device("meta"):
        model = BasicsTransformerLM.from_config(config)
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
