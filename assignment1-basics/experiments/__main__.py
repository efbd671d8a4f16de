"""`python -m experiments <command>`: run the experiments of a written problem, or a benchmark."""

from functools import reduce
from operator import or_
from typing import Annotated, Any

from tyro.conf import subcommand

from cs336_basics.command import run_command
from experiments.accounting_tables import AccountingTables
from experiments.benchmarks.shared_machine import SharedMachine
from experiments.benchmarks.throughput import Throughput
from experiments.benchmarks.tokenizer import TokenizerBenchmark
from experiments.benchmarks.training_step import TrainingStepBenchmark
from experiments.figures import Figures
from experiments.leaderboard.ladder import Leaderboard
from experiments.learning_rate_tuning import LearningRateTuning
from experiments.models import TrainModels
from experiments.samples import Samples
from experiments.tokenizer_experiments import TokenizerExperiments
from experiments.train_bpe import TrainBPE

COMMANDS = {
    "train-bpe": TrainBPE,
    "tokenizer-experiments": TokenizerExperiments,
    "learning-rate-tuning": LearningRateTuning,
    "accounting": AccountingTables,
    "throughput": Throughput,
    "train-models": TrainModels,
    "leaderboard": Leaderboard,
    "samples": Samples,
    "figures": Figures,
    "benchmark-tokenizer": TokenizerBenchmark,
    "benchmark-training-step": TrainingStepBenchmark,
    "shared-machine": SharedMachine,
}


def main() -> None:
    """Run a command of the command line."""
    commands: Any = reduce(or_, [Annotated[options, subcommand(name)] for name, options in COMMANDS.items()])
    run_command(
        commands,
        "experiments",
        interrupted="finished runs are kept; the same command resumes",
        out_of_memory="run fewer models at once with --workers",
    )


if __name__ == "__main__":
    main()
