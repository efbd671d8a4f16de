"""Rollouts of both engines and of plain transformers on the same work: tokens per second, and whether they agree.

    python -m experiments.engines [--model FOLDER | --shape tiny] [--prompts 32] [--samples 8] [--max-tokens 60]

Without a model, one with random weights in the shape of `--shape` is made. There are three jobs with the same prompts:

- full: every completion has `--max-tokens` tokens;
- ragged: stop strings end completions at many lengths, so that the effect of dropping finished sequences shows;
- greedy: the tokens of each engine are compared with those of the transformers engine without compilation.

An engine that is not installed for the device is left out. The candidates take turns. The first call of each, which may
compile, is reported separately.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from transformers import PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from cs336_alignment.policy.config import Precision
from cs336_alignment.policy.loading import load_model, load_tokenizer, resolve_device, save_model
from cs336_alignment.policy.tiny_model import byte_tokenizer
from cs336_alignment.rollouts.config import SamplingParams
from cs336_alignment.rollouts.engines import Completion, make_engine
from experiments.results import RESULTS, write_result

Shape = Literal["tiny", "qwen2.5-1.5b"]
SHAPES: dict[Shape, dict[str, Any]] = {
    "tiny": {  # the model of the demonstration
        "vocab_size": 262,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "qwen2.5-1.5b": {
        "vocab_size": 151_936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}
# Each occurs with probability 1/262 per token if the weights are random and small.
STOPS = tuple("abcdefgh")


@dataclass(frozen=True)
class Options:
    """Time the engines."""

    model: Path | None = None
    """A Hugging Face folder. Default: random weights in the shape of --shape."""
    shape: Shape = "tiny"
    """Shape of the model with random weights."""
    prompts: int = 32
    """Number of prompts."""
    samples: int = 8
    """Completions of each prompt."""
    max_tokens: int = 60
    """Maximum number of tokens in a completion."""
    device: str = "auto"
    """Device to run on."""
    dtype: Precision = "float32"
    """Number format of the model."""
    repeats: int = 5
    """Number of timed calls of each candidate."""
    without: tuple[str, ...] = ()
    """Names of candidates to leave out."""
    gpu_memory_utilization: float = 0.5
    """Fraction of the GPU's memory for vLLM; the other candidates share the GPU."""
    out: Path = RESULTS / "engines"
    """Folder to write engines_cpu.json or engines_cuda.json to."""


@dataclass(frozen=True)
class Work:
    """The prompts, and how many completions of which length."""

    prompts: list[str]
    samples: int
    max_tokens: int

    def params(self, job: str) -> SamplingParams:
        if job == "greedy":
            return SamplingParams(temperature=0, max_tokens=self.max_tokens, min_tokens=self.max_tokens)
        full = job == "full"
        return SamplingParams(
            n=self.samples,
            max_tokens=self.max_tokens,
            min_tokens=self.max_tokens if full else 0,
            stop=() if full else STOPS,
        )


def make_model(shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype) -> Path:
    tokenizer = byte_tokenizer()
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPES[shape], **ends, max_position_embeddings=4096, tie_word_embeddings=True)
    with device:  # a CPU takes a minute for the random numbers of a billion weights
        model: Any = Qwen2ForCausalLM(config)
    save_model(model.to(dtype), tokenizer, folder)
    return folder


