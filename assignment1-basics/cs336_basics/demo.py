"""Go from a text to a model that continues it, in minutes on a laptop: every stage of the package in one program.

The functions import the stages when they run, so that `demo --help` does not wait for PyTorch.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cs336_basics.corpus import END_OF_TEXT, split_text, write_standard_library
from cs336_basics.model_config import ModelConfig, SamplingConfig
from cs336_basics.run_folder import write_atomically
from cs336_basics.train_config import OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from rich.console import Console

    from cs336_basics.tokenizer import Tokenizer

#: The most bytes of the user's own text that the demo reads; more would only lengthen the preparation.
MAX_BYTES = 20_000_000


@dataclass(frozen=True)
class DemoConfig:
    """Options of the demo. With the defaults it takes a few minutes on two cores."""

    data: Path | None = None
    """A UTF-8 text to learn from. Default: the source code of this Python's standard library."""
    run_dir: Annotated[Path | None, tyro.conf.arg(aliases=["--run"])] = None
    """Folder for everything the demo makes. Default: runs/demo, or runs/demo-NAME for a text of your own."""
    prompt: str | None = None
    """Beginning of the samples. Default: "def " for the standard library, otherwise the beginning of a document."""
    steps: int = 500
    """Training steps."""
    batch_size: int = 16
    """Sequences per step."""
    model: ModelConfig = ModelConfig(vocab_size=2_048, context_length=128, d_model=192, num_layers=4, num_heads=6)
    """Shape of the model. The tokenizer is trained to the same vocab_size."""
    lr: float = 4e-3
    """Highest learning rate."""


