"""Where a training step spends its time, kernel by kernel: the course's nsys_profile.

Named ranges lie around the phases of a step and around the parts of attention. torch.profiler's trace is
enough for the tables; Nsight Systems shows the same ranges, with the command line that `profile` prints.
"""

import bisect
import gzip
import json
import math
import os
import re
import shlex
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.profiler import ProfilerActivity

from cs336_basics.model import CausalAttention, ModelConfig
from cs336_basics.nn_utils import softmax
from cs336_basics.strategy import resolve_device
from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.measure import (
    OK,
    Measurement,
    Row,
    check_options,
    gpu_or_cpu,
    guarded,
    show,
    synchronize,
)
from cs336_systems.models import SizeName, model_config
from cs336_systems.training_step import (
    PHASES,
    LossName,
    Mode,
    OptimizerName,
    Precision,
    StepConfig,
    TrainingStep,
    phase,
)

#: Ranges inside attention: three for the plain one, a single one for a fused one.
PARTS = ("scores", "softmax", "output", "attention")

#: Kernels of each range in the table; the file has all of them.
SHOWN = 5

#: The kind of work of a kernel (or, on a CPU, of an operator) by its name. The first pattern found counts.
CATEGORIES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern, re.IGNORECASE))
    for name, pattern in (
        ("matrix products", r"^triton_tem_"),  # Inductor tells in a name's head what it has fused
        ("reductions", r"^triton_(red|per)_"),
        ("elementwise", r"^triton_poi_"),
        ("fused attention", r"flash|fmha|sdpa|attention"),
        ("matrix products", r"gemm|gemv|nvjet|cutlass|xmma|splitk|^aten::(mm|bmm|addmm|baddbmm|mv|dot)$"),
        ("multi-tensor", r"multi_tensor_apply|foreach|adam"),
        ("indexing", r"gather|scatter|embedding|radixsort|(?<!with_)index"),
        ("copies and fills", r"memcpy|memset|copy|catarray|(?<!masked_)fill|^aten::(clone|cat|zero_)$"),
        ("reductions", r"reduce|softmax|cross_entropy|^aten::(sum|mean|amax|max|norm)$"),
        (
            "elementwise",
            r"elementwise|triu_tril|^aten::((mul|add|sub|div|exp|log|pow|neg|sqrt|rsqrt|square|sigmoid|where)_?"
            r"|lerp_|addcmul_|addcdiv_|sigmoid_backward|masked_fill_?|bitwise_not|tril)$",
        ),
    )
)


