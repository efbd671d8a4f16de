"""Rollouts: questions go into a prompt, an engine responds, a reward function grades."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cs336_alignment.engines import EngineName, InferenceEngine, SamplingParams, make_engine
from cs336_alignment.example import Example
from cs336_alignment.generation_log import Generation
from cs336_alignment.policy import Policy, Precision
from cs336_alignment.pretrained import load_tokenizer, resolve_device
from cs336_alignment.prompts import PromptTemplate, load_prompt
from cs336_alignment.rewards import REWARDS, Grade, open_grader

#: Makes a context manager around a phase of the work, by its name, such as `RunLog.phase`.
PhaseTimer = Callable[[str], AbstractContextManager[Any]]

#: What else there is: CUDA's own, workspaces, and what PyTorch cannot give back of its reserve.
OTHER_BYTES = 4 * 10**9
#: Of a policy that AdamW trains: its value and two moments in float32. (Gradients are gone while vLLM generates.)
POLICY_BYTES = 12


@dataclass(frozen=True)
class EngineConfig:
    """What generates, and where."""

    engine: EngineName = "vllm"
    """vllm, or transformers: slower, and nothing to install."""
    engine_device: str = "auto"
    """Where it generates. auto: in training on the second GPU, if there is one, else where the policy is."""
    gpu_memory_utilization: float = 0.85
    """Share of that GPU's memory which vLLM takes while it generates."""
    compiled: bool | None = None
    """Generate with compiled code and CUDA graphs, which take up to a minute to prepare and then are several times
    as fast. Default: on a GPU."""

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization is {self.gpu_memory_utilization}, but must be above 0 and at most 1"
            )


@dataclass(frozen=True)
class RolloutConfig:
    """How responses come about, and what they are worth."""

    prompt: str = "r1_zero"
    """The template that questions go into: the name of a built-in one, or a file's path."""
    reward: str | None = "r1_zero"
    """The reward function, by name; None grades nothing."""
    stop: tuple[str, ...] | None = None
    """Strings that end a response, of which they stay a part. Default: those that go with the prompt."""
    temperature: float = 1.0
    """Logits are divided by it before sampling; 0 takes the most probable token."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens that has this probability together."""
    max_tokens: int = 1024
    """The most tokens of a response."""
    grading_workers: int = 4
    """Processes that grade."""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """What generates."""

    def __post_init__(self) -> None:
        if self.reward is not None and self.reward not in REWARDS:
            raise ValueError(f"there is no reward {self.reward!r}; choose one of {', '.join(REWARDS)}")
        self.sampling()

    def sampling(self, **changes: Any) -> SamplingParams:
        """The parameters of sampling, some of them changed.

        Raises:
            ValueError: there is no such prompt, or one cannot sample like this.
        """
        stop = load_prompt(self.prompt).stop if self.stop is None else self.stop
        return replace(SamplingParams(self.temperature, self.top_p, self.max_tokens, stop=stop), **changes)


class Rollouts:
    """Generates responses and grades them.

    Args:
        grade: None grades nothing.
        colocated: the engine shares a device with the policy, and sleeps while that is trained.
        phase: called around each phase of the work.
    """

    def __init__(
        self,
        engine: InferenceEngine,
        template: PromptTemplate,
        grade: Grade | None,
        colocated: bool = False,
        phase: PhaseTimer = nullcontext,
    ) -> None:
        self._engine = engine
        self._template = template
        self._grade = grade
        self._colocated = colocated
        self._phase = phase
        self._loaded_update: int | None = None

    def load(self, policy: Policy, update: int) -> None:
        """Make the engine ready to generate with the weights of the policy after this update."""
        with self._phase("weight_sync"):
            if self._colocated:
                torch.cuda.empty_cache()  # what PyTorch holds in reserve
                self._engine.wake()
            if update != self._loaded_update:
                self._engine.load_policy(policy.model.state_dict())
                self._loaded_update = update

    def rest(self) -> None:
        """Leave the GPU's memory to the policy, until `load`."""
        if self._colocated:
            with self._phase("weight_sync"):
                self._engine.sleep()

    def respond(self, examples: Sequence[Example], params: SamplingParams) -> list[Generation]:
        """Graded responses: `params.n` for each example, next to each other.

        Raises:
            ValueError: a prompt does not fit into the model's context.
            FloatingPointError: the model's probabilities are no numbers.
        """
        prompts = [self._template.render(example.prompt) for example in examples]
        with self._phase("rollout"):
            completions = self._engine.generate(prompts, params)
        drawn = [
            (example, prompt, completion)
            for example, prompt, responses in zip(examples, prompts, completions, strict=True)
            for completion in responses
        ]
        if any(math.isnan(log_prob) for _, _, completion in drawn for log_prob in completion.log_probs):
            raise FloatingPointError(
                "the model's probabilities are no numbers (NaN), so that its weights are broken; "
                "if it is being trained, lower the learning rate and start a new run"
            )
        rewards: list[dict[str, float]] = [{}] * len(drawn)
        if self._grade:
            with self._phase("grading"):
                texts = [completion.text for _, _, completion in drawn]
                rewards = self._grade(texts, [example.answer for example, _, _ in drawn])
        return [Generation(*each, graded) for each, graded in zip(drawn, rewards, strict=True)]


