"""Blocks that are compiled one by one."""

import torch
from torch._dynamo.utils import counters

from cs336_basics.model import BasicsTransformerLM, ModelConfig
from cs336_systems.parallel.blocks import blocks_of, compile_blocks

MODEL = ModelConfig(67, 12, d_model=16, num_layers=2, num_heads=2, d_ff=24)


def test_blocks_are_compiled_once_and_compute_the_same():
    torch.manual_seed(0)
    ids = torch.randint(67, (2, 12))
    counters.clear()
    for _ in range(2):
        model = BasicsTransformerLM.from_config(MODEL)
        names, expected = list(model.state_dict()), model(ids)
        compile_blocks(*blocks_of(model), backend="aot_eager")
        torch.testing.assert_close(model(ids), expected)
        model(ids).sum().backward()
        assert list(model.state_dict()) == names
    assert counters["stats"]["unique_graphs"] == 1
