"""The training loop.

A run is a folder: `config.json`, `metrics.jsonl`, `checkpoints/`. `train` on an existing folder resumes it.
The batch of a step depends on the seed and the step alone, so a resumed run sees the same data as one that
was never interrupted, and so does a run on more processes.
"""

import json
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cs336_basics.accounting import model_flops_utilisation, peak_flops
from cs336_basics.data import check_length, open_tokens, windows_at
from cs336_basics.model import BasicsTransformerLM, CausalAttention, ModelConfig
from cs336_basics.muon import Muon, NorMuon
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.optimizer import AdamW, get_cosine_lr, get_trapezoid_lr
from cs336_basics.run_log import RunLog, check_wandb, environment, write_atomically
from cs336_basics.strategy import SingleDevice, Strategy
from cs336_basics.vocab_files import load_vocab

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adamw": AdamW, "muon": Muon, "normuon": NorMuon}


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its learning-rate schedule: linear warm-up, then half a cosine wave or a trapezoid."""

    lr: float = 1e-3
    """Highest learning rate."""
    min_lr: float = 1e-4
    """Learning rate of the last step."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this joint L2 norm."""
    decay_steps: int | None = None
    """Steps of a straight way down at the end, level before. Default: half a cosine wave, from warm-up to end."""
    name: Literal["adamw", "muon", "normuon"] = "adamw"
    """adamw: for all parameters. muon, normuon: for the matrices of the blocks, AdamW for the rest. See muon.py."""
    momentum: float = 0.95
    """Decay of Muon's momentum."""

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "warmup_steps", "eps", "weight_decay"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, but must not be negative")
        if self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}, but must be positive; inf clips nothing")
        if self.decay_steps is not None and self.decay_steps < 1:
            raise ValueError(f"decay_steps is {self.decay_steps}, but must be at least 1, or None for a cosine wave")

    def lr_at(self, step: int, steps: int) -> float:
        """The learning rate of a step, 1 to `steps`."""
        if self.decay_steps is None:
            return get_cosine_lr(step, self.lr, self.min_lr, self.warmup_steps, steps)
        return get_trapezoid_lr(step, self.lr, self.min_lr, self.warmup_steps, self.decay_steps, steps)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on."""

    run: Path = Path("runs/train")
    """Folder of the run; an existing one is resumed."""
    train_data: Path = Path("data/train.npy")
    """Token file to train on, made by `tokenize`."""
    valid_data: Path = Path("data/valid.npy")
    """Token file to evaluate on."""
    tokenizer: Path | None = None
    """Folder of the tokenizer, which is copied into the run. Default: the folder of train_data, if it holds one."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Shape of the model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer and schedule."""
    steps: int = 5_000
    """Optimizer steps."""
    batch_size: int = 32
    """Windows per step, over all processes and microbatches."""
    start_batch_size: int | None = None
    """Windows of the first steps, doubled at even intervals up to batch_size. Default: no growth."""
    start_context: int | None = None
    """Tokens in a window of the first steps, doubled at even intervals up to the model's context length. There are more
    of these shorter windows, so that a step has as many tokens. Default: no growth."""
    microbatches: int = 1
    """Gradient accumulation: the parts that a process computes its share of a batch in. More parts, less memory."""
    seed: int = 0
    """Fixes the initial weights and the order of the data."""
    device: str = "auto"
    """cpu, cuda, mps, or auto for a GPU if there is one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 computes under autocast; weights and optimizer stay in float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    log_every: int = 10
    """Steps between writes to metrics.jsonl. Every step is in it; a GPU is waited for only here."""
    eval_every: int = 250
    """Steps between evaluations."""
    eval_windows: int | None = 512
    """Windows of the validation file to evaluate on, from its start; None for all of it."""
    checkpoint_every: int = 500
    """Steps between checkpoints; the last step always gets one."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted."""
    wandb_project: str | None = None
    """Send metrics to this W&B project too."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}, but must not be negative")
        for name in (
            "steps",
            "batch_size",
            "microbatches",
            "log_every",
            "eval_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if self.eval_windows is not None and self.eval_windows < 1:
            raise ValueError(f"eval_windows is {self.eval_windows}, but must be at least 1, or None for the whole file")
        for name in ("batch_size", "start_batch_size"):
            if (getattr(self, name) or 0) % self.microbatches:
                raise ValueError(
                    f"{name} {getattr(self, name)} does not split into {self.microbatches} microbatches of one size"
                )
        options = self.optimizer
        if options.decay_steps is not None and options.warmup_steps + options.decay_steps > self.steps + 1:
            raise ValueError(
                f"warmup_steps {options.warmup_steps} and decay_steps {options.decay_steps} do not fit into "
                f"{self.steps} steps; lower them, too"
            )
        for name, first, last in (
            ("start_batch_size", self.start_batch_size, self.batch_size),
            ("start_context", self.start_context, self.model.context_length),
        ):
            if first is not None and (first < 1 or last % first or (last // first).bit_count() != 1):
                raise ValueError(f"{name} is {first}, but must be {last} halved some times")

    def windows(self, step: int) -> tuple[int, int]:
        """How many windows a step has, 1 to `steps`, and of how many tokens each."""
        batch_size = _grown(self.start_batch_size, self.batch_size, step, self.steps)
        context = _grown(self.start_context, self.model.context_length, step, self.steps)
        return batch_size * self.model.context_length // context, context

    def tokens(self, steps: int) -> int:
        """Tokens of the first `steps` steps."""
        if self.start_batch_size is None:
            return steps * self.batch_size * self.model.context_length
        return sum(math.prod(self.windows(step)) for step in range(1, steps + 1))


def _grown(first: int | None, last: int, step: int, steps: int) -> int:
    """A number that grows from `first` to `last` by doublings that split `steps` evenly."""
    if first is None:
        return last
    stages = (last // first).bit_length()
    return first << ((min(step, steps) - 1) * stages // steps)


#: Fields that a resumed run may change, because the weights do not depend on them.
MAY_CHANGE = {
    *("run", "tokenizer", "device", "compile", "log_every", "eval_every", "eval_windows"),
    *("checkpoint_every", "keep_checkpoints", "wandb_project"),
}


def train(
    config: TrainConfig, strategy: Strategy | None = None, causal_attention: CausalAttention | None = None
) -> dict[str, float]:
    """Train a model, or go on training one, and return its last metrics.

    Args:
        config: what to train. If `config.run` holds a checkpoint of the same configuration, training resumes from it.
        strategy: where to run; default: one device.
        causal_attention: an attention kernel for the model, see `CausalMultiHeadSelfAttention`.

    Raises:
        ValueError, FileNotFoundError: a token file, a checkpoint or the configuration does not fit.
        FloatingPointError: the loss is no longer finite.
        OSError: a checkpoint cannot be written.
    """
    strategy = strategy or SingleDevice(config.device)
    for name, size in (("batch_size", config.batch_size), ("start_batch_size", config.start_batch_size)):
        if size is not None and size % (strategy.world_size * config.microbatches):
            raise ValueError(
                f"{name} {size} does not split evenly over {strategy.world_size} processes "
                f"of {config.microbatches} microbatches"
            )
    train_tokens = open_tokens(config.train_data, config.model.vocab_size)
    valid_tokens = open_tokens(config.valid_data, config.model.vocab_size)
    for path, tokens in ((config.train_data, train_tokens), (config.valid_data, valid_tokens)):
        check_length(tokens, config.model.context_length, str(path))
    _check_same_configuration(config)
    if config.wandb_project:
        check_wandb(config.wandb_project)
    tokenizer = _tokenizer_files(config)

    if strategy.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where an operation is not in bfloat16 anyway
    torch.manual_seed(config.seed)
    unwrapped = BasicsTransformerLM.from_config(config.model, causal_attention=causal_attention)
    if config.compile:
        _allow_shapes(config)
        unwrapped.compile(dynamic=False)  # in place: the names in the state dict stay as they are
    model = strategy.wrap_model(unwrapped)
    options = config.optimizer
    momentum = {} if options.name == "adamw" else {"momentum": options.momentum}
    optimizer = strategy.build_optimizer(
        model,
        OPTIMIZERS[options.name],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
        eps=options.eps,
        weight_decay=options.weight_decay,
        **momentum,
    )

    start, seconds = 0, 0.0
    if resume_from := latest_checkpoint(config.run):
        state = strategy.load(resume_from, model, optimizer)
        start, seconds = state["iteration"], state["seconds"]
        torch.set_rng_state(state["rng"])
    if strategy.rank == 0 and start == 0:
        record = {"config": config_to_json(config), "environment": environment(strategy.device)}
        for path in tokenizer:
            write_atomically(config.run / path.name, path.read_text(encoding="utf-8"))
        write_atomically(config.run / "config.json", json.dumps(record, indent=1) + "\n")

    loop = _Loop(config, strategy, model, optimizer, train_tokens, valid_tokens, seconds, config.tokens(start))
    if strategy.rank != 0:
        return loop.run(start, log=None)
    with RunLog(config.run, config.steps, start, config.wandb_project, config_to_json(config)) as log:
        if start:
            news = f"resuming from {resume_from}" if start < config.steps else f"{config.run} is complete"
            log.console.print(news, soft_wrap=True)
        return loop.run(start, log)


@dataclass
class _Loop:
    """What the steps of a run share."""

    config: TrainConfig
    strategy: Strategy
    model: nn.Module
    optimizer: torch.optim.Optimizer
    train_tokens: npt.NDArray[np.integer]
    valid_tokens: npt.NDArray[np.integer]
    seconds: float  # spent on steps so far, resumed ones included
    tokens: int  # trained on so far

    def __post_init__(self) -> None:
        self.loss = torch.compile(cross_entropy, dynamic=False) if self.config.compile else cross_entropy
        device = self.strategy.device
        self.peak_flops = None
        if device.type == "cuda":
            self.peak_flops = peak_flops(torch.cuda.get_device_name(device), self.config.precision)

    def run(self, start: int, log: RunLog | None) -> dict[str, float]:
        config = self.config
        latest = dict(log.latest) if log else {}
        pending: list[tuple[int, float, Tensor, Tensor]] = []  # step, learning rate, loss, gradient norm
        with _deferred_interrupt(enabled=self.strategy.world_size == 1) as interrupted:
            clock = time.perf_counter()
            for step in range(start + 1, config.steps + 1):
                pending.append((step, *self._step(step)))
                stop_now, last = interrupted(), step == config.steps
                evaluate_now = last or step % config.eval_every == 0
                checkpoint_now = last or stop_now or step % config.checkpoint_every == 0
                if not (evaluate_now or checkpoint_now or step % config.log_every == 0):
                    continue
                records = self._resolve(pending, time.perf_counter() - clock)
                pending = []
                sound = list(takewhile(_is_finite, records))
                if log:
                    log.write(sound)
                if len(sound) < len(records):
                    raise _diverged(records[len(sound)])
                latest |= records[-1]
                if evaluate_now:
                    latest["valid_loss"] = self.evaluate()
                    if log:
                        log.write([{"step": step, "valid_loss": latest["valid_loss"]}])
                        log.show_line()
                    if not math.isfinite(latest["valid_loss"]):
                        raise _diverged(latest)
                if checkpoint_now:
                    self._save(step)
                if stop_now:
                    raise KeyboardInterrupt
                clock = time.perf_counter()
        return latest

    def _step(self, step: int) -> tuple[float, Tensor, Tensor]:
        """One optimizer step; returns the learning rate and, still on the device, the loss and the gradient norm."""
        config, strategy = self.config, self.strategy
        lr = config.optimizer.lr_at(step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        count, context = config.windows(step)
        starts = batch_starts(len(self.train_tokens), context, count, config.seed, step)
        parts = np.split(starts[strategy.rank :: strategy.world_size], config.microbatches)
        total = torch.zeros((), device=strategy.device)
        for number, part in enumerate(parts, start=1):
            inputs, targets = windows_at(self.train_tokens, part, context, strategy.device)
            with strategy.accumulate(self.model, last=number == len(parts)):
                with self._autocast():
                    loss = self.loss(self.model(inputs), targets) / len(parts)
                loss.backward()
            total += loss.detach()
        return lr, total, strategy.step(self.model, self.optimizer, config.optimizer.max_grad_norm)

    def _resolve(self, pending: list[tuple[int, float, Tensor, Tensor]], elapsed: float) -> list[dict[str, float]]:
        """Fetch the numbers of the steps since the last time, in one transfer; `elapsed` seconds went by."""
        started = time.perf_counter()
        losses = self.strategy.reduce_mean(torch.stack([loss for _, _, loss, _ in pending])).tolist()
        norms = torch.stack([norm for *_, norm in pending]).tolist()
        elapsed += time.perf_counter() - started
        windows = [self.config.windows(step) for step, *_ in pending]
        speed = {"tokens_per_second": round(sum(map(math.prod, windows)) / elapsed, 1)}
        if self.peak_flops:
            per_device, context = speed["tokens_per_second"] / self.strategy.world_size, windows[0][1]
            speed["mfu"] = round(model_flops_utilisation(self.config.model, per_device, self.peak_flops, context), 4)
        records = []
        for (step, lr, *_), window, loss, norm in zip(pending, windows, losses, norms, strict=True):
            self.seconds += elapsed / len(pending)
            self.tokens += math.prod(window)
            records.append(
                {
                    "step": step,
                    "loss": loss,
                    "lr": lr,
                    "grad_norm": norm,
                    "tokens": self.tokens,
                    "seconds": round(self.seconds, 3),
                    **speed,
                }
            )
        return records

    def evaluate(self) -> float:
        """The mean loss over consecutive windows of the validation file."""
        config = self.config
        with self._autocast():
            return evaluate(
                self.model,
                self.valid_tokens,
                config.model.context_length,
                config.batch_size // (config.microbatches * self.strategy.world_size),
                config.eval_windows,
                self.strategy,
            )

    def _save(self, step: int) -> None:
        path = checkpoint_path(self.config.run, step)
        self.strategy.save(path, self.model, self.optimizer, step, seconds=self.seconds, rng=torch.get_rng_state())
        if self.strategy.rank == 0:
            for old in checkpoints(self.config.run)[: -self.config.keep_checkpoints]:
                shutil.rmtree(old) if old.is_dir() else old.unlink()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.strategy.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")


def _allow_shapes(config: TrainConfig) -> None:
    """Let torch.compile compile for every shape of a growing batch; beyond its limit it would leave code as it is."""
    import torch._dynamo

    shapes = len({config.windows(step) for step in range(1, config.steps + 1)})
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 4 * (shapes + 1))  # with and without gradients, and to spare


@contextmanager
def _deferred_interrupt(enabled: bool) -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back until the loop asks for it between two steps; a second Ctrl-C comes through at once.

    With several processes, which may be interrupted at different steps, and outside the main thread, which
    signals do not reach, nothing is held back.
    """
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    asked = threading.Event()
    previous = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, previous)

    signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, previous)


