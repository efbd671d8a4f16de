"""Options of `evaluate`, and the course's benchmarks."""

from dataclasses import dataclass, field
from pathlib import Path

from cs336_alignment.policy.config import Precision, check_positive
from cs336_alignment.rollouts.config import RolloutConfig


@dataclass(frozen=True)
class EvaluateConfig:
    """Options of an evaluation. The defaults are zero-shot evaluation on MATH with the R1-Zero prompt."""

    output: Path = Path("runs/evaluate")
    """Folder to write metrics.json, generations.jsonl and config.json to."""
    model: str = "Qwen/Qwen2.5-Math-1.5B"
    """The model: a Hugging Face folder, such as a checkpoint of a run, or a name on the hub."""
    data: Path = Path("data/math/test.jsonl")
    """File with the questions."""
    kind: str | None = None
    """Which data set the file belongs to. Default: decided by the fields of its first row."""
    max_examples: int | None = None
    """Evaluate on a random subset of this many questions, always the same. Default: all of them."""
    precision: Precision = "bfloat16"
    """Number format that the engine computes in."""
    seed: int = 0
    """Seed of the samples."""
    rollouts: RolloutConfig = field(default_factory=RolloutConfig)
    """How responses are sampled and graded."""

    def __post_init__(self) -> None:
        check_positive(self, "max_examples")


def _benchmark(kind: str, data: str, reward: str | None) -> EvaluateConfig:
    """Make a benchmark of the course's supplement: greedy decoding after the system prompt."""
    rollouts = RolloutConfig(prompt="zero_shot_system", reward=reward, temperature=0.0)
    return EvaluateConfig(Path(f"runs/evaluate_{kind}"), data=Path(data), kind=kind, rollouts=rollouts)


#: How the course evaluates each data set.
BENCHMARKS = {
    "math": EvaluateConfig(),
    "mmlu": _benchmark("mmlu", "data/mmlu/csv/data/test", "mmlu"),
    "gsm8k": _benchmark("gsm8k", "data/gsm8k/test.jsonl", "gsm8k"),
    "alpaca_eval": _benchmark("alpaca_eval", "data/alpaca-eval/alpaca_eval.json", None),
    "simple_safety_tests": _benchmark("simple_safety_tests", "data/simple-safety-tests/test.jsonl", None),
}
