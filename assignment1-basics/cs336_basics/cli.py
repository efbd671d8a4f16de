"""The command line: `cs336-basics <command>`, or `python -m cs336_basics <command>`.

Each command imports what it needs when it is executed, so `--help` does not wait for PyTorch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional

from cs336_basics.command import run_command
from cs336_basics.corpus import END_OF_TEXT
from cs336_basics.demo import DemoConfig, run_demo
from cs336_basics.model_config import SamplingConfig
from cs336_basics.presets import MODELS, TRAIN
from cs336_basics.pretokenization import DecodeErrors
from cs336_basics.train_config import TrainConfig

if TYPE_CHECKING:
    from rich.progress import Progress

    ModelName = str
    TrainPreset = TrainConfig
else:
    ModelName = Literal[tuple(MODELS)]
    # One subcommand per preset, whose options start from the preset's values.
    TrainPreset = OmitArgPrefixes[
        tyro.conf.OmitSubcommandPrefixes[
            tyro.extras.subcommand_type_from_defaults(
                {name: config for name, (_, config) in TRAIN.items()}, {name: what for name, (what, _) in TRAIN.items()}
            )
        ]
    ]


@dataclass(frozen=True)
class TrainBPE:
    """Train a byte-level BPE tokenizer on a text file."""

    text: Positional[Path]
    """UTF-8 text whose documents are separated by a special token."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder to write vocab.json and merges.txt to."""
    vocab_size: int = 10_000
    """The most tokens in the vocabulary, including the 256 bytes and the special tokens."""
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    """Strings that become one token each."""
    num_workers: int | None = None
    """Processes that count words. Default: one per available core. The result does not depend on it."""
    errors: DecodeErrors = "strict"
    """How to treat bytes that are not UTF-8: strict stops and says where they are, replace reads them as U+FFFD."""

    def execute(self) -> None:
        from cs336_basics.bpe import train_bpe
        from cs336_basics.tokenizer import Tokenizer

        started = time.perf_counter()
        size = _size_of(self.text)
        with _progress() as progress:
            reading = progress.add_task("count words", total=size)
            merging = progress.add_task("merge pairs", total=None, visible=False)

            def show(what: str, done: int) -> None:
                if what == "bytes read":
                    progress.update(reading, completed=done)
                elif done % 100 == 0:
                    progress.update(merging, visible=True, description=f"merge pairs: {done:,}")

            vocab, merges = train_bpe(
                self.text,
                self.vocab_size,
                self.special_tokens,
                num_workers=self.num_workers,
                errors=self.errors,
                progress=show,
            )
        Tokenizer(vocab, merges, self.special_tokens).save(self.output)
        print(f"{len(vocab):,} tokens from {size:,} bytes in {time.perf_counter() - started:.1f} s")
        print(f"the longest: {max(vocab.values(), key=len)!r}")
        print(f"written: {self.output / 'vocab.json'}, {self.output / 'merges.txt'}")


