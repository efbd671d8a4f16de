"""The formulas against real parameter counts and PyTorch's own FLOP counter."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cs336_basics import accounting
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.model_config import ModelConfig
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.presets import MODELS

SMALL = ModelConfig(vocab_size=67, context_length=20, d_model=24, num_layers=3, num_heads=2, d_ff=40)
VARIANTS = [{}, {"norm": "post"}, {"norm": "none"}, {"position": "none"}, {"ffn": "silu", "d_ff": None},
            {"ffn": "relu2", "d_ff": None}, {"tie_embeddings": True}, {"qk_norm": True},
]  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS)
def test_parameters_are_those_of_the_model(changes):
    config = dataclasses.replace(SMALL, **changes)
    model = BasicsTransformerLM.from_config(config)
    assert sum(accounting.parameter_counts(config).values()) == model.get_num_params(non_embedding=False)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_of_the_presets(name):
    model = BasicsTransformerLM.from_config(MODELS[name], device=torch.device("meta"))
    assert sum(accounting.parameter_counts(MODELS[name]).values()) == model.get_num_params(non_embedding=False)


@pytest.mark.parametrize("changes", VARIANTS)
@pytest.mark.parametrize(("batch", "seq"), [(1, 20), (3, 7)])
def test_flops_are_those_that_torch_counts(changes, batch, seq):
    config = dataclasses.replace(SMALL, **changes)
    model = BasicsTransformerLM.from_config(config)
    ids = torch.randint(67, (batch, seq))
    with FlopCounterMode(display=False) as counter:
        loss = cross_entropy(model(ids), ids)
    forward = counter.get_total_flops()
    assert accounting.forward_flops(config, batch, seq) == forward
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert accounting.training_flops(config, batch, seq) == forward + counter.get_total_flops()


def test_gpt2_xl():
    """Worked by hand: 48 blocks of 4 d² + 3 d d_ff, two norms, one more, and two tables of 50 257 x 1600."""
    xl = MODELS["gpt2-xl"]
    d, d_ff, vocab, seq = 1600, 6400, 50_257, 1024
    parameters = 48 * (4 * d * d + 3 * d * d_ff + 2 * d) + d + 2 * vocab * d
    assert sum(accounting.parameter_counts(xl).values()) == parameters == 2_127_057_600
    flops = 48 * (8 * seq * d * d + 4 * seq * seq * d + 6 * seq * d * d_ff) + 2 * seq * d * vocab
    assert accounting.forward_flops(xl) == flops


def test_memory_is_that_of_the_parts():
    memory = accounting.training_memory(SMALL, batch_size=2)
    parameters = sum(accounting.parameter_counts(SMALL).values())
    assert memory.parameters == memory.gradients == 4 * parameters
    assert memory.optimizer_state == 8 * parameters
    stream, inner, scores, logits = 2 * 20 * 24, 2 * 20 * 40, 2 * 2 * 20 * 20, 2 * 20 * 67
    assert memory.activations == 4 * (3 * (8 * stream + 4 * inner + 2 * scores) + stream + 2 * logits)
    assert memory.total == 16 * parameters + memory.activations


@pytest.mark.parametrize("gigabytes", [0.0001, 0.01, 1.0])
def test_largest_batch_fits_and_the_next_does_not(gigabytes):
    batch = accounting.max_batch_size(SMALL, gigabytes * 1e9)
    if batch:
        assert accounting.training_memory(SMALL, batch).total <= gigabytes * 1e9
    assert accounting.training_memory(SMALL, batch + 1).total > gigabytes * 1e9


def test_training_time():
    steps, batch = 10, 4
    flops = steps * (3 * accounting.forward_flops(SMALL, batch) + 14 * sum(accounting.parameter_counts(SMALL).values()))
    assert accounting.training_days(SMALL, batch, steps, 1e9, utilization=0.25) == pytest.approx(
        flops / (0.25e9 * 86_400)
    )


def test_utilization_is_a_share_of_the_peak():
    config = dataclasses.replace(SMALL, context_length=20)
    flops_of_a_token = 3 * accounting.forward_flops(config, batch_size=1) / 20
    assert accounting.model_flops_utilization(config, 100, peak=1000 * flops_of_a_token) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("device", "bfloat16", "tf32"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 495e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
    ],
)
def test_peaks_of_devices(device, bfloat16, tf32):
    assert accounting.peak_flops(device, "bfloat16") == bfloat16
    assert accounting.peak_flops(device, "float32") == tf32
    assert accounting.peak_flops("a device that is not in the table", "bfloat16") is None
