"""Evaluation of a model on a data set: every response is graded and written down."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from cs336_alignment.datasets.examples import load_examples
from cs336_alignment.policy.loading import resolve_device
from cs336_alignment.programs.configs.evaluate import EvaluateConfig
from cs336_alignment.prompts.templates import load_prompt
from cs336_alignment.rollouts.rollout import Rollout, summarize
from cs336_alignment.rollouts.validation import subsample
from cs336_alignment.rollouts.worker import open_rollout_worker
from cs336_alignment.run_folder import write_atomically, write_config
from cs336_alignment.runs.run_log import describe_environment

#: Names of the outcomes that are counted, by (format reward, answer reward).
OUTCOMES = {(1, 1): "format_1_answer_1", (1, 0): "format_1_answer_0", (0, 0): "format_0_answer_0"}


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Let a model answer questions, grade the answers, and write everything down.

    There is no true answer for AlpacaEval and SimpleSafetyTests. Their responses are also written in the form that
    their authors' evaluators read: `alpaca_eval.json`, `simple_safety_tests.jsonl`.

    Returns:
        The metrics: see `summarize`; counts of the outcomes in `OUTCOMES`; examples and tokens per second.

    Raises:
        ValueError, FileNotFoundError: the data, the model or the prompt cannot be read.
    """
    examples = subsample(load_examples(config.data, config.kind), config.max_examples)
    if config.kind == "mmlu":
        question = load_prompt("mmlu")
        examples = [replace(example, prompt=question.render(example.prompt)) for example in examples]
    if config.rollouts.reward is not None and not any(example.answer for example in examples):
        raise ValueError(f"{config.data} has no answers that a reward could compare with; generate only: --reward None")
    with open_rollout_worker(config.rollouts, config.model, config.precision, seed=config.seed) as worker:
        started = time.perf_counter()
        rollouts = worker.generate(examples, config.rollouts.sampling(seed=config.seed))
        seconds = time.perf_counter() - started
    tokens = sum(len(each.completion.token_ids) for each in rollouts)
    metrics = {
        "examples": len(examples),
        **summarize(rollouts),
        **count_outcomes(rollouts),
        "seconds": seconds,
        "examples_per_second": len(examples) / seconds,
        "tokens_per_second": tokens / seconds,
    }
    device = resolve_device(config.rollouts.engine.engine_device)
    write_config(config.output, config, describe_environment(device))
    lines = [json.dumps(each.as_json(), ensure_ascii=False) + "\n" for each in rollouts]
    write_atomically(config.output / "generations.jsonl", "".join(lines))
    write_atomically(config.output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    _write_for_official_evaluator(config, rollouts)
    return metrics


def count_outcomes(rollouts: Sequence[Rollout]) -> dict[str, int]:
    """Count the rollouts with each format and answer reward; see `OUTCOMES`. Empty if they are not graded."""
    if not all(each.rewards for each in rollouts):
        return {}
    counts = Counter((each.rewards["format_reward"], each.rewards["answer_reward"]) for each in rollouts)
    return {name: counts[outcome] for outcome, name in OUTCOMES.items()}


def _write_for_official_evaluator(config: EvaluateConfig, rollouts: Sequence[Rollout]) -> None:
    stop = config.rollouts.sampling().stop
    replies = [(each.example, _reply(each.completion.text, stop)) for each in rollouts]
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
    """Remove the stop string that ended a response, and the end of the code fence around it."""
    for string in stop:
        text = text.removesuffix(string)
    return text.strip().removesuffix("```").strip()
