"""A tiny model with questions for training and evaluation, in the files that a user would have."""

import json
from dataclasses import dataclass
from pathlib import Path

from cs336_alignment.policy.tiny_model import make_tiny_model
from cs336_alignment.rollouts.config import EngineConfig, EvaluationConfig, RolloutConfig

#: Numbers whose sums with 1 are asked for.
TRAIN, TEST = range(40), range(100, 116)


@dataclass(frozen=True)
class TinyTask:
    folder: Path

    @classmethod
    def make(cls, folder: Path) -> "TinyTask":
        make_tiny_model(folder / "model", hidden_size=32, layers=1, context_length=128, initializer_range=0.1)
        for name, numbers in (("train", TRAIN), ("test", TEST)):
            rows = [{"question": f"{n}+1", "trace": f"{n}+1={n + 1}", "answer": str(n + 1)} for n in numbers]
            write_rows(folder / f"{name}.jsonl", rows)
        rows = [
            {
                "prompt": f"{n}+1=",
                "response": f" </think> <answer>{n + 1 + n % 2}</answer>",  # wrong for odd numbers
                "ground_truth": str(n + 1),
            }
            for n in TRAIN
        ]
        write_rows(folder / "sft.jsonl", rows)
        (folder / "sum.prompt").write_text("{question}=")
        return cls(folder)

    @property
    def common(self) -> dict:
        """Options of all training programs."""
        return {
            "run_dir": self.folder / "run",
            "model": str(self.folder / "model"),
            "device": "cpu",
            "precision": "float32",
        }

    def rollouts(self, **changes) -> RolloutConfig:
        fields = {
            "prompt": str(self.folder / "sum.prompt"),
            "stop": ("</answer>",),
            "max_tokens": 12,
            "grading_workers": 1,
            "engine": EngineConfig("transformers"),
        }
        return RolloutConfig(**(fields | changes))

    def evaluation(self, **changes) -> EvaluationConfig:
        return EvaluationConfig(**({"eval_data": self.folder / "test.jsonl", "eval_examples": 8} | changes))


def write_rows(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
