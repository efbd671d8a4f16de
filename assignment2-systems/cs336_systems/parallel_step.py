"""A training step in several processes: a model under data parallelism, its optimizer, and a batch for each process.

What the commands that measure data parallelism share. They start one set of processes, which runs all cases one
after the other, each with a new model, so that nothing of a case is left when the next one begins.
"""

import gc
import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from cs336_basics.model import BasicsTransformerLM, Embedding, Linear, TransformerBlock
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.optimizer import AdamW
from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.checkpointing import apply_checkpointing
from cs336_systems.measure import (
    OK,
    Measurement,
    ResultFile,
    Row,
    check_options,
    gpu_or_cpu,
    guarded,
    now_ms,
    progress,
)
from cs336_systems.models import SizeName, blocks_of, compile_blocks, model_config
from cs336_systems.parallel import (
    FSDP,
    BucketedDataParallel,
    FlatDataParallel,
    NaiveDataParallel,
    OverlappedDataParallel,
    ShardedOptimizer,
)
from cs336_systems.parallel.process_group import Process, check_gpus, device_of_process, run_processes
from cs336_systems.training_step import Mode, Precision, StepConfig, phase

#: none: every process trains a model of its own. fsdp: a block of the model is a unit; fsdp-linear: every Linear and
#: Embedding is one. torch-ddp, fully-shard: PyTorch's own.
Parallelism = Literal[
    "none", "naive", "flat", "overlapped", "bucketed", "torch-ddp", "fsdp", "fsdp-linear", "fully-shard"
]
#: basics: Assignment 1's AdamW. fused: `cs336_systems.adamw.FusedAdamW`. torch: `torch.optim.AdamW`.
AdamWName = Literal["basics", "fused", "torch"]
#: Who shares out the optimizer's state: nobody, `ShardedOptimizer`, or PyTorch's ZeroRedundancyOptimizer.
StateSharding = Literal["none", "ours", "torch"]

#: In MB of 2^20 bytes.
BucketSize = float | Literal["auto"]

SHARDED_WEIGHTS: tuple[Parallelism, ...] = ("fsdp", "fsdp-linear", "fully-shard")
#: Small enough to keep many steps on one batch finite.
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class ParallelConfig:
    """What a training step in several processes is made of."""

    step: StepConfig
    """Model, sequences of each process, attention and precision. "compiled" compiles each block for itself: one
    backward graph of the whole model would deliver all gradients at its end, with nothing left to overlap with."""
    parallelism: Parallelism = "none"
    """How the processes work together."""
    bucket_mb: BucketSize = "auto"
    """Size of a bucket, in MB of 2^20 bytes. auto: ours shrink, PyTorch's hold 25 MB, its default."""
    optimizer: AdamWName = "basics"
    """Which AdamW."""
    sharding: StateSharding = "none"
    """Who shares out its state."""
    checkpointing: Literal["none", "block"] = "none"
    """Whether each block's forward pass is repeated in the backward pass."""

    def __post_init__(self) -> None:
        if self.sharding != "none" and self.parallelism in SHARDED_WEIGHTS:
            raise ValueError(f"{self.parallelism} has sharded the optimizer's state already; choose sharding none")
        if self.step.mode == "compiled" and self.parallelism == "fsdp-linear":
            raise ValueError("fsdp-linear gathers weights inside of a block, which cannot be compiled as a whole")


class StepTimes(NamedTuple):
    """Milliseconds of one step in one process."""

    step: float
    """On the host's clock, from an idle device to an idle device."""
    forward_backward: float
    """These and the next two: on a GPU between events of the stream that computes."""
    after_backward: float
    """From the end of the backward pass until the gradients are averaged. (PyTorch's containers wait for them inside
    of the backward pass.)"""
    optimizer: float


