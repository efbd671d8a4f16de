"""The command line: `cs336-basics <command>`, or `python -m cs336_basics <command>`."""

import codecs
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tyro.conf import OmitArgPrefixes, Positional

from cs336_basics import accounting
from cs336_basics.bpe import train_bpe
from cs336_basics.command import run_command
from cs336_basics.corpus import END_OF_TEXT
from cs336_basics.data import tokenize_file
from cs336_basics.demo import DemoConfig, run_demo
from cs336_basics.generation import SamplingConfig, generate_stream
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.plots import plot_loss
from cs336_basics.presets import MODELS, TRAIN
from cs336_basics.pretokenization import DecodeErrors
from cs336_basics.runs import check_vocabulary, load_model, load_tokenizer
from cs336_basics.tokenizer import Tokenizer
from cs336_basics.training import TrainConfig, train

if TYPE_CHECKING:
    TrainPreset = TrainConfig
else:  # one subcommand a preset, whose options start from the preset's values
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
    """UTF-8 text; documents are separated by a special token."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Folder for vocab.json and merges.txt."""
    vocab_size: int = 10_000
    """The most tokens, the 256 bytes and the special tokens included."""
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    """Strings that are one token each."""
    num_workers: int | None = None
    """Processes that count words. Default: one for each available core. The result does not depend on it."""
    errors: DecodeErrors = "strict"
    """Bytes that are not UTF-8: stop and say where, or read them as U+FFFD."""

    def execute(self) -> None:
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
    """The token file, a .npy array that is mapped into memory when read."""
    tokenizer: Path
    """Folder with vocab.json and merges.txt."""
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    """Strings that are one token each."""
    num_workers: int | None = None
    """Processes. Default: one for each available core."""
    errors: DecodeErrors = "strict"
    """Bytes that are not UTF-8: stop and say where, or read them as U+FFFD."""

    def execute(self) -> None:
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
        rate = f"{size / max(count, 1):.2f} bytes each, {size / seconds / 1e6:.1f} MB/s"
        print(f"{count:,} tokens, {rate}; written: {self.output}")


@dataclass(frozen=True)
class Train:
    """Train a model, starting from a preset; the same command resumes an interrupted run."""

    config: TrainPreset

    def execute(self) -> None:
        report(self.config, train(self.config))


def report(config: TrainConfig, latest: dict[str, float]) -> None:
    """Say how a run has ended, and plot its losses."""
    if "loss" in latest and "valid_loss" in latest:
        print(f"step {config.steps}: training loss {latest['loss']:.4f}, validation loss {latest['valid_loss']:.4f}")
    plot_loss(config.run, config.run / "loss.png")
    print(f"written: {config.run}/ (metrics.jsonl, loss.png, checkpoints/)")


@dataclass(frozen=True)
class Generate:
    """Let a trained model continue texts."""

    run: Path
    """Folder of the run."""
    prompt: tuple[str, ...] = ("",)
    """Texts to continue, all at once. An empty one asks for a document from its beginning."""
    interactive: bool = False
    """Continue the prompt, if there is one, then ask for more until an empty line or Ctrl-D."""
    sampling: SamplingConfig = SamplingConfig(temperature=0.8, top_p=0.95)
    """How tokens are chosen."""
    checkpoint: Path | None = None
    """A checkpoint file. Default: the latest of the run."""
    tokenizer: Path | None = None
    """Folder of the tokenizer. Default: the run's own."""
    special_tokens: tuple[str, ...] = (END_OF_TEXT,)
    """The tokenizer's special tokens; the first of them ends a document."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for a GPU if there is one."""

    def execute(self) -> None:
        model = load_model(self.run, self.device, self.checkpoint)
        tokenizer = load_tokenizer(self.tokenizer or self.run, self.special_tokens)
        check_vocabulary(model, tokenizer)
        if not self.interactive:
            _continue(model, tokenizer, self.prompt, self.sampling)
            return
        sampling = self.sampling
        if any(self.prompt):
            _continue(model, tokenizer, self.prompt, sampling)
        print("Type the beginning of a text. An empty line ends.")
        while True:
            try:
                prompt = input("> ").encode(errors="replace").decode()
            except EOFError:
                return
            if not prompt:
                return
            _continue(model, tokenizer, (prompt,), sampling)
            if sampling.seed is not None:  # the same prompt again gives another continuation
                sampling = replace(sampling, seed=sampling.seed + 1)


