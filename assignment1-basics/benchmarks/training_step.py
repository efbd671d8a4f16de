"""A training step of ours beside Hugging Face's Llama of the same shape, with PyTorch's AdamW, in one run.

    python -m benchmarks.training_step [--preset tinystories-17m] [--batch-size 128] [--out FOLDER]

Both get bfloat16 autocast (on a GPU), the same batches, gradient clipping and an optimizer step; each eagerly
and compiled. Reported: tokens per second, the share of the device's peak that the model's FLOPs make up
(`--peak-tflops`, none by default), and peak memory.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.harness import write_result
from cs336_basics.accounting import training_flops
from cs336_basics.model import BasicsTransformerLM, CausalAttention, ModelConfig
from cs336_basics.nn_utils import clip_gradient, cross_entropy
from cs336_basics.optimizer import AdamW
from cs336_basics.presets import MODELS


def ours(config: ModelConfig, causal_attention: CausalAttention | None = None) -> tuple:
    model = BasicsTransformerLM.from_config(config, causal_attention=causal_attention)
    return model, model, cross_entropy, AdamW(model.parameters()), clip_gradient


def ours_with_sdpa(config: ModelConfig) -> tuple:
    return ours(config, partial(F.scaled_dot_product_attention, is_causal=True))


def llama(config: ModelConfig) -> tuple:
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


def training_step(make: Callable[[ModelConfig], tuple], config: ModelConfig, device: str, compiled: bool) -> Callable:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(MODELS), default="tinystories-17m")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=20, help="timed steps a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--peak-tflops", type=float, help="measured rate of a large matrix product, for the utilisation"
    )
    parser.add_argument("--eager-only", action="store_true")
    parser.add_argument("--out", type=Path, help="folder for the result")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    config = MODELS[arguments.preset]
    shape = (arguments.batch_size, config.context_length + 1)
    windows = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    x, y = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()

    def synchronise() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    makers = {"cs336_basics": ours, "cs336_basics, attention by PyTorch": ours_with_sdpa, "transformers Llama": llama}
    times: dict[tuple[str, bool], list[float]] = {}
    memory: dict[tuple[str, bool], float] = {}
    for compiled in [False] if arguments.eager_only else [False, True]:
        steps = {who: training_step(make, config, device, compiled) for who, make in makers.items()}
        for who, step in steps.items():
            losses = [step(x, y).item() for _ in range(3)]
            assert losses[2] < losses[0], (who, losses)
            synchronise()
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                step(x, y)
                memory[who, compiled] = (torch.cuda.max_memory_allocated() - before) / 1e9
        for _ in range(arguments.rounds):
            for who, step in steps.items():
                synchronise()
                started = time.perf_counter()
                for _ in range(arguments.steps):
                    step(x, y)
                synchronise()
                times.setdefault((who, compiled), []).append((time.perf_counter() - started) / arguments.steps)

    rows = []
    for (who, compiled), taken in times.items():
        seconds = statistics.median(taken)
        row = {"who": who, "compiled": compiled, "batch": shape[0], "step_ms": seconds * 1e3,
               "tokens_per_s": x.numel() / seconds}  # fmt: skip
        row["model_tflops"] = training_flops(config, shape[0]) / seconds / 1e12
        if arguments.peak_tflops:
            row["utilisation"] = row["model_tflops"] / arguments.peak_tflops
        if (who, compiled) in memory:
            row["activations_GB"] = memory[who, compiled]
        rows.append(row)
    write_result(
        "benchmark_training_step",
        f"a training step of {arguments.preset}, batch {shape[0]} x {config.context_length}",
        rows,
        arguments.out,
        device,
    )


if __name__ == "__main__":
    main()
