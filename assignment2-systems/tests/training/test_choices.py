"""Every name of every table leads to something, and sizes are those of the course."""

import dataclasses
from typing import get_args

import pytest
import torch

from cs336_systems.training import choices
from cs336_systems.training.choices import OPTIMIZERS, SIZES, SizeName, model_config, resolve

TABLES = ("ATTENTIONS", "OPTIMIZERS", "LOSSES", "CONTAINERS", "STRATEGIES")


@pytest.mark.parametrize("table", TABLES)
def test_every_name_resolves(table):
    pytest.importorskip("triton")
    for name in getattr(choices, table):
        assert callable(resolve(getattr(choices, table), name)), name


def test_sizes():
    assert model_config("small", 128) == dataclasses.replace(model_config("small"), context_length=128)
    assert set(SIZES) == set(get_args(SizeName))


def test_adamw_by_name():
    assert [resolve(OPTIMIZERS, name).__name__ for name in ("basics", "torch")] == ["AdamW", "AdamW"]
    assert resolve(OPTIMIZERS, "torch") is torch.optim.AdamW
    pytest.importorskip("triton")
    assert resolve(OPTIMIZERS, "fused").__name__ == "FusedAdamW"
