"""The training loop: `train` prepares a run, `_Loop.run` trains it, and `evaluate` measures the validation loss.

A run is a folder with `config.json`, `metrics.jsonl` and `checkpoints/`; training in an existing folder resumes its
run. The batch of a step depends only on the seed and the step, so a resumed run sees the same data as an
uninterrupted one, and so does a run on several ranks. The options are in `cs336_basics.train_config`.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cs336_basics.accounting import model_flops_utilization, peak_flops
from cs336_basics.checkpoint import checkpoint_path, delete_old_checkpoints, latest_checkpoint
from cs336_basics.data import batch_starts, check_length, open_tokens, sequences_at
from cs336_basics.model import BasicsTransformerLM, CausalAttention
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.run_folder import check_wandb, config_to_json, deferred_interrupt, environment, write_config
from cs336_basics.run_log import PACKAGES, RunLog
from cs336_basics.strategy import SingleDevice, Strategy
from cs336_basics.train_config import TrainConfig, check_resumable
from cs336_basics.vocab_files import copy_tokenizer, tokenizer_files

#: The number of sequences of a step, 1 to `steps`, and of tokens in each.
BatchShape = Callable[[int], tuple[int, int]]
#: A step's number and learning rate and, still on the device, its loss and gradient norm.
PendingStep = tuple[int, float, Tensor, Tensor]


def train(
    config: TrainConfig,
    strategy: Strategy | None = None,
    causal_attention: CausalAttention | None = None,
    *,
    model_class: type[BasicsTransformerLM] = BasicsTransformerLM,
    batch_shape: BatchShape | None = None,
) -> dict[str, float]:
    """Train a model, or resume training one, and return its last metrics.

    Args:
        config: the run's options. If `config.run_dir` holds a checkpoint of this configuration, training resumes
            from it.
        strategy: where to run. Default: one device.
        causal_attention: an attention kernel for the model; see `CausalMultiHeadSelfAttention`.
        model_class: the model to build from `config.model`.
        batch_shape: the shape of each step's batch. Default: `batch_size` sequences of the model's context length.

    Raises:
        ValueError, FileNotFoundError: a token file, a checkpoint or the configuration does not fit.
        FloatingPointError: the loss is no longer finite.
        OSError: a checkpoint cannot be written.
    """
    strategy = strategy or SingleDevice(config.device)
    batch_shape = batch_shape or (lambda _: (config.batch_size, config.model.context_length))
    train_tokens, valid_tokens = _open_data(config, strategy)
    resume_from = latest_checkpoint(config.run_dir)
    if resume_from:
        check_resumable(config)
    if config.wandb_project:
        check_wandb(config.wandb_project)
    tokenizer = tokenizer_files(
        config.tokenizer or config.train_data.parent, config.model.vocab_size, required=config.tokenizer is not None
    )

    model, optimizer = _build(config, strategy, causal_attention, model_class)
    start, seconds = 0, 0.0
    if resume_from:
        state = strategy.load(resume_from, model, optimizer)
        start, seconds = state["iteration"], state["seconds"]
        torch.set_rng_state(state["rng"])
    if strategy.rank == 0 and start == 0:
        copy_tokenizer(tokenizer, config.run_dir)
        write_config(config.run_dir, config, environment(strategy.device, PACKAGES))

    tokens = sum(math.prod(batch_shape(step)) for step in range(1, start + 1))
    loop = _Loop(config, strategy, model, optimizer, batch_shape, train_tokens, valid_tokens, seconds, tokens)
    if strategy.rank != 0:
        return loop.run(start, log=None)
    with RunLog(config.run_dir, config.steps, start, config.wandb_project, config_to_json(config)) as log:
        if resume_from:
            news = f"resuming from {resume_from}" if start < config.steps else f"{config.run_dir} is complete"
            log.console.print(news, soft_wrap=True)
        return loop.run(start, log)


@dataclass
class _Loop:
    """The steps of a run, with the state that they share."""

    config: TrainConfig
    strategy: Strategy
    model: nn.Module
    optimizer: torch.optim.Optimizer
    batch_shape: BatchShape
    train_tokens: npt.NDArray[np.integer]
    valid_tokens: npt.NDArray[np.integer]
    seconds: float  # spent on steps so far, including those before the run was resumed
    tokens: int  # trained on so far

    def __post_init__(self) -> None:
        self.loss = torch.compile(cross_entropy, dynamic=False) if self.config.compile else cross_entropy
        device = self.strategy.device
        self.peak_flops = None
        if device.type == "cuda":
            self.peak_flops = peak_flops(torch.cuda.get_device_name(device), self.config.precision)

    def run(self, start: int, log: RunLog | None) -> dict[str, float]:
        """Run the steps after `start` and return the last metrics. Only rank 0 has a log."""
        config = self.config
        latest = dict(log.latest) if log else {}
        pending: list[PendingStep] = []
        with deferred_interrupt(enabled=self.strategy.world_size == 1) as interrupted:
            clock = time.perf_counter()
            for step in range(start + 1, config.steps + 1):
                pending.append((step, *self._step(step)))

                # Once in a while: write the metrics, evaluate, save. Until then nothing waits for the GPU.
                stop_now, last = interrupted(), step == config.steps
                evaluate_now = last or step % config.eval_every == 0
                checkpoint_now = last or stop_now or step % config.checkpoint_every == 0
                if not (evaluate_now or checkpoint_now or step % config.log_every == 0):
                    continue
                records = self._fetch_metrics(pending, time.perf_counter() - clock)
                pending = []
                finite = list(takewhile(_is_finite, records))
                if log:
                    log.write(finite)
                if len(finite) < len(records):
                    raise _diverged(records[len(finite)])
                latest |= records[-1]
                if evaluate_now:
                    latest["valid_loss"] = self._evaluate()
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
        """Run one optimizer step. Return the learning rate and, still on the device, the loss and gradient norm."""
        config, strategy = self.config, self.strategy
        lr = config.optimizer.lr_at(step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sequences, length = self.batch_shape(step)
        starts = batch_starts(len(self.train_tokens), length, sequences, config.seed, step)
        microbatches = np.split(starts[strategy.rank :: strategy.world_size], config.microbatches)
        total = torch.zeros((), device=strategy.device)
        for number, microbatch in enumerate(microbatches, start=1):
            inputs, targets = sequences_at(self.train_tokens, microbatch, length, strategy.device)
            with strategy.accumulate(self.model, last=number == len(microbatches)):
                with self._autocast():
                    loss = self.loss(self.model(inputs), targets) / len(microbatches)
                loss.backward()
            total += loss.detach()
        return lr, total, strategy.step(self.model, self.optimizer, config.optimizer.max_grad_norm)

    def _fetch_metrics(self, pending: list[PendingStep], elapsed: float) -> list[dict[str, float]]:
        """Fetch the metrics of the pending steps from the device in one transfer; they took `elapsed` seconds."""
        started = time.perf_counter()
        losses = self.strategy.reduce_mean(torch.stack([loss for _, _, loss, _ in pending])).tolist()
        norms = torch.stack([norm for *_, norm in pending]).tolist()
        elapsed += time.perf_counter() - started
        shapes = [self.batch_shape(step) for step, *_ in pending]
        speed = {"tokens_per_second": round(sum(map(math.prod, shapes)) / elapsed, 1)}
        if self.peak_flops:
            per_device, length = speed["tokens_per_second"] / self.strategy.world_size, shapes[0][1]
            speed["mfu"] = round(model_flops_utilization(self.config.model, per_device, self.peak_flops, length), 4)
        records = []
        for (step, lr, *_), shape, loss, norm in zip(pending, shapes, losses, norms, strict=True):
            self.seconds += elapsed / len(pending)
            self.tokens += math.prod(shape)
            clock = {"tokens": self.tokens, "seconds": round(self.seconds, 3)}
            records.append({"step": step, "loss": loss, "lr": lr, "grad_norm": norm, **clock, **speed})
        return records

    def _evaluate(self) -> float:
        """Return the mean loss over consecutive sequences of the validation file."""
        config = self.config
        with self._autocast():
            return evaluate(
                self.model,
                self.valid_tokens,
                config.model.context_length,
                config.batch_size // (config.microbatches * self.strategy.world_size),
                config.eval_sequences,
                self.strategy,
            )

    def _save(self, step: int) -> None:
        path = checkpoint_path(self.config.run_dir, step)
        self.strategy.save(path, self.model, self.optimizer, step, seconds=self.seconds, rng=torch.get_rng_state())
        if self.strategy.rank == 0:
            delete_old_checkpoints(self.config.run_dir, self.config.keep_checkpoints)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.strategy.device.type, torch.bfloat16, enabled=self.config.precision == "bfloat16")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: npt.NDArray[np.integer],
    context_length: int,
    batch_size: int,
    max_sequences: int | None = None,
    strategy: Strategy | None = None,
) -> float:
    """Return the mean loss per token, in nats, over consecutive sequences from the start of `tokens`.

    Args:
        model: the model; it is in training mode again afterwards if it was before.
        tokens: the ids of the validation file.
        context_length: tokens per sequence.
        batch_size: sequences per forward pass on each rank.
        max_sequences: how many sequences to use. Default: all that fit.
        strategy: shares the sequences over its ranks. Default: one CPU.
    """
    strategy = strategy or SingleDevice("cpu")
    count = (len(tokens) - 1) // context_length
    count = min(count, max_sequences or count)
    starts = np.arange(count) * context_length
    own_starts = starts[strategy.rank :: strategy.world_size]
    total = torch.zeros((), device=strategy.device)
    was_training = model.training
    model.eval()
    batch_size = min(batch_size, -(-count // strategy.world_size))
    batches = -(-count // (batch_size * strategy.world_size))  # the same number on every rank, since ranks may wait
    for batch in range(batches):
        part = own_starts[batch * batch_size : (batch + 1) * batch_size]
        # Fill the last batch up to the shape of the others: a compiled model would be compiled again for a new shape.
        inputs, targets = sequences_at(tokens, np.resize(part, batch_size), context_length, strategy.device)
        logits = model(inputs)
        if len(part):
            total += cross_entropy(logits[: len(part)], targets[: len(part)]).float() * len(part)
    model.train(was_training)
    return (strategy.reduce_mean(total) * strategy.world_size / count).item()


def _open_data(config: TrainConfig, strategy: Strategy) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer]]:
    """Map the training and validation tokens into memory and check them and the batch size."""
    if config.batch_size % (strategy.world_size * config.microbatches):
        raise ValueError(
            f"batch_size {config.batch_size} does not split evenly over {strategy.world_size} ranks "
            f"with {config.microbatches} microbatches each; choose a multiple of {strategy.world_size} times "
            f"{config.microbatches}"
        )
    train_tokens = open_tokens(config.train_data, config.model.vocab_size)
    valid_tokens = open_tokens(config.valid_data, config.model.vocab_size)
    for path, tokens in ((config.train_data, train_tokens), (config.valid_data, valid_tokens)):
        check_length(tokens, config.model.context_length, str(path))
    return train_tokens, valid_tokens


def _build(
    config: TrainConfig,
    strategy: Strategy,
    causal_attention: CausalAttention | None,
    model_class: type[BasicsTransformerLM],
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Build the model with its initial weights, and the optimizer."""
    if strategy.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for operations that are not in bfloat16 anyway
    torch.manual_seed(config.seed)
    unwrapped = model_class.from_config(config.model, causal_attention=causal_attention)
    if config.compile:
        unwrapped.compile(dynamic=False)  # in place: the names in the state dict stay as they are
    model = strategy.wrap_model(unwrapped)
    optimizer_class = config.optimizer.optimizer_class()
    return model, strategy.build_optimizer(model, optimizer_class, **config.optimizer.options())


def _is_finite(record: dict[str, float]) -> bool:
    return math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"])


def _diverged(record: dict[str, float]) -> FloatingPointError:
    return FloatingPointError(
        f"training has diverged at step {record['step']:.0f}: the loss is {record['loss']}, the gradient norm is "
        f"{record['grad_norm']}, and the learning rate is {record['lr']:.2e}; lower the learning rate or lengthen the "
        "warm-up, and start a new run"
    )
