"""One training command from a laptop to a cluster: Assignment 1's loop under a strategy, alone or under torchrun."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from cs336_basics.checkpoint import save_checkpoint
from cs336_basics.cli import TrainPreset, report
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.optimizer import AdamW
from cs336_basics.strategy import Strategy
from cs336_basics.training import config_to_json, latest_checkpoint, read_model_config, train
from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.measure import gpu_or_cpu
from cs336_systems.parallel.collectives import check_same_everywhere
from cs336_systems.parallel.process_group import Backend, joined, under_torchrun
from cs336_systems.parallel.sharded_checkpoint import Checkpoint
from cs336_systems.strategies import PARALLEL, Single, StrategyName, StrategyOptions


@dataclass(frozen=True)
class Train:
    """Train a model as `cs336-basics train` does, here or in all processes that torchrun starts."""

    config: TrainPreset
    strategy: StrategyName | Literal["auto"] = "auto"
    """How the work is shared. auto: ddp-bucketed under torchrun, single without. See strategies.py."""
    attention: AttentionName = gpu_or_cpu("flash", "plain")
    """plain: Assignment 1's. flash: ours, for a GPU. flash-pytorch: its reference. sdpa-*, flex: PyTorch's."""
    fused_optimizer: bool = gpu_or_cpu(True, False)
    """AdamW in one kernel in place of Assignment 1's; needs a GPU. Not for torch-fsdp2, and not within Muon."""
    bucket_size_mb: float | None = None
    """ddp-bucketed, ddp+sharded-optimizer: MB (2^20 bytes) of gradients in a message. None: they shrink."""
    backend: Backend = "auto"
    """nccl between GPUs; gloo between CPUs, or between GPUs through host memory, where processes may share a GPU."""
    timeout_s: float = 600.0
    """How long a process waits for the others before it gives up."""

    def execute(self) -> None:
        if self.strategy == "single" or (self.strategy == "auto" and not under_torchrun()):
            if under_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
                raise ValueError("strategy single is for one process, but torchrun has started more; choose ddp, say")
            self._train(Single(self.config.device, self._options()))
            return
        name = "ddp-bucketed" if self.strategy == "auto" else self.strategy
        with told_when_terminated(), joined(self.backend, self.config.device, self.timeout_s) as process:
            settings = {"strategy": name, "attention": self.attention} | asdict(self._options())
            settings |= config_to_json(self.config) | {"checkpoint": latest_checkpoint(self.config.run)}
            check_same_everywhere([f"{key} {value}" for key, value in settings.items()], "settings")
            self._train(PARALLEL[name](process, self._options()))

    def _train(self, strategy: Strategy) -> None:
        latest = train(self.config, strategy, causal_attention(self.attention))
        if strategy.rank == 0:
            report(self.config, latest)

    def _options(self) -> StrategyOptions:
        dtype = torch.bfloat16 if self.config.precision == "bfloat16" else None
        return StrategyOptions(self.bucket_size_mb, self.fused_optimizer, dtype)


@dataclass(frozen=True)
class Consolidate:
    """Make one file, which `cs336-basics generate` reads, of a checkpoint that several processes have written."""

    run: Path
    """Folder of the run."""
    checkpoint: Path | None = None
    """A checkpoint. Default: the latest of the run."""
    output: Path | None = None
    """The file. Default: <run>/consolidated.pt."""

    def execute(self) -> None:
        config = read_model_config(self.run)
        path = self.checkpoint or latest_checkpoint(self.run)
        if path is None:
            raise FileNotFoundError(f"{self.run} has no checkpoint yet; train for longer")
        output = self.output or self.run / "consolidated.pt"
        if path.is_file():  # of a strategy without shares
            unfinished = output.with_name(output.name + ".tmp")
            shutil.copyfile(path, unfinished)
            unfinished.replace(output)
        else:
            model = BasicsTransformerLM.from_config(config)
            optimizer = AdamW(model.parameters())
            checkpoint = Checkpoint(path, [name for name, _ in model.named_parameters()])
            checkpoint.load_model(model, {})
            checkpoint.load_optimizer(model, optimizer, {})
            header = dict(checkpoint.header)
            save_checkpoint(model, optimizer, header.pop("iteration"), output, **header)
        print(f"written: {output}; cs336-basics generate --run {self.run} --checkpoint {output}")


@contextmanager
def told_when_terminated() -> Iterator[None]:
    """If torchrun ends this process because another one has failed, say so.

    The main thread may be waiting for a GPU then, and run no signal handler of Python's; but the interpreter writes the
    number of the signal into a pipe at once, and a thread that reads there can speak. After an error it stays, until
    the error has been reported.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while (byte := os.read(reader, 1)) != b"\0":
            if byte[0] == signal.SIGTERM:
                if os.environ.get("RANK", "0") == "0":
                    print(
                        "cs336-systems: told to stop, because another process has failed (its message says why) or the "
                        "job was cancelled; the same command goes on from the last checkpoint",
                        file=sys.stderr, flush=True,
                    )  # fmt: skip
                os._exit(128 + signal.SIGTERM)

    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    descriptor = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    yield
    signal.set_wakeup_fd(descriptor)
    signal.signal(signal.SIGTERM, handler if handler is not None else signal.SIG_DFL)
    os.write(writer, b"\0")
    thread.join()
    os.close(reader)
    os.close(writer)