@dataclass(frozen=True)
class Profile(Measurement):
    """Show where a training step spends its time: kernels (on a CPU: operators), their kinds, ranges, and a trace."""

    size: SizeName = gpu_or_cpu("small", "tiny")
    """Model size."""
    context: int = gpu_or_cpu(512, 128)
    """Context length in tokens."""
    batch_size: int = 4
    """Sequences per step."""
    attention: AttentionName = "plain"
    """Attention; inside the plain one scores, softmax and output are told apart."""
    precision: Precision = "fp32"
    """bf16 runs forward and backward pass under autocast; parameters stay float32."""
    mode: Mode = "eager"
    """compiled puts the model and the loss through torch.compile; attention's parts are then not told apart."""
    optimizer: OptimizerName = "basics"
    """Assignment 1's AdamW, or the fused one."""
    loss: LossName = "plain"
    """Logits and cross-entropy, or both fused."""
    warmup: int = 5
    """Steps before the profiler starts."""
    steps: int = 3
    """Steps that are profiled; times are means over them."""
    under_nsys: bool = False
    """Leave torch.profiler out and mark the steps for `nsys profile --capture-range=cudaProfilerApi`."""
    name: str = "profile"
    """Results are written to <out>/<name>.json and <out>/<name>.trace.json.gz."""

    def execute(self) -> None:
        check_options(self, "context", "batch_size", "steps")
        check_options(self, "warmup", least=0)
        device = resolve_device(self.device)
        config = StepConfig(
            model_config(self.size, self.context), device, self.batch_size, self.attention,
            self.precision, self.mode, self.optimizer, self.loss,
        )  # fmt: skip
        if self.under_nsys:
            if device.type != "cuda":
                raise ValueError(f"Nsight Systems records GPUs, but the device is {device}; leave --under-nsys out")
            _run_for_nsys(config, self.warmup, self.steps)
            return

        settings = {key: value for key, value in vars(self).items() if key not in _NO_SETTINGS}
        file = self.result_file("kernels of a training step", device, **settings)
        trace_path = self.out / f"{self.name}.trace.json.gz"
        work: list[Work] = []

        def record() -> Row:
            work.extend(work_in(record_trace(config, self.warmup, self.steps, trace_path)))
            return {}

        outcome = guarded(record)
        if outcome["status"] != OK:
            file.write([outcome])
            show("a training step", [outcome], common=settings)
            file.announce()
            return
        ranges = range_rows(work, self.steps, flops_by_part(config.model, self.batch_size))
        kinds, kernels = category_rows(work, self.steps), kernel_rows(work, self.steps)
        file.write(kernels, ranges=ranges, categories=kinds)
        unit = "kernel" if device.type == "cuda" else "operator"
        show("a training step by range", ranges, common=settings)
        show(f"ms per step by kind of {unit}", kinds)
        show(
            f"the longest {unit}s per range and step",
            [row | {"kernel": short_name(row["kernel"])} for row in kernels if row["rank"] <= SHOWN],
            ("range", "calls", "ms", "share_%", "kind", "kernel"),
        )
        file.announce()
        print(f"written: {trace_path} (open it in https://ui.perfetto.dev)")
        if device.type == "cuda":
            print(f"the same under Nsight Systems:\n  {self.nsys_command()}")

    def nsys_command(self) -> str:
        """The command line that records these settings with Nsight Systems."""
        report = shlex.quote(str(self.out / self.name))
        given = {key: value for key, value in vars(self).items() if value != getattr(type(self)(), key)}
        options = [f"--{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in given.items()]
        return " ".join(
            [
                "nsys profile --trace=cuda,nvtx,osrt --capture-range=cudaProfilerApi --force-overwrite=true",
                f"-o {report} python -m cs336_systems profile --under-nsys",
                *options,
                f"&& nsys stats -r nvtx_kern_sum,cuda_gpu_kern_sum {report}.nsys-rep",
            ]
        )


#: Options that do not change what is measured.
_NO_SETTINGS = ("device", "name", "out", "under_nsys")


def annotated_attention(
    q: Float[Tensor, "... seq d"], k: Float[Tensor, "... seq d"], v: Float[Tensor, "... seq d"]
) -> Float[Tensor, "... seq d"]:
    """Assignment 1's causal attention, each of its parts in a range."""
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
    attention = causal_attention(name)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with phase("attention", q.device):
            return attention(q, k, v)

    return attend


def _prepared(config: StepConfig, warmup: int) -> TrainingStep:
    # torch.compile would cut the model in pieces at the ranges, so a compiled one goes without.
    step = TrainingStep(config, None if config.mode == "compiled" else _annotated(config.attention))
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


def record_trace(config: StepConfig, warmup: int, steps: int, path: Path) -> dict[str, Any]:
    """Profile full steps after `warmup` others; write the Chrome trace to `path` (.json.gz) and return it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it talks of itself
    step = _prepared(config, warmup)
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if config.device.type == "cuda" else [])
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile(
        activities=activities,
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=steps, repeat=1),  # the profiler itself starts slowly
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(path)),
    ) as profiler:
        for _ in range(1 + steps):
            step.full()
            synchronize(config.device)
            profiler.step()
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return json.load(file)


@dataclass(frozen=True)
class Work:
    """A kernel (on a CPU: an operator without those that it calls) and the ranges that it was launched in."""

    name: str
    start: float
    """When it began, in µs."""
    duration: float
    """How long it ran, in µs."""
    phase: str
    """One of `PHASES`, or "other"."""
    part: str
    """One of `PARTS`, or nothing."""
    occurrence: int
    """The how manieth range of its phase, from 0."""


def work_in(trace: dict[str, Any]) -> list[Work]:
    """All kernels of a Chrome trace; where there are none, its operators.

    A kernel runs after the host has launched it, possibly long after the host has left the range. So it is the
    time of the launch that tells the range. The backward pass launches from a thread of its own, but within the
    time that the range is open.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    ranges: dict[str, list[tuple[float, float]]] = {
        name: sorted(
            (event["ts"], event["ts"] + event["dur"])
            for event in events
            if event.get("cat") == "user_annotation" and event["name"] == name
        )
        for name in (*PHASES, *PARTS)
    }

    def at(names: tuple[str, ...], moment: float) -> tuple[str, int]:
        for name in names:
            index = bisect.bisect_right(ranges[name], (moment, math.inf)) - 1
            if index >= 0 and moment <= ranges[name][index][1]:
                return name, index
        return "", 0

    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        launches = {
            event["args"]["correlation"]: event["ts"]
            for event in events
            if event.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in event.get("args", {})
        }
        timed = [(event, event["dur"], launches.get(event["args"].get("correlation"), -math.inf)) for event in kernels]
    else:
        timed = [(event, own, event["ts"]) for event, own in _own_times(events)]

    work = []
    for event, duration, launched in timed:
        name, occurrence = at(PHASES, launched)
        part, _ = at(PARTS, launched)
        work.append(Work(event["name"], event["ts"], duration, name or "other", part, occurrence))
    return work


def _own_times(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Operators with the time that they spent outside the operators they called, in µs."""
    operators = sorted(
        (event for event in events if event.get("cat") == "cpu_op"),
        key=lambda event: (event["tid"], event["ts"], -event["dur"]),
    )
    own = [event["dur"] for event in operators]
    callers: list[int] = []
    for index, event in enumerate(operators):
        while callers and (
            operators[callers[-1]]["tid"] != event["tid"]
            or operators[callers[-1]]["ts"] + operators[callers[-1]]["dur"] <= event["ts"]
        ):
            callers.pop()
        if callers:
            own[callers[-1]] -= event["dur"]
        callers.append(index)
    return list(zip(operators, own))


def category(name: str) -> str:
    """The kind of work that a kernel or operator of that name does."""
    return next((kind for kind, pattern in CATEGORIES if pattern.search(name)), "other")


def short_name(name: str, length: int = 36) -> str:
    """A kernel's name without namespaces and, for PyTorch's own, reduced to what tells it apart."""
    name = re.sub(r"\(anonymous namespace\)::|at::native::|at::cuda::|c10::|std::|^void ", "", name)
    if inner := re.search(r"(\w*elementwise_kernel|reduce_kernel|multi_tensor_apply_kernel)\w*<", name):
        told = re.search(r"\w+_kernel_cuda|\w*kernel_impl|\w+(?:_f|F)unctor\b|\w+Ops\b", name[inner.end() :])
        if told:
            name = f"{inner[1].removesuffix('_kernel')}: {told[0]}"
    return name if len(name) <= length else name[: length - 1] + "…"


def flops_by_part(model: ModelConfig, batch_size: int) -> dict[str, float]:
    """Operations per forward pass in the parts of attention.

    A score costs two for each number of a head in each of the products, and five in the softmax: maximum,
    difference, exponential, sum, quotient.
    """
    scores = model.num_layers * batch_size * model.num_heads * model.context_length**2
    d_head = model.d_model // model.num_heads
    return {"scores": 2.0 * d_head * scores, "softmax": 5.0 * scores, "output": 2.0 * d_head * scores}


def range_rows(work: list[Work], steps: int, flops: dict[str, float] | None = None) -> list[Row]:
    """One row per range: time of its kernels, from its first to its last, number, and matrix products' share."""
    total = sum(one.duration for one in work)
    inside = [(name, [one for one in work if one.phase == name]) for name in (*PHASES, "other")]
    inside[1:1] = [(f"  {part}", [one for one in work if one.part == part]) for part in PARTS]  # below "forward"

    rows = []
    for name, chosen in (*inside, ("step", work)):
        if not chosen:
            continue
        busy = sum(one.duration for one in chosen)
        row: Row = {
            "range": name,
            "busy_ms": busy / steps / 1e3,
            "span_ms": _span(chosen) / steps / 1e3 if name in PHASES else None,
            "share_%": _percent(busy, total),
            "calls": round(len(chosen) / steps),
            "matmul_%": _percent(sum(one.duration for one in chosen if category(one.name) == "matrix products"), busy),
        }
        if flops:
            row["GFLOP"] = flops[name.strip()] / 1e9 if name.strip() in flops else None
        rows.append(row)
    return rows


def category_rows(work: list[Work], steps: int) -> list[Row]:
    """Milliseconds per step: a row for each kind of work, a column for each phase, the largest first."""
    times: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for one in work:
        times[category(one.name)][one.phase] += one.duration / steps / 1e3
    total = sum(one.duration for one in work) / steps / 1e3
    phases = [name for name in (*PHASES, "other") if any(name in row for row in times.values())]
    return [
        {"kind": kind}
        | {name: row.get(name, 0.0) for name in phases}
        | {"step": sum(row.values()), "share_%": _percent(sum(row.values()), total)}
        for kind, row in sorted(times.items(), key=lambda item: -sum(item[1].values()))
    ]


def kernel_rows(work: list[Work], steps: int) -> list[Row]:
    """A row for each kernel of each phase, and of the whole step, the longest first within its range."""
    rows = []
    for name in (*PHASES, "other", "step"):
        chosen = [one for one in work if name in (one.phase, "step")]
        busy = sum(one.duration for one in chosen)
        by_name: dict[str, list[float]] = defaultdict(list)
        for one in chosen:
            by_name[one.name].append(one.duration)
        ordered = sorted(by_name.items(), key=lambda item: -sum(item[1]))
        for rank, (kernel, times) in enumerate(ordered, start=1):
            rows.append(
                {
                    "range": name,
                    "rank": rank,
                    "calls": round(len(times) / steps),
                    "ms": sum(times) / steps / 1e3,
                    "share_%": _percent(sum(times), busy),
                    "kind": category(kernel),
                    "kernel": kernel,
                }
            )
    return rows


def _span(work: list[Work]) -> float:
    """From the first to the last, in µs, summed over the occurrences of the range."""
    ends: dict[int, tuple[float, float]] = {}
    for one in work:
        first, last = ends.get(one.occurrence, (math.inf, -math.inf))
        ends[one.occurrence] = min(first, one.start), max(last, one.start + one.duration)
    return sum(last - first for first, last in ends.values())


def _percent(part: float, whole: float) -> float | None:
    return round(100 * part / whole, 2) if whole else None
