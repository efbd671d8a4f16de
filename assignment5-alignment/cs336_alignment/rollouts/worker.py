"""The rollout worker: questions are inserted into a prompt, an engine responds, and a reward function grades."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from cs336_alignment.datasets.example import Example
from cs336_alignment.policy.config import Precision
from cs336_alignment.policy.loading import load_tokenizer, resolve_device
from cs336_alignment.policy.policy import Policy
from cs336_alignment.prompts.templates import PromptTemplate, load_prompt
from cs336_alignment.rollouts.config import RolloutConfig, SamplingParams
from cs336_alignment.rollouts.engines import InferenceEngine, make_engine
from cs336_alignment.rollouts.grader import Grade, open_grader
from cs336_alignment.rollouts.rollout import Rollout
from cs336_alignment.runs.training_run import TrainingRun

#: Makes a context manager that times a phase of the work, given its name, such as `RunLog.phase`.
PhaseTimer = Callable[[str], AbstractContextManager[Any]]

#: Bytes of GPU memory for everything else: the CUDA context, workspaces, and what PyTorch's allocator cannot release.
OTHER_BYTES = 4 * 10**9
#: Bytes per parameter of a policy that AdamW trains: the weight and two moments in float32. There are no gradients
#: while vLLM generates.
POLICY_BYTES = 12


class RolloutWorker:
    """Generates responses and grades them.

    Args:
        grade: grades responses; None for no grading.
        colocated: whether the engine shares a device with the policy, and sleeps while the policy is trained.
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

    def sync_weights(self, policy: Policy, update: int) -> None:
        """Wake the engine and give it the weights that the policy has after this update."""
        with self._phase("weight_sync"):
            if self._colocated:
                torch.cuda.empty_cache()  # memory that PyTorch holds in reserve
                self._engine.wake()
            if update != self._loaded_update:
                self._engine.load_weights(policy.model.state_dict())
                self._loaded_update = update

    def sleep(self) -> None:
        """Leave the GPU's memory to the policy until `sync_weights`."""
        if self._colocated:
            with self._phase("weight_sync"):
                self._engine.sleep()

    def generate(self, examples: Sequence[Example], params: SamplingParams) -> list[Rollout]:
        """Generate and grade `params.n` responses to each example. Those to one example are adjacent.

        Raises:
            ValueError: a prompt does not fit into the model's context.
            FloatingPointError: the model's probabilities are NaN.
        """
        prompts = [self._template.render(example.prompt) for example in examples]
        with self._phase("rollout"):
            completions = self._engine.generate(prompts, params)
        responses = [
            (example, prompt, completion)
            for example, prompt, group in zip(examples, prompts, completions, strict=True)
            for completion in group
        ]
        if any(math.isnan(log_prob) for _, _, completion in responses for log_prob in completion.log_probs):
            raise FloatingPointError(
                "the model's probabilities are NaN, so its weights are broken; "
                "if it is being trained, lower the learning rate and start a new run"
            )
        rewards: list[dict[str, float]] = [{}] * len(responses)
        if self._grade:
            with self._phase("grading"):
                texts = [completion.text for _, _, completion in responses]
                rewards = self._grade(texts, [example.answer for example, _, _ in responses])
        return [Rollout(*response, graded) for response, graded in zip(responses, rewards, strict=True)]


@contextmanager
def open_rollout_worker(
    config: RolloutConfig,
    model: str | Path,
    precision: Precision,
    *,
    policy: Policy | None = None,
    seed: int = 0,
    bytes_per_parameter: int = POLICY_BYTES,
    phase: PhaseTimer = nullcontext,
) -> Iterator[RolloutWorker]:
    """Start an engine and a grader.

    Args:
        model: the model that the engine starts with: a Hugging Face folder or a name on the hub.
        precision: type that the engine computes in.
        policy: the policy that is trained at the same time, if there is one.
        seed: of an engine with a random number generator of its own.
        bytes_per_parameter: memory that training holds on the policy's device while the engine generates.
        phase: see `RolloutWorker`.

    Raises:
        ValueError, FileNotFoundError: the engine cannot run here, or the model or the prompt cannot be read.
    """
    options = config.engine
    device = _device(options.engine_device, policy)
    colocated = policy is not None and policy.device == device
    if policy is not None and colocated and device.type == "cuda" and options.engine == "vllm":
        parameters = sum(parameter.numel() for parameter in policy.model.parameters())
        in_use = bytes_per_parameter * parameters + OTHER_BYTES
        check_memory(options.gpu_memory_utilization, in_use, torch.cuda.mem_get_info(device)[1])
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
        worker = RolloutWorker(engine, load_prompt(config.prompt), grade, colocated, phase)
        worker.sleep()
        yield worker


def open_training_worker(
    run: TrainingRun, config: RolloutConfig, bytes_per_parameter: int = POLICY_BYTES
) -> AbstractContextManager[RolloutWorker]:
    """Start an engine and a grader for the policy of a training run, whose log times them; see above."""
    return open_rollout_worker(
        config,
        run.source,
        run.config.precision,
        policy=run.policy,
        seed=run.config.seed,
        bytes_per_parameter=bytes_per_parameter,
        phase=run.log.phase,
    )


def _device(name: str, policy: Policy | None) -> torch.device:
    if name != "auto" or policy is None:
        return torch.empty(0, device=resolve_device(name)).device  # "cuda" becomes "cuda:0", as a policy's device is
    if policy.device.type == "cuda" and torch.cuda.device_count() > 1:
        return torch.device("cuda", (policy.device.index + 1) % torch.cuda.device_count())
    return policy.device


def check_memory(gpu_memory_utilization: float, in_use: int, gpu_bytes: int) -> None:
    """Raise a ValueError unless vLLM, when it wakes, fits on the GPU that it shares with the policy.

    Args:
        in_use: bytes that training holds on that GPU.
        gpu_bytes: size of the GPU's memory.
    """
    if gpu_memory_utilization * gpu_bytes + in_use > gpu_bytes:
        highest = max(0.0, math.floor(100 * (1 - in_use / gpu_bytes)) / 100)
        raise ValueError(
            f"gpu_memory_utilization is {gpu_memory_utilization}, but training on the same GPU keeps "
            f"{in_use / 1e9:.0f} of its {gpu_bytes / 1e9:.0f} GB; set it to at most {highest}, or give vLLM a GPU of "
            "its own with --engine-device"
        )