class ParallelStep:
    """A model with random weights, the same in all processes, and a random batch, another one in each.

    Args:
        config: what it is made of.
        process: the process that this is.

    Attributes:
        module: the model in its container.
        optimizer: its optimizer.
        inputs, targets: [batch context] token ids of this process.
    """

    def __init__(self, config: ParallelConfig, process: Process) -> None:
        self.config, self.device = config, process.device
        shape = config.step.model
        torch.manual_seed(0)
        model = BasicsTransformerLM.from_config(
            shape, causal_attention=causal_attention(config.step.attention), device=self.device
        )
        self.num_parameters = sum(parameter.numel() for parameter in model.parameters())
        apply_checkpointing(model, config.checkpointing)
        if config.step.mode == "compiled":
            compile_blocks(model)
        self.module = _wrapped(model, config, self.device)
        parameters: Iterable[nn.Parameter] = self.module.parameters()
        self._finish: Callable[[], None] = getattr(self.module, "finish_gradient_synchronization", lambda: None)
        self._local: dict[nn.Parameter, nn.Parameter] = {}
        if config.parallelism == "fully-shard":
            # Its parameters are DTensors. Assignment 1's AdamW and our kernels know plain tensors: the local ones.
            self._local = {parameter: nn.Parameter(_local(parameter.detach())) for parameter in parameters}
            parameters = self._local.values()
        self.optimizer = _optimizer(config, list(parameters))
        torch.manual_seed(1 + process.rank)
        ids = torch.randint(shape.vocab_size, (config.step.batch_size, shape.context_length + 1), device=self.device)
        self.inputs, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def run(self, mark: Callable[[], object] = lambda: None) -> Float[Tensor, ""]:
        """One step. `mark` is called after the backward pass, when gradients are averaged, and at the end.

        Returns:
            The loss of this process, before the step.
        """
        self.module.zero_grad(set_to_none=True)
        with self._autocast():
            with phase("forward", self.device):
                logits = self.module(self.inputs)
            with phase("loss", self.device):
                loss = cross_entropy(logits, self.targets)
        del logits
        with phase("backward", self.device):
            loss.backward()
        mark()
        self._finish()
        mark()
        with phase("optimizer", self.device):
            for parameter, local in self._local.items():
                local.grad = None if parameter.grad is None else _local(parameter.grad)
            self.optimizer.step()
            for local in self._local.values():
                local.grad = None
        mark()
        return loss.detach()

    def timed(self) -> StepTimes:
        """Run one step and time it."""
        marks = Marks(self.device)
        started = now_ms(self.device)
        marks.mark()
        self.run(marks.mark)
        return StepTimes(now_ms(self.device) - started, *marks.between_ms())

    def _autocast(self) -> AbstractContextManager:
        # The containers with sharded weights cast them before they are sent.
        if self.config.step.precision == "fp32" or self.config.parallelism in SHARDED_WEIGHTS:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


class Marks:
    """Moments on the device's own clock, noted without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Note the moment at which the device gets here."""
        if not self._on_gpu:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def between_ms(self) -> list[float]:
        """Milliseconds between one mark and the next, when the device has passed them all."""
        pairs = zip(self._marks, self._marks[1:])
        return [a.elapsed_time(b) if self._on_gpu else (b - a) * 1e3 for a, b in pairs]


def adamw_class(name: AdamWName) -> type[torch.optim.Optimizer]:
    """The AdamW of that name."""
    if name == "basics":
        return AdamW
    if name == "torch":
        return torch.optim.AdamW
    from cs336_systems.adamw import FusedAdamW

    return FusedAdamW


