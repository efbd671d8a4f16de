"""The evaluation of a model on a data set: every response, graded, and what that comes to."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from cs336_alignment.datasets import load_examples
from cs336_alignment.evaluator import some_of
from cs336_alignment.generation_log import Generation, summarize
from cs336_alignment.policy import Precision
from cs336_alignment.pretrained import resolve_device
from cs336_alignment.prompts import load_prompt
from cs336_alignment.rollouts import RolloutConfig, open_rollouts
from cs336_alignment.run_log import write_atomically
from cs336_alignment.training_run import check_at_least_one, write_config

#: What the outcomes are called that are counted, by (format reward, answer reward).
OUTCOMES = {(1, 1): "format_1_answer_1", (1, 0): "format_1_answer_0", (0, 0): "format_0_answer_0"}


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, and how. The defaults are zero-shot evaluation on MATH with the R1-Zero prompt."""

    output: Path = Path("runs/evaluate")
    """Folder for metrics.json, generations.jsonl and config.json."""
    model: str = "Qwen/Qwen2.5-Math-1.5B"
    """The model: a folder of Hugging Face, such as a checkpoint of a run, or a name on its hub."""
    data: Path = Path("data/math/test.jsonl")
    """The questions."""
    kind: str | None = None
    """Which data set it is. Default: what the fields of its first row say."""
    max_examples: int | None = None
    """Take so many of the questions, drawn at random but always the same. Default: all."""
    precision: Precision = "bfloat16"
    """What the engine computes in."""
    seed: int = 0
    """Fixes the draws."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses come about, and what they are worth."""

    def __post_init__(self) -> None:
        check_at_least_one(self, "max_examples")


def _benchmark(kind: str, data: str, reward: str | None) -> EvaluateConfig:
    """A benchmark of the supplement: greedy decoding after the system prompt."""
    rollouts = RolloutConfig(prompt="zero_shot_system", reward=reward, temperature=0.0)
    return EvaluateConfig(Path(f"runs/evaluate_{kind}"), data=Path(data), kind=kind, rollouts=rollouts)


#: How each data set is evaluated in the course.
BENCHMARKS = {
    "math": EvaluateConfig(),
    "mmlu": _benchmark("mmlu", "data/mmlu/csv/data/test", "mmlu"),
    "gsm8k": _benchmark("gsm8k", "data/gsm8k/test.jsonl", "gsm8k"),
    "alpaca_eval": _benchmark("alpaca_eval", "data/alpaca-eval/alpaca_eval.json", None),
    "simple_safety_tests": _benchmark("simple_safety_tests", "data/simple-safety-tests/test.jsonl", None),
}


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Let a model answer the questions, grade the answers, and write everything down.

    AlpacaEval's and SimpleSafetyTests' answers have no truth to be compared with. They are written in the form that the
    evaluators of their authors read: `alpaca_eval.json`, `simple_safety_tests.jsonl`.

    Returns:
        The metrics: see `summarize`; counts of the outcomes in `OUTCOMES`; examples and tokens a second.

    Raises:
        ValueError, FileNotFoundError: the data, the model or the prompt cannot be read.
    """
    examples = some_of(load_examples(config.data, config.kind), config.max_examples)
    if config.kind == "mmlu":
        question = load_prompt("mmlu")
        examples = [replace(example, prompt=question.render(example.prompt)) for example in examples]
    if config.rollouts.reward is not None and not any(example.answer for example in examples):
        raise ValueError(f"{config.data} has no answers that a reward could compare with; generate only: --reward None")
    with open_rollouts(config.rollouts, config.model, config.precision, seed=config.seed) as rollouts:
        started = time.perf_counter()
        generations = rollouts.respond(examples, config.rollouts.sampling(seed=config.seed))
        seconds = time.perf_counter() - started
    tokens = sum(len(each.completion.token_ids) for each in generations)
    metrics = {
        "examples": len(examples),
        **summarize(generations),
        **count_outcomes(generations),
        "seconds": seconds,
        "examples_per_second": len(examples) / seconds,
        "tokens_per_second": tokens / seconds,
    }
    write_config(config.output, config, resolve_device(config.rollouts.engine.engine_device))
    lines = [json.dumps(each.as_json(), ensure_ascii=False) + "\n" for each in generations]
    write_atomically(config.output / "generations.jsonl", "".join(lines))
    write_atomically(config.output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    _write_for_official_evaluator(config, generations)
    return metrics


def count_outcomes(generations: Sequence[Generation]) -> dict[str, int]:
    """How many generations had which format and answer reward, see `OUTCOMES`; empty if they are not graded."""
    if not all(each.rewards for each in generations):
        return {}
    counts = Counter((each.rewards["format_reward"], each.rewards["answer_reward"]) for each in generations)
    return {name: counts[outcome] for outcome, name in OUTCOMES.items()}


def _write_for_official_evaluator(config: EvaluateConfig, generations: Sequence[Generation]) -> None:
    stop = config.rollouts.sampling().stop
    replies = [(each.example, _reply(each.completion.text, stop)) for each in generations]
    if config.kind == "alpaca_eval":
        rows = [
            {"instruction": example.prompt, "output": reply, "generator": config.model, "dataset": example.subject}
            for example, reply in replies
        ]
        write_atomically(config.output / "alpaca_eval.json", json.dumps(rows, ensure_ascii=False, indent=1) + "\n")
    elif config.kind == "simple_safety_tests":
        lines = [
            json.dumps({"prompts_final": example.prompt, "output": reply}, ensure_ascii=False) + "\n"
            for example, reply in replies
        ]
        write_atomically(config.output / "simple_safety_tests.jsonl", "".join(lines))


def _reply(text: str, stop: Sequence[str]) -> str:
    """A response without the stop string that ended it, and without the end of the code fence that it stood in."""
    for string in stop:
        text = text.removesuffix(string)
    return text.strip().removesuffix("```").strip()
