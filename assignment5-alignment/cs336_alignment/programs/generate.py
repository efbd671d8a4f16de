"""Asking a model questions and printing what it answers."""

import secrets
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace

import torch

from cs336_alignment.datasets.example import Example
from cs336_alignment.policy.loading import load_tokenizer, resolve_device
from cs336_alignment.programs.configs.generate import GenerateConfig
from cs336_alignment.rollouts.engines import make_engine
from cs336_alignment.rollouts.rollout import Rollout
from cs336_alignment.rollouts.worker import RolloutWorker


def generate(config: GenerateConfig) -> None:
    """Print the responses to the questions of the configuration or, if there are none, to questions typed by the user.

    Raises:
        ValueError, FileNotFoundError: the engine cannot run here, the model cannot be read, or a question does not
            fit into its context.
    """
    template = config.template
    stop = config.sampling.stop or template.stop
    seed = secrets.randbits(32) if config.sampling.seed is None else config.sampling.seed
    params = replace(config.sampling, stop=stop, seed=seed)
    engine = make_engine(
        config.engine.engine,
        config.model,
        load_tokenizer(config.model),
        resolve_device(config.engine.engine_device),
        dtype=getattr(torch, config.precision),
        gpu_memory_utilization=config.engine.gpu_memory_utilization,
        compiled=config.engine.compiled,
        progress=sys.stderr.isatty(),
    )
    with closing(engine):
        worker = RolloutWorker(engine, template, grade=None)
        if config.questions:
            _show(worker.generate([Example(question, answer="") for question in config.questions], params), params.n)
            return
        print("Type a question. An empty line ends.")
        while question := _next_question():
            _show(worker.generate([Example(question, answer="")], params), params.n)
            seed += 1  # so that the same question gets another response
            params = replace(params, seed=seed)


def _next_question() -> str:
    try:
        return input("> ").encode(errors="replace").decode()  # bytes that are not UTF-8 arrive as surrogates
    except EOFError:
        return ""


def _show(rollouts: Sequence[Rollout], samples: int) -> None:
    """Print responses, each under a heading if there are several."""
    for index, rollout in enumerate(rollouts):
        if len(rollouts) > 1:
            question, sample = divmod(index, samples)
            print(f"--- question {question + 1}" + (f", sample {sample + 1}" if samples > 1 else ""))
        completion = rollout.completion
        print(completion.text, flush=True)
        if completion.finish_reason == "length":
            print(f"(cut short after {len(completion.token_ids)} tokens)", file=sys.stderr)