def optimizer_state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors that an optimizer keeps in this process, which may be a share of the state."""
    inner = getattr(optimizer, "inner", None) or getattr(optimizer, "optim", None) or optimizer
    return sum(x.nbytes for state in inner.state.values() for x in state.values() if isinstance(x, Tensor))


def _wrapped(model: BasicsTransformerLM, config: ParallelConfig, device: torch.device) -> nn.Module:
    dtype = torch.bfloat16 if config.step.precision == "bf16" else None
    match config.parallelism:
        case "none":
            return model
        case "naive":
            return NaiveDataParallel(model)
        case "flat":
            return FlatDataParallel(model)
        case "overlapped":
            return OverlappedDataParallel(model)
        case "bucketed":
            return BucketedDataParallel(model, config.bucket_mb)
        case "torch-ddp":
            return _torch_ddp(model, config.bucket_mb, device)
        case "fsdp":
            return FSDP(model, dtype, (TransformerBlock, Linear, Embedding))
        case "fsdp-linear":
            return FSDP(model, dtype)
        case "fully-shard":
            return _fully_sharded(model, dtype, device)


def _torch_ddp(model: nn.Module, bucket_mb: BucketSize, device: torch.device) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    # The only buffers are tables of positions: no need to send them before every step. (Renamed in torch 2.13.)
    names = inspect.signature(DistributedDataParallel).parameters
    options: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers": False
    }
    if device.type == "cuda":
        options["device_ids"] = [device]
    if bucket_mb != "auto":
        options["bucket_cap_mb"] = bucket_mb
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **options)


def _fully_sharded(model: BasicsTransformerLM, dtype: torch.dtype | None, device: torch.device) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype),
    }
    for block in blocks_of(model):
        fully_shard(block, **options)
    fully_shard(model, **options)
    return model


def _local(tensor: Any) -> Tensor:
    """This process's part of a DTensor, in the same memory."""
    return tensor.to_local()


def _optimizer(config: ParallelConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    cls = adamw_class(config.optimizer)
    if config.sharding == "ours":
        return ShardedOptimizer(parameters, cls, lr=LEARNING_RATE)
    if config.sharding == "torch":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, cls, lr=LEARNING_RATE)
    return cls(parameters, lr=LEARNING_RATE)  # type: ignore[call-arg]


# Measuring in all processes at once


def gathered(mine: Any) -> list[Any]:
    """What all processes have, by rank, in each of them."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def everywhere(measure: Callable[[], Row]) -> tuple[Row, list[Row]]:
    """Measure in all processes, and free what that leaves behind.

    Returns:
        The status, with a reason if it is not "ok", and what the processes measured, by rank; nothing if one of them
        failed. They fail alike if at all: one that fails alone leaves the others waiting, and all are ended in the end.
    """
    mine = guarded(measure)
    gc.collect()  # models in containers refer to themselves
    rows = gathered(mine)
    failed = next((row for row in rows if row["status"] != OK), None)
    return (failed, []) if failed else ({"status": OK}, rows)


def run_cases(
    process: Process,
    cases: list[Row],
    measure: Callable[[Row], Row],
    summarize: Callable[[Row, list[Row]], Row],
    file: ResultFile,
    before: Sequence[Row] = (),
) -> list[Row]:
    """Measure every case in all processes, as `run_grid` does in one; process 0 writes the file.

    Args:
        process: the process that this is.
        cases: how the rows begin.
        measure: of a case, in one process.
        summarize: makes the rest of a row from the case and what each process measured.
        file: where rows are written.
        before: rows that are in the file already.
    """
    rows: list[Row] = []
    with progress_of(process, len(cases)) as start:
        for case in cases:
            start(" ".join(str(value) for value in case.values()))
            status, measured = everywhere(partial(measure, case))
            rows.append(case | status | (summarize(case, measured) if measured else {}))
            if process.rank == 0:
                file.write([*before, *rows])
    return rows


def progress_of(process: Process, total: int) -> AbstractContextManager[Callable[[str], None]]:
    """`progress`, shown by one process only."""
    return progress(total) if process.rank == 0 else nullcontext(lambda what: None)


def summary(times: Sequence[Sequence[StepTimes]]) -> Row:
    """Times of the slowest process: of each process there are those of all steps.

    `paced_ms` takes the slowest process of every single step instead. That is what processes would need that exchange
    nothing but wait for each other: on a host where steps vary, more than any one of them.
    """
    slowest = max(times, key=lambda steps: statistics.median(step.step for step in steps))
    whole = [step.step for step in slowest]
    medians = StepTimes(*(statistics.median(column) for column in zip(*slowest)))
    return {
        "step_ms": medians.step,
        "paced_ms": statistics.median(max(step.step for step in of_step) for of_step in zip(*times)),
        "mean_ms": statistics.fmean(whole),
        "std_ms": statistics.stdev(whole) if len(whole) > 1 else 0.0,
        "forward_backward_ms": medians.forward_backward,
        "after_backward_ms": medians.after_backward,
        "optimizer_ms": medians.optimizer,
    }


def clear_memory_statistics(device: torch.device) -> None:
    """Forget the peak so far, and what cuBLAS holds from earlier cases."""
    if device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gb(device: torch.device) -> float | None:
    """The most memory that tensors held since `clear_memory_statistics`, in GB of 10^9 bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