def run_demo(config: DemoConfig) -> None:
    """Build a corpus, train a tokenizer and a model on it, and print samples."""
    from rich.console import Console

    from cs336_basics.plots import plot_loss
    from cs336_basics.training import train

    if config.data is not None:  # the shell may not have expanded ~
        config = replace(config, data=config.data.expanduser())
    console = Console(highlight=False, soft_wrap=True)
    run_dir = config.run_dir or Path("runs") / (f"demo-{config.data.stem}" if config.data else "demo")
    tokenizer = _prepare(config, run_dir, console)

    console.rule("[bold]A Transformer learns to continue it")
    train(
        TrainConfig(
            run_dir=run_dir,
            train_data=run_dir / "data" / "train.npy",
            valid_data=run_dir / "data" / "valid.npy",
            model=replace(config.model, vocab_size=len(tokenizer.vocab)),
            optimizer=OptimizerConfig(lr=config.lr, min_lr=config.lr / 10, warmup_steps=max(1, config.steps // 20)),
            steps=config.steps,
            batch_size=config.batch_size,
            eval_every=max(1, config.steps // 10),
            eval_sequences=128,
            checkpoint_every=max(1, config.steps // 5),
            device="cpu",
        )
    )
    plot_loss(run_dir, run_dir / "loss.png")

    console.rule("[bold]Three samples")
    _print_samples(config, run_dir, tokenizer, console)
    _print_what_next(run_dir, console)


def _prepare(config: DemoConfig, run_dir: Path, console: "Console") -> "Tokenizer":
    """Make corpus, tokenizer and token files, unless an earlier call has made them from the same source."""
    from cs336_basics.load_run import load_tokenizer

    data = run_dir / "data"
    source: dict[str, int | str | None] = {"vocab_size": config.model.vocab_size, "data": None}
    if config.data is not None:
        if not config.data.is_file():
            raise FileNotFoundError(f"there is no text {config.data}; give DATA=path/to/a/text.txt")
        stat = config.data.stat()
        source["data"] = f"{config.data.resolve()}, {stat.st_size} bytes, changed {stat.st_mtime_ns}"
    marker = data / "source.json"  # written last
    if marker.exists():
        if json.loads(marker.read_text(encoding="utf-8")) != source:
            raise ValueError(
                f"{run_dir} holds a demo of another text or vocabulary; delete it, or choose another folder with --run"
            )
        console.print(f"{run_dir} has its corpus and tokenizer already")
        return load_tokenizer(data)
    shutil.rmtree(data, ignore_errors=True)
    _make_corpus(config, data, console)
    tokenizer = _make_tokenizer(config, data, console)
    write_atomically(marker, json.dumps(source))
    return tokenizer


def _make_corpus(config: DemoConfig, data: Path, console: "Console") -> None:
    console.rule("[bold]A corpus")
    with _timed(console):
        if config.data is None:
            documents, held_out = write_standard_library(data / "train.txt", data / "valid.txt")
            what = f"{documents} modules of your Python's standard library, {held_out} more for validation"
        else:
            used = split_text(config.data, data / "train.txt", data / "valid.txt", MAX_BYTES)
            what = f"{used:,} characters of {config.data}, the last twentieth for validation"
            if config.data.stat().st_size > MAX_BYTES:
                what += f" (the demo reads no more than {MAX_BYTES / 1e6:.0f} MB)"
        console.print(f"{what}: {(data / 'train.txt').stat().st_size / 1e6:.1f} MB")


def _make_tokenizer(config: DemoConfig, data: Path, console: "Console") -> "Tokenizer":
    """Train the tokenizer, and write the token files."""
    from rich.markup import escape

    from cs336_basics.bpe import train_bpe
    from cs336_basics.data import tokenize_file
    from cs336_basics.tokenizer import Tokenizer

    console.rule("[bold]Byte-pair encoding")
    with _timed(console):
        vocab, merges = train_bpe(data / "train.txt", config.model.vocab_size, [END_OF_TEXT])
        tokenizer = Tokenizer(vocab, merges, [END_OF_TEXT])
        tokenizer.save(data)
        longest = sorted(vocab.values(), key=len, reverse=True)[:6]
        console.print(
            f"{len(vocab):,} tokens; the longest: {escape(' '.join(repr(t.decode(errors='replace')) for t in longest))}"
        )
    with _timed(console):
        for name in ("train", "valid"):
            count = tokenize_file(tokenizer, data / f"{name}.txt", data / f"{name}.npy")
            size = (data / f"{name}.txt").stat().st_size
            console.print(f"{name}: {count:,} tokens, {size / count:.2f} bytes per token")
    return tokenizer


def _print_samples(config: DemoConfig, run_dir: Path, tokenizer: "Tokenizer", console: "Console") -> None:
    from rich.markup import escape

    from cs336_basics.generation import generate
    from cs336_basics.load_run import load_model

    prompt = config.prompt if config.prompt is not None else ("" if config.data else "def ")
    model = load_model(run_dir, "cpu")
    prompt_ids = tokenizer.encode(prompt) or tokenizer.encode(END_OF_TEXT)
    sampling = SamplingConfig(max_new_tokens=160, temperature=0.7, top_p=0.95)
    samples = generate(model, [prompt_ids] * 3, sampling, stop_token_id=tokenizer.token_to_id[END_OF_TEXT.encode()])
    for number, ids in enumerate(samples, start=1):
        console.print(f"[dim]sample {number}[/dim]")
        console.print(f"[bold]{escape(prompt)}[/bold]{escape(tokenizer.decode(ids))}\n")


def _print_what_next(run_dir: Path, console: "Console") -> None:
    from rich.markup import escape

    console.rule("[bold]Where everything is")
    for path, what in (
        ("data/train.txt", "the corpus"),
        ("data/vocab.json", "the tokenizer, together with merges.txt"),
        ("data/train.npy", "the corpus as token ids"),
        ("metrics.jsonl", "the loss, learning rate and speed of every step"),
        ("loss.png", "the loss curve"),
        ("checkpoints/", "the model"),
    ):
        console.print(f"  {escape(str(run_dir / path)):<32} {what}")
    console.print(
        f"""
[bold]What to run next[/bold], in assignment1-basics/
  more samples:     .venv/bin/cs336-basics generate --run {escape(str(run_dir))} --interactive
  on your own text: make demo DATA=path/to/text.txt   (in the folder above)
  on TinyStories:   make data-tinystories             (in the folder above; 2.2 GB), then the commands it prints
  a bigger model:   .venv/bin/cs336-basics train --help
Delete {escape(str(run_dir))} to train this model again from the start."""
    )


@contextmanager
def _timed(console: "Console") -> Iterator[None]:
    started = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - started:.1f} s[/dim]")