@contextmanager
def open_rollouts(
    config: RolloutConfig,
    model: str | Path,
    precision: Precision,
    *,
    policy: Policy | None = None,
    seed: int = 0,
    bytes_per_parameter: int = POLICY_BYTES,
    phase: PhaseTimer = nullcontext,
) -> Iterator[Rollouts]:
    """Start an engine and a grader.

    Args:
        model: what the engine begins with: a folder of Hugging Face or a name on its hub.
        precision: what the engine computes in.
        policy: what is trained meanwhile, if something is.
        seed: of an engine that has a random number generator of its own.
        bytes_per_parameter: that training keeps on the policy's device while the engine generates.
        phase: see `Rollouts`.

    Raises:
        ValueError, FileNotFoundError: the engine cannot run here, or the model or the prompt cannot be read.
    """
    options = config.engine
    device = _device(options.engine_device, policy)
    colocated = policy is not None and policy.device == device
    if policy is not None and colocated and device.type == "cuda" and options.engine == "vllm":
        parameters = sum(parameter.numel() for parameter in policy.model.parameters())
        kept = bytes_per_parameter * parameters + OTHER_BYTES
        check_memory(options.gpu_memory_utilization, kept, torch.cuda.mem_get_info(device)[1])
    with ExitStack() as stack:
        engine = make_engine(
            options.engine,
            model,
            policy.tokenizer if policy else load_tokenizer(model),
            device,
            policy=policy.model if policy else None,
            dtype=getattr(torch, precision),
            gpu_memory_utilization=options.gpu_memory_utilization,
            compiled=options.compiled,
            seed=seed,
            progress=policy is None and sys.stderr.isatty(),
        )
        stack.enter_context(closing(engine))
        grade = None
        if config.reward is not None:
            grade = stack.enter_context(open_grader(config.reward, config.grading_workers))
        rollouts = Rollouts(engine, load_prompt(config.prompt), grade, colocated, phase)
        rollouts.rest()
        yield rollouts


def _device(name: str, policy: Policy | None) -> torch.device:
    if name != "auto" or policy is None:
        return torch.empty(0, device=resolve_device(name)).device  # "cuda" becomes "cuda:0", as of a policy
    if policy.device.type == "cuda" and torch.cuda.device_count() > 1:
        return torch.device("cuda", (policy.device.index + 1) % torch.cuda.device_count())
    return policy.device


def check_memory(gpu_memory_utilization: float, kept: int, gpu_bytes: int) -> None:
    """Raise a ValueError unless vLLM, when it wakes, has room beside the policy that it shares a GPU with.

    Args:
        kept: bytes that are in use there by then.
        gpu_bytes: the GPU's memory.
    """
    if gpu_memory_utilization * gpu_bytes + kept > gpu_bytes:
        highest = max(0.0, math.floor(100 * (1 - kept / gpu_bytes)) / 100)
        raise ValueError(
            f"gpu_memory_utilization is {gpu_memory_utilization}, but training on the same GPU keeps "
            f"{kept / 1e9:.0f} of its {gpu_bytes / 1e9:.0f} GB; set it to at most {highest}, or give vLLM a GPU of its "
            "own with --engine-device"
        )