def _is_finite(record: dict[str, float]) -> bool:
    return math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])


def _diverged(record: dict[str, float]) -> FloatingPointError:
    return FloatingPointError(
        f"training has diverged at step {record['step']:.0f}: the loss is {record['loss']}, the norm of the gradient "
        f"{record['grad_norm']}, the learning rate {record['lr']:.2e}; lower the learning rate, or lengthen the "
        "warm-up, and start a new run"
    )


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: npt.NDArray[np.integer],
    context_length: int,
    batch_size: int,
    max_windows: int | None = None,
    strategy: Strategy | None = None,
) -> float:
    """The mean loss per token, in nats, over consecutive windows from the start of `tokens`.

    Args:
        max_windows: how many windows; None for all that fit.
    """
    strategy = strategy or SingleDevice("cpu")
    count = (len(tokens) - 1) // context_length
    count = min(count, max_windows or count)
    starts = np.arange(count) * context_length
    mine = starts[strategy.rank :: strategy.world_size]
    total = torch.zeros((), device=strategy.device)
    was_training = model.training
    model.eval()
    batch_size = min(batch_size, -(-count // strategy.world_size))
    for round_ in range(-(-count // (batch_size * strategy.world_size))):  # as many on every process: they may wait
        part = mine[round_ * batch_size : (round_ + 1) * batch_size]
        # One shape for all, the last one filled up, because a compiled model is compiled anew for another shape.
        inputs, targets = windows_at(tokens, np.resize(part, batch_size), context_length, strategy.device)
        logits = model(inputs)
        if len(part):
            total += cross_entropy(logits[: len(part)], targets[: len(part)]).float() * len(part)
    model.train(was_training)
    return (strategy.reduce_mean(total) * strategy.world_size / count).item()


def batch_starts(num_tokens: int, context_length: int, batch_size: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """Where the windows of a step begin: uniform, and a function of the seed and the step alone."""
    return np.random.default_rng((seed, step)).integers(num_tokens - context_length, size=batch_size)


def checkpoint_path(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}.pt"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step_????????.pt"))  # files, or folders of a sharded strategy


def latest_checkpoint(run: Path) -> Path | None:
    return next(reversed(checkpoints(run)), None)


def config_to_json(config: TrainConfig) -> dict[str, Any]:
    """The configuration with paths as strings."""
    return json.loads(json.dumps(asdict(config), default=str))


def read_model_config(run: Path) -> ModelConfig:
    """The shape of the model that was trained in a run's folder."""
    stored = _stored_config(run)["model"]
    return ModelConfig(**{item.name: stored[item.name] for item in fields(ModelConfig) if item.name in stored})


def _stored_config(run: Path) -> dict[str, Any]:
    path = run / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{run} is no run: it has no config.json; train a model first")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        if not isinstance(config["model"], dict):
            raise TypeError("no object")
        return config
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged; restore it, or delete {run} to start anew") from None


def _tokenizer_files(config: TrainConfig) -> list[Path]:
    """The files of the run's tokenizer, if there are any, once its vocabulary is known to be the model's."""
    folder = config.tokenizer or config.train_data.parent
    files = [folder / "vocab.json", folder / "merges.txt"]
    missing = [path for path in files if not path.is_file()]
    if missing and config.tokenizer:
        raise FileNotFoundError(f"there is no {missing[0]}; name the folder that `cs336-basics train-bpe` wrote")
    if missing:
        return []
    size = len(load_vocab(files[0]))
    if size != config.model.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {size} tokens, but the model's vocab_size is {config.model.vocab_size}; "
            "make them equal"
        )
    return files


def _check_same_configuration(config: TrainConfig) -> None:
    """A folder holds one run: refuse to go on from its checkpoints with another configuration."""
    if latest_checkpoint(config.run) is None:
        return
    different = differences(_stored_config(config.run), config_to_json(config), MAY_CHANGE)
    if different:
        raise ValueError(
            f"{config.run} holds a run of another configuration ({'; '.join(different)}); "
            "choose another folder with --run, or delete it to start anew"
        )


def differences(stored: dict[str, Any], asked: dict[str, Any], but: Collection[str] = ()) -> list[str]:
    """In what a stored configuration differs from another, a sentence each; what it does not know had the default."""
    before = _leaves(config_to_json(TrainConfig())) | _leaves(stored)
    return [
        f"{name} was {before.get(name)}, now {value}"
        for name, value in sorted(_leaves(asked).items())
        if name not in but and before.get(name) != value
    ]


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return leaves
