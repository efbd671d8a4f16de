"""Ask a model questions, and read what it answers."""

import secrets
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import torch
from tyro.conf import Positional

from cs336_alignment.engines import SamplingParams, make_engine
from cs336_alignment.example import Example
from cs336_alignment.generation_log import Generation
from cs336_alignment.policy import Precision
from cs336_alignment.pretrained import load_tokenizer, resolve_device
from cs336_alignment.prompts import PromptTemplate, load_prompt
from cs336_alignment.rollouts import EngineConfig, Rollouts

#: A question as it is.
BARE = PromptTemplate("bare", "{question}")


@dataclass(frozen=True)
class GenerateConfig:
    """What to ask, and how the model answers."""

    questions: Positional[tuple[str, ...]] = ()
    """What to ask, all at once. Default: ask for questions, until an empty line or Ctrl-D."""
    model: str = "Qwen/Qwen2.5-Math-1.5B"
    """The model: a folder of Hugging Face, such as a checkpoint of a run, or a name on its hub."""
    prompt: str | None = "r1_zero"
    """The template that questions go into: the name of a built-in one, or a file's path; None for the bare text."""
    precision: Precision = "bfloat16"
    """What the engine computes in."""
    sampling: SamplingParams = SamplingParams()
    """How tokens are chosen. Without --stop, the strings that go with the prompt end a response."""
    engine: EngineConfig = EngineConfig()
    """What generates."""

    def __post_init__(self) -> None:
        _ = self.template

    @property
    def template(self) -> PromptTemplate:
        return BARE if self.prompt is None else load_prompt(self.prompt)


def generate(config: GenerateConfig) -> None:
    """Print the responses to all questions; if there are none, to those that are typed.

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
        rollouts = Rollouts(engine, template, grade=None)

        def respond(questions: Sequence[str], params: SamplingParams) -> None:
            _show(rollouts.respond([Example(question, answer="") for question in questions], params), params.n)

        if config.questions:
            respond(config.questions, params)
            return
        print("Type a question. An empty line ends.")
        while question := _next_question():
            respond([question], params)
            seed += 1  # the same question again gives another response
            params = replace(params, seed=seed)


def _next_question() -> str:
    try:
        return input("> ").encode(errors="replace").decode()  # what is no UTF-8 arrives as surrogates
    except EOFError:
        return ""


def _show(generations: Sequence[Generation], samples: int) -> None:
    """Print responses, each below a heading if there are several."""
    for index, generation in enumerate(generations):
        if len(generations) > 1:
            question, sample = divmod(index, samples)
            print(f"--- question {question + 1}" + (f", sample {sample + 1}" if samples > 1 else ""))
        completion = generation.completion
        print(completion.text, flush=True)
        if completion.finish_reason == "length":
            print(f"(cut short after {len(completion.token_ids)} tokens)", file=sys.stderr)
