"""Engines that generate text for programs, which depend on the protocol in `base` only."""

from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cs336_alignment.rollouts.config import EngineName
from cs336_alignment.rollouts.engines.base import Completion, InferenceEngine
from cs336_alignment.rollouts.engines.transformers_engine import TransformersEngine
from cs336_alignment.rollouts.engines.vllm_engine import VllmEngine

__all__ = ["Completion", "InferenceEngine", "make_engine"]


def make_engine(
    name: EngineName,
    path: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device | str,
    *,
    policy: PreTrainedModel | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_model_len: int | None = None,
    gpu_memory_utilization: float = 0.85,
    seed: int = 0,
    compiled: bool | None = None,
    progress: bool = False,
) -> InferenceEngine:
    """Make an engine.

    Args:
        path: folder of the model. Both engines start with its weights, unless they share those of `policy`.
        policy: the model in training. The transformers engine uses that model itself if it is on `device` in `dtype`,
            and otherwise reads its own copy. The vllm engine always has its own, and prepares to release its memory in
            `sleep` if the policy is on the same device.
        dtype: type that the engine computes in.
        max_model_len: maximum number of tokens of a prompt and its completion. Default: the model's context.
        gpu_memory_utilization, seed: see `VllmEngine`.
        compiled: compile the model and record CUDA graphs. Default: on a GPU only.
        progress: show a progress bar.

    Raises:
        ValueError: vLLM is asked for but not installed, or the engine cannot run the model.
        FileNotFoundError: there is no such folder.
    """
    device = torch.device(device)
    if name == "transformers":
        shared = policy is not None and policy.dtype == dtype and _same_device(policy.device, device)
        return TransformersEngine(
            policy if policy is not None and shared else path,
            tokenizer,
            device,
            dtype=dtype,
            compiled=device.type == "cuda" if compiled is None else compiled,
            max_model_len=max_model_len,
            progress=progress,
        )
    return VllmEngine(
        path,
        tokenizer,
        device,
        dtype=dtype,
        max_model_len=max_model_len,
        gpu_memory_utilization=gpu_memory_utilization,
        seed=seed,
        enforce_eager=None if compiled is None else not compiled,
        sleeps=policy is not None and _same_device(policy.device, device),
        progress=progress,
    )


def _same_device(first: torch.device, second: torch.device) -> bool:
    return first.type == second.type and (first.index or 0) == (second.index or 0)
