"""`python -m experiments <problem>`: run the experiments of a written problem."""

from typing import Annotated

from tyro.conf import subcommand

from cs336_basics.command import run_command
from experiments.accounting_tables import AccountingTables
from experiments.figures import Figures
from experiments.leaderboard import Leaderboard
from experiments.learning_rate_tuning import LearningRateTuning
from experiments.models import TrainModels
from experiments.samples import Samples
from experiments.throughput import Throughput
from experiments.tokenizer_experiments import TokenizerExperiments
from experiments.train_bpe import TrainBPE

Command = (
    Annotated[TrainBPE, subcommand("train-bpe")]
    | Annotated[TokenizerExperiments, subcommand("tokenizer-experiments")]
    | Annotated[LearningRateTuning, subcommand("learning-rate-tuning")]
    | Annotated[AccountingTables, subcommand("accounting")]
    | Annotated[Throughput, subcommand("throughput")]
    | Annotated[TrainModels, subcommand("train-models")]
    | Annotated[Leaderboard, subcommand("leaderboard")]
    | Annotated[Samples, subcommand("samples")]
    | Annotated[Figures, subcommand("figures")]
)

if __name__ == "__main__":
    run_command(
        Command,
        "experiments",
        interrupted="finished runs are kept, and the same command goes on",
        out_of_memory="run fewer processes at once with --workers",
    )