@dataclass(frozen=True)
class Tokenize:
    """Turn a text file into a token file for training."""

    text: Positional[Path]
    """UTF-8 text."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """The token file to write: a .npy array, which training maps into memory."""
    tokenizer: Path
    """Folder with vocab.json and merges.txt."""
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    """Strings that are one token each."""
    num_workers: int | None = None
    """Processes that tokenize. Default: one per available core. The result does not depend on it."""
    errors: DecodeErrors = "strict"
    """How to treat bytes that are not UTF-8: strict stops and says where they are, replace reads them as U+FFFD."""

    def execute(self) -> None:
        from cs336_basics.data import tokenize_file
        from cs336_basics.load_run import load_tokenizer

        started = time.perf_counter()
        size = _size_of(self.text)
        if self.output.suffix != ".npy":
            raise ValueError(f"the output {self.output} must end in .npy")
        tokenizer = load_tokenizer(self.tokenizer, self.special_tokens)
        with _progress() as progress:
            task = progress.add_task("tokenize", total=size)
            count = tokenize_file(
                tokenizer,
                self.text,
                self.output,
                num_workers=self.num_workers,
                errors=self.errors,
                progress=lambda done: progress.update(task, completed=done),
            )
        seconds = time.perf_counter() - started
        rate = f"{size / max(count, 1):.2f} bytes per token, {size / seconds / 1e6:.1f} MB/s"
        print(f"{count:,} tokens, {rate}; written: {self.output}")


@dataclass(frozen=True)
class Train:
    """Train a model, starting from a preset. The same command resumes an interrupted run."""

    config: TrainPreset

    def execute(self) -> None:
        from cs336_basics.training import train

        report(self.config, train(self.config))


def report(config: TrainConfig, latest: dict[str, float]) -> None:
    """Print how a run ended, and plot its losses."""
    from cs336_basics.plots import plot_loss

    if "loss" in latest and "valid_loss" in latest:
        print(f"step {config.steps}: training loss {latest['loss']:.4f}, validation loss {latest['valid_loss']:.4f}")
    plot_loss(config.run_dir, config.run_dir / "loss.png")
    print(f"written: {config.run_dir}/ (metrics.jsonl, loss.png, checkpoints/)")


@dataclass(frozen=True)
class Generate:
    """Continue texts with a trained model."""

    run_dir: Annotated[Path, tyro.conf.arg(aliases=["--run"])]
    """Run folder of the model."""
    prompt: tuple[str, ...] = ("",)
    """Texts to continue, all at once. An empty one starts a new document."""
    interactive: bool = False
    """Continue the prompt, if there is one, then ask for more until an empty line or Ctrl-D."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, top_p=0.95)
    """How tokens are chosen."""
    checkpoint: Path | None = None
    """Checkpoint file to load. Default: the latest of the run."""
    tokenizer: Path | None = None
    """Folder of the tokenizer. Default: the run folder, which has a copy."""
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    """The tokenizer's special tokens. The first of them ends a document."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for a GPU if there is one."""

    def execute(self) -> None:
        from cs336_basics.generation import print_continuations
        from cs336_basics.load_run import check_vocabulary, load_model, load_tokenizer

        model = load_model(self.run_dir, self.device, self.checkpoint)
        tokenizer = load_tokenizer(self.tokenizer or self.run_dir, self.special_tokens)
        check_vocabulary(model, tokenizer)
        sampling = self.sampling
        if not self.interactive or any(self.prompt):
            print_continuations(model, tokenizer, self.prompt, sampling)
        if not self.interactive:
            return
        print("Type the beginning of a text. An empty line ends.")
        while True:
            try:
                prompt = input("> ").encode(errors="replace").decode()
            except EOFError:
                return
            if not prompt:
                return
            print_continuations(model, tokenizer, (prompt,), sampling)
            if sampling.seed is not None:  # so that the same prompt has another continuation next time
                sampling = replace(sampling, seed=sampling.seed + 1)


@dataclass(frozen=True)
class Accounting:
    """Print the parameters, floating-point operations and memory of a model."""

    model: Positional[ModelName]
    """Name of a preset, whose model is used."""
    context_length: int | None = None
    """Tokens per sequence. Default: the model's context length."""
    batch_size: int = 1
    """Sequences per step."""
    memory_gb: float = 80.0
    """Memory of a GPU, in GB (10^9 bytes), for which to find the largest batch."""
    bytes_per_number: int = 4
    """4 for float32, 2 for bfloat16."""

    def execute(self) -> None:
        from cs336_basics.accounting import print_tables

        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, but must be at least 1")
        config = MODELS[self.model]
        if self.context_length is not None:
            config = replace(config, context_length=self.context_length)
        print_tables(self.model, config, self.batch_size, self.memory_gb, self.bytes_per_number)


@dataclass(frozen=True)
class Demo(DemoConfig):
    """Go from a text to a model that continues it, in a few minutes on a CPU."""

    def execute(self) -> None:
        run_demo(self)


Command = (
    Annotated[TrainBPE, tyro.conf.subcommand("train-bpe")]
    | Annotated[Tokenize, tyro.conf.subcommand("tokenize")]
    | Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Generate, tyro.conf.subcommand("generate")]
    | Annotated[Accounting, tyro.conf.subcommand("accounting")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command. A user's mistake is reported in one line, with exit status 2."""
    run_command(
        Command,
        "cs336-basics",
        args,
        interrupted="training resumes when the same command is run again",
        out_of_memory="lower --batch-size, or raise --microbatches",
    )


def _size_of(path: Path) -> int:
    if not path.is_file():
        raise FileNotFoundError(f"there is no text {path}")
    return path.stat().st_size


def _progress() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


if __name__ == "__main__":
    main()
