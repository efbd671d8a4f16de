"""The commands `train` and `consolidate`: Assignment 1's loop under a strategy, alone or under torchrun."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import torch

from cs336_basics.checkpoint import latest_checkpoint, save_checkpoint
from cs336_basics.cli import report
from cs336_basics.model import BasicsTransformerLM
from cs336_basics.optimizer import AdamW
from cs336_basics.run_folder import config_to_json
from cs336_basics.strategy import Strategy
from cs336_basics.train_config import read_model_config
from cs336_basics.training import train
from cs336_systems.parallel.collectives import check_same_on_all_ranks
from cs336_systems.parallel.process_group import process_group, under_torchrun
from cs336_systems.parallel.sharded_checkpoint import Checkpoint
from cs336_systems.training.choices import ATTENTIONS, STRATEGIES, resolve
from cs336_systems.training.options import Consolidate, Train
from cs336_systems.training.strategies import Single, StrategyOptions


def train_with_strategy(options: Train) -> None:
    """Train on this device, or as one rank of the group that torchrun has started."""
    strategy_options = _strategy_options(options)
    if options.strategy == "single" or (options.strategy == "auto" and not under_torchrun()):
        if under_torchrun() and int(os.environ["WORLD_SIZE"]) > 1:
            raise ValueError("strategy single is for one rank, but torchrun has started more; choose for example ddp")
        _train(options, Single(options.config.device, strategy_options))
        return
    name = "ddp-bucketed" if options.strategy == "auto" else options.strategy
    with report_sigterm(), process_group(options.backend, options.config.device, options.timeout_s) as rank:
        settings = {"strategy": name, "attention": options.attention} | asdict(strategy_options)
        settings |= config_to_json(options.config) | {"checkpoint": latest_checkpoint(options.config.run_dir)}
        check_same_on_all_ranks([f"{key} {value}" for key, value in settings.items()], "settings")
        _train(options, resolve(STRATEGIES, name)(rank, strategy_options))


def _train(options: Train, strategy: Strategy) -> None:
    latest = train(options.config, strategy, resolve(ATTENTIONS, options.attention))
    if strategy.rank == 0:
        report(options.config, latest)


def _strategy_options(options: Train) -> StrategyOptions:
    dtype = torch.bfloat16 if options.config.precision == "bfloat16" else None
    return StrategyOptions(options.bucket_size_mib, options.fused_optimizer, dtype)


def consolidate(options: Consolidate) -> None:
    """Convert a sharded checkpoint to Assignment 1's single file; copy a checkpoint that is a single file already."""
    config = read_model_config(options.run_dir)
    path = options.checkpoint or latest_checkpoint(options.run_dir)
    if path is None:
        raise FileNotFoundError(f"{options.run_dir} has no checkpoint yet; train for longer")
    output = options.output or options.run_dir / "consolidated.pt"
    if path.is_file():  # written by a strategy without shards
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
    print(f"written: {output}; cs336-basics generate --run {options.run_dir} --checkpoint {output}")


@contextmanager
def report_sigterm() -> Iterator[None]:
    """Print a message if torchrun ends this rank because another one has failed.

    The main thread may be waiting for a GPU then, and run none of Python's signal handlers; but the interpreter writes
    the number of the signal to a pipe at once, and a thread that reads from it can print. After an error the thread
    stays until the error has been reported.
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
                        "cs336-systems: told to stop, because another rank has failed (its message says why) or the "
                        "job was cancelled; run the same command again to continue from the last checkpoint",
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