def held_gb(device: torch.device) -> float | None:
    """The memory that tensors hold now, in GB of 10^9 bytes; None on a CPU."""
    return torch.cuda.memory_allocated(device) / 1e9 if device.type == "cuda" else None


def largest(rows: Sequence[Row], key: str) -> Row:
    """{key: the largest value among the processes}; nothing where it was not measured."""
    values = [row[key] for row in rows if row.get(key) is not None]
    return {key: max(values)} if values else {}


#: Printed where memory columns are missing.
NO_MEMORY_ON_CPU = "On a CPU, peaks of memory are not measured."


@dataclass(frozen=True)
class ParallelMeasurement(Measurement):
    """The options of commands that run training steps in several processes."""

    processes: int = field(default_factory=lambda: torch.cuda.device_count() or 2)
    """Processes, each with a GPU of its own. Default: as many as there are GPUs; without one, 2 on the CPU."""
    size: SizeName = gpu_or_cpu("xl", "tiny")
    """Model size; tiny is for a try without a GPU."""
    context: int = gpu_or_cpu(512, 128)
    """Context length in tokens."""
    batch_size: int = 4
    """Sequences per step in each process."""
    attention: AttentionName = "plain"
    """plain: Assignment 1's. flash: ours. flash-pytorch: its reference. sdpa-*, flex: PyTorch's."""
    precision: Precision = gpu_or_cpu("bf16", "fp32")
    """bf16: under autocast, or where weights are sharded, with weights that are cast before they are sent; the
    optimizer's are float32."""
    warmup: int = 2
    """Steps before the clock starts."""
    steps: int = 5
    """Steps that are timed."""
    timeout_s: float = 1200.0
    """Processes that are not done by then are ended."""

    def checked_device(self) -> torch.device:
        """The device, once the numbers make sense.

        Raises:
            ValueError: they do not, or there are more processes than GPUs.
        """
        check_options(self, "processes", "context", "batch_size", "steps", "timeout_s")
        check_options(self, "warmup", least=0)
        check_gpus(self.processes, self.device)
        return device_of_process(self.device, 0)

    def step_config(self, device: torch.device, mode: Mode = "eager", optimizer: AdamWName = "basics") -> StepConfig:
        """The step of one process; raises a ValueError if the device cannot do it."""
        known = "basics" if optimizer == "torch" else optimizer
        return StepConfig(
            model_config(self.size, self.context), device, self.batch_size, self.attention, self.precision, mode, known
        )

    def settings(self) -> Row:
        """What all rows have in common."""
        names = ("processes", "size", "context", "batch_size", "attention", "precision", "steps")
        return {name: getattr(self, name) for name in names}

    def tokens_per_second(self, step_ms: float) -> float:
        """Tokens per second of all processes together."""
        return self.processes * self.batch_size * self.context / step_ms * 1e3

    def start(self, function: Callable[..., list[Row]], device: torch.device, *args: Any) -> list[Row]:
        """The rows that process 0 returns of `function(process, *args)`."""
        return run_processes(function, self.processes, *args, device=device.type, timeout_s=self.timeout_s)[0]
