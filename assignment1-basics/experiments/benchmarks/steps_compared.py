"""Compare our training step with that of Hugging Face's Llama of the same shape with PyTorch's AdamW, in one run.

All get bfloat16 autocast (on a GPU), the same batches, gradient clipping and an optimizer step, both eagerly and
compiled. The options are in `experiments.benchmarks.training_step`.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from cs336_basics.accounting import training_flops
from cs336_basics.model import BasicsTransformerLM, CausalAttention
from cs336_basics.model_config import ModelConfig
from cs336_basics.nn_utils import clip_gradient, cross_entropy
from cs336_basics.optimizer import AdamW

#: The model, its forward pass from token ids to logits, the loss, the optimizer and the clipping.
Contender = tuple[torch.nn.Module, Callable, Callable, torch.optim.Optimizer, Callable]
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def ours(config: ModelConfig, causal_attention: CausalAttention | None = None) -> Contender:
    """Build our model with our loss, optimizer and clipping."""
    model = BasicsTransformerLM.from_config(config, causal_attention=causal_attention)
    return model, model, cross_entropy, AdamW(model.parameters()), clip_gradient


def ours_with_sdpa(config: ModelConfig) -> Contender:
    """Build our model with PyTorch's attention."""
    return ours(config, partial(F.scaled_dot_product_attention, is_causal=True))


def llama(config: ModelConfig) -> Contender:
    """Build Hugging Face's Llama of the same shape, with PyTorch's loss, optimizer and clipping."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            max_position_embeddings=config.context_length,
            tie_word_embeddings=False,
        )
    )

    def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    optimizer = torch.optim.AdamW(model.parameters(), fused=torch.cuda.is_available())
    return model, lambda x: model(x, use_cache=False).logits, loss_of, optimizer, torch.nn.utils.clip_grad_norm_


def training_step(make: Callable[[ModelConfig], Contender], config: ModelConfig, device: str, compiled: bool) -> Step:
    """Build a contender and return its training step."""
    model, forward, loss_of, optimizer, clip = make(config)
    model.to(device)
    if compiled:
        model.compile()
        loss_of = torch.compile(loss_of)

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(forward(x), y)
        loss.backward()
        clip(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


CONTENDERS: dict[str, Callable[[ModelConfig], Contender]] = {
    "cs336_basics": ours,
    "cs336_basics, attention by PyTorch": ours_with_sdpa,
    "transformers Llama": llama,
}


def compare(
    config: ModelConfig, batch_size: int, steps: int, rounds: int, peak_tflops: float | None, eager_only: bool
) -> tuple[list[dict[str, Any]], str]:
    """Time the training steps of all contenders, and return a row for each and the device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    shape = (batch_size, config.context_length + 1)
    sequences = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    x, y = sequences[:, :-1].contiguous(), sequences[:, 1:].contiguous()
    rows = []
    for compiled in [False] if eager_only else [False, True]:
        runners = {name: training_step(make, config, device, compiled) for name, make in CONTENDERS.items()}
        memory = {name: _warm_up(name, step, x, y) for name, step in runners.items()}
        for name, seconds in _time(runners, x, y, steps, rounds).items():
            row: dict[str, Any] = {"who": name, "compiled": compiled, "batch": batch_size, "step_ms": seconds * 1e3}
            row |= {"tokens_per_s": x.numel() / seconds}
            row |= {"model_tflops": training_flops(config, batch_size) / seconds / 1e12}
            if peak_tflops:
                row["utilisation"] = row["model_tflops"] / peak_tflops
            if memory[name] is not None:
                row["activations_GB"] = memory[name]
            rows.append(row)
    return rows, device


def _warm_up(name: str, step: Step, x: torch.Tensor, y: torch.Tensor) -> float | None:
    """Check that a step learns, and return the GB that it needs in addition to weights and optimizer state."""
    losses = [step(x, y).item() for _ in range(3)]
    assert losses[2] < losses[0], (name, losses)
    if x.device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(x, y)
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def _time(runners: dict[str, Step], x: torch.Tensor, y: torch.Tensor, steps: int, rounds: int) -> dict[str, float]:
    """Return the median seconds of a step of each contender; in every round each of them takes `steps` steps."""

    def synchronize() -> None:
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, step in runners.items():
            synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                step(x, y)
            synchronize()
            times[name].append((time.perf_counter() - started) / steps)
    return {name: statistics.median(taken) for name, taken in times.items()}
