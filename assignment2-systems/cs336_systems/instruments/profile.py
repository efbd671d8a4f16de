"""Show where a training step spends its time, kernel by kernel: the course's nsys_profile.

Named ranges lie around the phases of a step and around the parts of attention. torch.profiler's trace is enough for the
tables; Nsight Systems shows the same ranges, with the command line that `profile` prints.
"""

import math
import shlex

import torch
from jaxtyping import Float
from torch import Tensor

from cs336_basics.model import CausalAttention, ModelConfig
from cs336_basics.nn_utils import softmax
from cs336_basics.strategy import resolve_device
from cs336_systems.instruments.measure import OK, Row, print_table, result_file, synchronize, try_measure
from cs336_systems.instruments.options.common import check_options
from cs336_systems.instruments.options.one_gpu import Profile
from cs336_systems.instruments.trace import Work, category_rows, kernel_rows, range_rows, record, short_name, work_in
from cs336_systems.training.choices import ATTENTIONS, AttentionName, model_config, resolve
from cs336_systems.training.step import StepConfig, TrainingStep, phase

#: Kernels of each range in the table; the file has all of them.
TOP_KERNELS = 5
#: Options that do not change the measurement.
_NO_SETTINGS = ("device", "name", "out", "under_nsys")


def run(options: Profile) -> None:
    """Profile a step, print tables, and write a file and a trace."""
    check_options(options, "context", "batch_size", "steps")
    check_options(options, "warmup", least=0)
    device = resolve_device(options.device)
    config = StepConfig(
        model_config(options.size, options.context), device, options.batch_size, options.attention,
        options.precision, options.mode, options.optimizer, options.loss,
    )  # fmt: skip
    if options.under_nsys:
        if device.type != "cuda":
            raise ValueError(f"Nsight Systems records GPUs, but the device is {device}; leave --under-nsys out")
        _run_for_nsys(config, options.warmup, options.steps)
        return

    settings = {key: value for key, value in vars(options).items() if key not in _NO_SETTINGS}
    file = result_file(options, "kernels of a training step", device, **settings)
    trace_path = options.out / f"{options.name}.trace.json.gz"
    work: list[Work] = []

    def measure() -> Row:
        step = _prepared(config, options.warmup)
        work.extend(work_in(record(step.full, device, options.steps, trace_path)))
        return {}

    outcome = try_measure(measure)
    if outcome["status"] != OK:
        file.write([outcome])
        print_table("a training step", [outcome], common=settings)
        file.announce()
        return
    ranges = range_rows(work, options.steps, flops_by_part(config.model, options.batch_size))
    kinds, kernels = category_rows(work, options.steps), kernel_rows(work, options.steps)
    file.write(kernels, ranges=ranges, categories=kinds)
    unit = "kernel" if device.type == "cuda" else "operator"
    print_table("a training step by range", ranges, common=settings)
    print_table(f"ms per step by kind of {unit}", kinds)
    print_table(
        f"the longest {unit}s per range and step",
        [row | {"kernel": short_name(row["kernel"])} for row in kernels if row["rank"] <= TOP_KERNELS],
        ("range", "calls", "ms", "share_%", "kind", "kernel"),
    )
    file.announce()
    print(f"written: {trace_path} (open it in https://ui.perfetto.dev)")
    if device.type == "cuda":
        print(f"the same under Nsight Systems:\n  {nsys_command(options)}")


def nsys_command(options: Profile) -> str:
    """Return the command line that records these settings with Nsight Systems."""
    report = shlex.quote(str(options.out / options.name))
    changed = {key: value for key, value in vars(options).items() if value != getattr(Profile(), key)}
    words = [f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in changed.items()]
    return " ".join(
        [
            "nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --force-overwrite=true",
            f"-o {report} python -m cs336_systems profile --under-nsys",
            *words,
            f"&& nsys stats -r nvtx_kern_sum,cuda_gpu_kern_sum {report}.nsys-rep",
        ]
    )


def annotated_attention(
    q: Float[Tensor, "... seq d"], k: Float[Tensor, "... seq d"], v: Float[Tensor, "... seq d"]
) -> Float[Tensor, "... seq d"]:
    """Compute Assignment 1's causal attention, with each of its parts in a named range."""
    with phase("scores", q.device):
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(~mask, -torch.inf)
    with phase("softmax", q.device):
        weights = softmax(scores, dim=-1)
    with phase("output", q.device):
        return weights @ v


def _annotated(name: AttentionName) -> CausalAttention:
    if name == "plain":
        return annotated_attention
    attention = resolve(ATTENTIONS, name)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with phase("attention", q.device):
            return attention(q, k, v)

    return attend


def _prepared(config: StepConfig, warmup: int) -> TrainingStep:
    # torch.compile would cut the model into pieces at the ranges, so a compiled model has none.
    step = TrainingStep(config, attention=_annotated(config.attention) if config.mode == "eager" else None)
    for _ in range(warmup):
        step.full()
    synchronize(config.device)
    return step


def _run_for_nsys(config: StepConfig, warmup: int, steps: int) -> None:
    step = _prepared(config, warmup)
    torch.cuda.cudart().cudaProfilerStart()
    for _ in range(steps):
        step.full()
    synchronize(config.device)
    torch.cuda.cudart().cudaProfilerStop()


def flops_by_part(model: ModelConfig, batch_size: int) -> dict[str, float]:
    """Count the operations of a forward pass in the parts of attention.

    In each of the two matmuls a score costs two operations for each number of a head. In the softmax it costs five:
    maximum, difference, exponential, sum, quotient.
    """
    scores = model.num_layers * batch_size * model.num_heads * model.context_length**2
    d_head = model.d_model // model.num_heads
    return {"scores": 2.0 * d_head * scores, "softmax": 5.0 * scores, "output": 2.0 * d_head * scores}