def plain_generate(model: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> Callable:
    """`generate` of transformers as it is: all rows in one batch."""

    def generate(prompts: list[str], params: SamplingParams) -> int:
        batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        batch = {name: values.repeat_interleave(params.n, 0) for name, values in batch.items()}
        stop = {"stop_strings": list(params.stop), "tokenizer": tokenizer} if params.stop else {}
        out = model.generate(
            **batch,
            do_sample=True,
            top_k=0,
            max_new_tokens=params.max_tokens,
            min_new_tokens=params.min_tokens,
            **stop,
            **options,
        )
        written = out[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id
        return int((written * torch.arange(1, written.shape[1] + 1, device=model.device)).amax(1).sum())

    return generate


def counted(generate: Callable[[list[str], SamplingParams], list[list[Completion]]]) -> Callable:
    return lambda prompts, params: sum(len(c.token_ids) for group in generate(prompts, params) for c in group)


def timed(run: Callable[[list[str], SamplingParams], int], work: Work, job: str) -> tuple[float, float]:
    """Seconds, and tokens per second."""
    started = time.perf_counter()
    tokens = run(work.prompts, work.params(job))
    seconds = time.perf_counter() - started
    return seconds, tokens / seconds


def speed_rows(job: str, work: Work, candidates: dict[str, Callable], repeats: int) -> list[dict]:
    first: dict[str, float] = {}
    for who, run in candidates.items():
        first[who] = timed(run, work, job)[0]
        print(f"{job}: the first call of {who} took {first[who]:.1f} s", flush=True)
    speeds: dict[str, list[float]] = {who: [] for who in candidates}
    for _, (who, run) in itertools.product(range(repeats), candidates.items()):
        speeds[who].append(timed(run, work, job)[1])
        print(f"{job}: {who} {speeds[who][-1]:.0f} tokens/s", flush=True)
    return [
        {
            "job": job,
            "who": who,
            "tokens_per_s": statistics.median(values),
            "slowest": min(values),
            "fastest": max(values),
            "first_call_s": first[who],
        }
        for who, values in speeds.items()
    ]


def agreement_rows(work: Work, engines: dict[str, Any]) -> list[dict]:
    answers = {
        who: [group[0] for group in engine.generate(work.prompts, work.params("greedy"))]
        for who, engine in engines.items()
    }
    reference, *others = answers
    rows = []
    for who in others:
        pairs = list(zip(answers[reference], answers[who], strict=True))
        same = [(one, other) for one, other in pairs if one.token_ids == other.token_ids]
        gap = max((abs(p - q) for one, other in same for p, q in zip(one.log_probs, other.log_probs)), default=None)
        row = {"job": "greedy", "who": who, "completions": len(pairs), "same_tokens": len(same)}
        rows.append({**row, "largest_log_prob_gap_of_the_same": gap})
    return rows


def make_candidates(options: Options, path: Path, device: torch.device) -> tuple[dict[str, Any], dict[str, Callable]]:
    """Make the engines, and the baselines that call `generate` of transformers."""
    dtype, tokenizer = getattr(torch, options.dtype), load_tokenizer(path)
    settings: dict[str, Any] = {"dtype": dtype, "gpu_memory_utilization": options.gpu_memory_utilization}
    try:  # vLLM first, because it wants the memory that it is promised to be free
        vllm = {"vllm engine": make_engine("vllm", path, tokenizer, device, **settings)}
    except ValueError as error:
        print(f"left out: {error}")
        vllm = {}
    model = load_model(path, device, dtype)
    engines: dict[str, Any] = {
        "transformers engine": make_engine(
            "transformers", path, tokenizer, device, policy=model, dtype=dtype, compiled=False
        )
    }
    baselines = {"generate of transformers": plain_generate(model, tokenizer)}
    if device.type == "cuda":
        engines["transformers engine, compiled"] = make_engine(
            "transformers", path, tokenizer, device, policy=model, dtype=dtype, compiled=True
        )
        static = plain_generate(model, tokenizer, cache_implementation="static")
        baselines["generate of transformers, static cache"] = static
    engines |= vllm
    known = [*engines, *baselines]
    if unknown := set(options.without) - set(known):
        raise SystemExit(f"there is no candidate {unknown.pop()!r} to leave out; choose from {', '.join(known)}")
    for name in options.without:
        engines.pop(name, None), baselines.pop(name, None)
    return engines, baselines


def main(options: Options) -> None:
    """Time the candidates, compare their greedy completions, and write the result."""
    device = resolve_device(options.device)
    prompts = [
        f"User: What is {number} + {number * number}? Explain it.\nAssistant: <think>"
        for number in range(options.prompts)
    ]
    work = Work(prompts, options.samples, options.max_tokens)
    with tempfile.TemporaryDirectory() as temporary:
        dtype = getattr(torch, options.dtype)
        path = options.model or make_model(options.shape, Path(temporary) / "model", device, dtype)
        engines, baselines = make_candidates(options, path, device)
        rows = agreement_rows(work, engines) if len(engines) > 1 else []
        candidates = {name: counted(engine.generate) for name, engine in engines.items()} | baselines
        for job in ("full", "ragged"):
            rows += speed_rows(job, work, candidates, options.repeats)
        for engine in engines.values():
            engine.close()
    what = (
        f"rollouts of {options.model.name if options.model else options.shape} in {options.dtype}: "
        f"{options.prompts} prompts of some 60 bytes, "
        f"{options.samples} completions each, at most {options.max_tokens} tokens, {torch.get_num_threads()} threads"
    )
    write_result(options.out / f"engines_{device.type}.json", what, device, rows)


if __name__ == "__main__":
    main(tyro.cli(Options))