@dataclass(frozen=True)
class Accounting:
    """Print a model's parameters, operations and memory."""

    model: Positional[Literal["gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl", "tinystories-17m", "owt"]]
    """Which model."""
    context_length: int | None = None
    """Tokens per sequence. Default: the model's."""
    batch_size: int = 1
    """Sequences per step."""
    memory_gb: float = 80.0
    """Memory of a GPU, in GB of 10^9 bytes, to fill with the largest batch."""
    bytes_per_number: int = 4
    """4 for float32, 2 for bfloat16."""

    def execute(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, but must be at least 1")
        config = MODELS[self.model]
        if self.context_length is not None:
            config = replace(config, context_length=self.context_length)
        console = Console()

        counts = accounting.parameter_counts(config)
        table = Table("component", "parameters", "share", title=f"{self.model}: parameters")
        for name, count in counts.items():
            table.add_row(name, f"{count:,}", f"{count / sum(counts.values()):.1%}")
        table.add_section()
        table.add_row("total", f"{sum(counts.values()):,}", "")
        console.print(_right_aligned(table))

        products = accounting.matmuls(config, self.batch_size)
        total = accounting.forward_flops(config, self.batch_size)
        title = f"matrix products of a forward pass, {self.batch_size} x {config.context_length} tokens"
        table = Table("product", "shape", "times", "FLOPs", "share", title=title)
        for product in products:
            shape = f"[{product.rows} x {product.inner}] [{product.inner} x {product.columns}]".replace("[", r"\[")
            table.add_row(
                product.name, shape, f"{product.times:,}", f"{product.flops:.4g}", f"{product.flops / total:.1%}"
            )
        table.add_section()
        table.add_row("total", "", "", f"{total:.4g}", "")
        console.print(_right_aligned(table))

        memory = accounting.training_memory(config, self.batch_size, bytes_per_number=self.bytes_per_number)
        table = Table("memory", "GB", title=f"a training step with AdamW, {self.bytes_per_number} bytes a number")
        for name in ("parameters", "gradients", "optimizer_state", "activations", "total"):
            table.add_row(name.replace("_", " "), f"{getattr(memory, name) / 1e9:.2f}")
        console.print(_right_aligned(table))
        largest = accounting.max_batch_size(config, self.memory_gb * 1e9, bytes_per_number=self.bytes_per_number)
        console.print(f"largest batch in {self.memory_gb:g} GB: {largest}")
        console.print(f"one AdamW step: {accounting.adamw_step_flops(config):.4g} FLOPs")


@dataclass(frozen=True)
class Demo(DemoConfig):
    """From a text to a model that continues it, in a few minutes on a CPU."""

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
    """Run a command; what a user got wrong is one line and exit status 2."""
    run_command(
        Command,
        "cs336-basics",
        args,
        interrupted="training resumes when the same command is run again",
        out_of_memory="lower --batch-size, or raise --microbatches",
    )


def _continue(
    model: BasicsTransformerLM, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingConfig
) -> None:
    """Print continuations: a single one as it comes, several one below the other."""
    stop = tokenizer.token_to_id[tokenizer.special_tokens[0].encode()]
    prompt_ids = [tokenizer.encode(prompt) or [stop] for prompt in prompts]
    texts = list(prompts)
    decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in prompts]  # characters may span tokens
    if len(prompts) == 1:
        print(prompts[0], end="", flush=True)
    for tokens in generate_stream(model, prompt_ids, sampling, stop):
        for index, token in enumerate(tokens):
            if token is not None:
                piece = decoders[index].decode(tokenizer.vocab[token])
                texts[index] += piece
                if len(prompts) == 1:
                    print(piece, end="", flush=True)
    for index, decoder in enumerate(decoders):
        rest = decoder.decode(b"", final=True)  # half a character at the end
        texts[index] += rest
        if len(prompts) == 1:
            print(rest)
    if len(prompts) == 1:
        return
    for number, text in enumerate(texts, start=1):
        print(f"--- {number}\n{text}")


def _size_of(path: Path) -> int:
    if not path.is_file():
        raise FileNotFoundError(f"there is no text {path}")
    return path.stat().st_size


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip


def _right_aligned(table: Table) -> Table:
    for column in table.columns[1:]:
        column.justify = "right"
    table.title_justify = "left"
    return table


if __name__ == "__main__":
    main()
