"""The leaderboard of 2026: one training step of a model of 8 billion parameters, on two GPUs.

Two contestants run the same step in the same run, from the same weights, on the same batch:

    ours     FSDP of `cs336_systems.parallel`, FlashAttention, the head fused with its loss, AdamW as one kernel
    torch    fully_shard, its FlashAttention (SDPA), cross_entropy compiled with the head, AdamW(fused=True)

Both keep master weights, gradients and moments in float32, compute and send weights and gradients in bfloat16,
checkpoint every block, and put each block through torch.compile.

For comparison: the course's naive baseline takes 10 s on two B200, the best public entry 3.84 s.
"""

import gc
import os
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cs336_basics.accounting import parameter_counts
from cs336_basics.model import BasicsTransformerLM, Embedding, Linear, ModelConfig, TransformerBlock
from cs336_systems import leaderboard, triton_support
from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.bench_flash import attention_flops
from cs336_systems.checkpointing import apply_checkpointing
from cs336_systems.measure import (
    OK,
    OUT_OF_MEMORY,
    Measurement,
    ResultFile,
    Row,
    check_options,
    gpu_or_cpu,
    median_ms,
    now_ms,
    progress,
    show,
)
from cs336_systems.parallel import FSDP
from cs336_systems.parallel.process_group import Process, check_gpus, device_of_process, run_processes, under_torchrun
from cs336_systems.training_step import Mode

Contestant = Literal["ours", "torch"]
#: The mean loss, from hidden states [batch context d_model], the head's weight [vocab d_model] and targets.
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Seconds per step on two B200, for comparison.
PUBLIC_S = {"naive baseline": 10.0, "best": 3.84}
#: Small, so that the losses of both contestants can be compared over all steps.
LEARNING_RATE = 1e-5
#: So small that it does not matter: Assignment 1's AdamW adds it before its correction of the bias, PyTorch's after.
EPS = 1e-12
FLOAT32_BYTES = 4
GB = 1e9


@dataclass(frozen=True)
class Leaderboard2026(Measurement):
    """Time one training step of an 8B model on two GPUs, ours beside PyTorch's.

    With one GPU the defaults take 135 GB, of which 16 bytes a parameter are 130: where that is too much, choose fewer
    layers (16 take 77 GB).
    """

    vocab: int = gpu_or_cpu(151_936, 512)
    """Number of token ids."""
    context: int = gpu_or_cpu(32_768, 64)
    """Tokens in a sequence."""
    d_model: int = gpu_or_cpu(4096, 64)
    """Width of the model."""
    d_ff: int = gpu_or_cpu(11_008, 192)
    """Inner width of the feed-forward network."""
    layers: int = gpu_or_cpu(34, 2)
    """Number of blocks."""
    heads: int = gpu_or_cpu(32, 4)
    """Attention heads."""
    processes: int = field(default_factory=lambda: torch.cuda.device_count() or 2)
    """Processes, each with a GPU of its own. Default: as many as there are GPUs; without one, 2 on the CPU."""
    batch_size: int = 1
    """Sequences per process and step."""
    contestants: tuple[Contestant, ...] = ("ours", "torch")
    """Who takes part, in this order."""
    mode: Mode = gpu_or_cpu("compiled", "eager")
    """compiled puts each block and the final norm through torch.compile, of torch's contestant also head and loss,
    whose float32 logits else take 20 GB and more."""
    warmup: int = 2
    """Steps before the clock starts; the first compiles."""
    steps: int = 4
    """Steps that are timed."""
    timeout_s: float = 1200.0
    """For all processes of a contestant together."""
    name: str = "leaderboard_2026"

    def execute(self) -> None:
        check_options(
            self, "vocab", "context", "d_model", "d_ff", "layers", "heads", "processes", "batch_size", "steps"
        )  # fmt: skip
        check_options(self, "warmup", least=0)
        if not self.contestants:
            raise ValueError("there is nothing to measure: --contestants got none")
        if under_torchrun():
            raise ValueError("leaderboard-2026 starts its processes itself: leave out torchrun")
        device = device_of_process(self.device, 0)
        check_gpus(self.processes, device.type)
        if device.type == "cpu" and "ours" in self.contestants and not triton_support.INTERPRETED:
            raise ValueError(
                "ours is made of Triton kernels and needs a GPU; set TRITON_INTERPRET=1 to try it on a CPU, or choose "
                "--contestants torch"
            )
        parameters = sum(parameter_counts(self.config).values())
        what = f"training step of a model of {parameters / 1e9:.3g}B parameters"
        common = {
            "layers": self.layers, "context": self.context, "processes": self.processes,
            "batch": self.processes * self.batch_size, "mode": self.mode,
            "compute": str(compute_dtype(device)).removeprefix("torch."),
        }  # fmt: skip
        file = self.result_file(what, device, **common, step_flops=self.step_flops, public_s=PUBLIC_S)
        rows = leaderboard_rows(self, device, file)
        speed = ("contestant", "seconds", "tokens/s", "of_matmul", "first_loss", "last_loss", "loss_difference")
        memory = ("contestant", "initial_GB", "predicted_initial_GB", "peak_GB", "predicted_peak_GB")
        show(what, rows, speed, common=common, digits=4)
        if device.type == "cuda":
            show("memory per GPU", rows, memory)
        print("for comparison, on two B200: " + ", ".join(f"{name} {taken:g} s" for name, taken in PUBLIC_S.items()))
        file.announce()

    @property
    def config(self) -> ModelConfig:
        """The shape of the model.

        Raises:
            ValueError: there is no such shape.
        """
        return ModelConfig(self.vocab, self.context, self.d_model, self.layers, self.heads, self.d_ff)

    @property
    def step_flops(self) -> float:
        """Operations that a step needs in all processes together, without what checkpointing computes again.

        Only matrix products count, and not the masked half of attention. A token meets each weight in 2 operations.
        The backward pass takes twice the forward's.
        """
        counts = parameter_counts(self.config)
        weights = counts["attention"] + counts["feed-forward"] + counts["language-model head"]
        attention = self.layers * attention_flops(self.heads, self.context, self.d_model // self.heads)
        return 3 * self.processes * self.batch_size * (2 * self.context * weights + attention)


def leaderboard_rows(options: Leaderboard2026, device: torch.device, file: ResultFile) -> list[Row]:
    """A row for each contestant, which runs in processes of its own.

    Returns:
        "seconds", the median time of a step of the slowest process; "times_s", those of all steps; "tokens/s";
        "matmul_TFLOP/s", the speed of a product of square matrices on each GPU at the same time; "of_matmul", the share
        of it that the step's operations reach (model FLOPs utilisation); "first_step_s", with compilation;
        "losses", of all steps, warm-up included, each the mean over processes; "loss_difference", the largest from
        the losses of the first contestant; on GPUs "initial_GB", tensors held per GPU before the first step, and
        "peak_GB". Predicted are both, and for compiled code in "predicted_GB" the moments of `predicted_bytes`.
    """
    rows: list[Row] = []
    with progress(len(options.contestants)) as start:
        for contestant in options.contestants:
            start(contestant)
            row: Row = {"contestant": contestant} | _predictions(options, contestant, device)
            parts = run_or_out_of_memory(
                measure_contestant, options.processes, device, options, contestant, timeout_s=options.timeout_s
            )
            row |= {"status": OUT_OF_MEMORY} if parts is None else {"status": OK} | _summary(parts, options)
            rows.append(row)
            _compare_losses(rows)
            file.write(rows)
    return rows


def _predictions(options: Leaderboard2026, contestant: Contestant, device: torch.device) -> Row:
    number = compute_dtype(device).itemsize
    moments = predicted_bytes(options.config, contestant, options.batch_size, options.processes, number)
    predicted = {moment: size / GB for moment, size in moments.items()}
    row: Row = {"predicted_initial_GB": predicted["start"]}
    if options.mode == "eager":  # which keeps what compiled code does not
        return row
    return row | {"predicted_peak_GB": max(predicted.values()), "predicted_GB": predicted}


def _summary(parts: list[Row], options: Leaderboard2026) -> Row:
    """The row that the rows of all processes make."""
    times = [max(taken) for taken in zip(*(part["times_s"] for part in parts))]
    losses = [statistics.fmean(all_of_step) for all_of_step in zip(*(part["losses"] for part in parts))]
    timed = times[options.warmup :]
    seconds = statistics.median(timed)
    ceiling = statistics.fmean(part["matmul_TFLOP/s"] for part in parts)
    row: Row = {
        "seconds": seconds,
        "times_s": timed,
        "first_step_s": times[0],
        "tokens/s": options.processes * options.batch_size * options.context / seconds,
        "matmul_TFLOP/s": ceiling,
        "of_matmul": options.step_flops / options.processes / seconds / (ceiling * 1e12),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "losses": losses,
    }
    return row | {name: max(part[name] for part in parts) for name in ("initial_GB", "peak_GB") if name in parts[0]}


def _compare_losses(rows: list[Row]) -> None:
    measured = [row for row in rows if row["status"] == OK]
    if len(measured) > 1 and measured[-1] is rows[-1]:
        pairs = zip(measured[0]["losses"], measured[-1]["losses"])
        rows[-1]["loss_difference"] = max(abs(first - last) for first, last in pairs)


# Memory, on paper


def predicted_bytes(
    config: ModelConfig, contestant: Contestant, batch_size: int, world_size: int, number: int = 2
) -> dict[str, float]:
    """Bytes that tensors take on each GPU at four moments, of which the largest is the peak.

    Each of N processes keeps 1/N of P parameters, in float32. The gradients are dropped before each step, so that
    4 P/N (the master weights) and 8 P/N (AdamW's moments) are always there, and the gradients, 4 P/N, come unit by
    unit while the backward pass goes through the blocks. Of the L blocks' activations only the inputs are kept, s bytes
    each, and go one by one. So memory is a straight line between

        first block    12 P/N + L s + A        where the backward pass begins, with the last block,
        last block     16 P/N + s + A          where it ends,

    and A is what is there of a single block: its activations, computed again, and their gradients; weights of two
    blocks, gathered, and two blocks' gradients on their way. A third peak is the head's:

        head           12 P/N + L s + the head's weight, gradient and logits

    Ours gathers the head alone and never has all logits, but a float32 gradient of its weight. In torch's contestant
    the embedding and the head belong to the root, which stays gathered throughout.

    Args:
        config: the shape of the model; sequences are as long as its context.
        contestant: whose.
        batch_size: sequences per process.
        world_size: N.
        number: bytes of a number that is computed with or sent.

    Returns:
        Bytes at "start", when only the master weights and RoPE's tables are there, and at "head", "first block" and
        "last block". The activations are those that compiled code keeps.
    """
    counts = parameter_counts(config)
    d, layers, tokens = config.d_model, config.num_layers, batch_size * config.context_length
    block = (counts["attention"] + counts["feed-forward"]) / layers
    head = counts["language-model head"]
    shares = {name: count / (1 if name == "norms" else world_size) for name, count in counts.items()}
    state = FLOAT32_BYTES * sum(shares.values())
    rope = FLOAT32_BYTES * config.context_length * d // config.num_heads
    always = 3 * state + rope  # from the first optimizer step on
    stream, inner = number * tokens * d, number * tokens * config.ffn_width

    # Kept: queries, keys, values, attention's output and the sum after it; W1 x and W3 x. Then, in the backward pass:
    # gradients of the block's output and input, of the feed-forward network's inner product, of W1 x and W3 x.
    activations = (5 + 2) * stream + (2 + 3) * inner
    one_block = activations + (2 + 2) * number * block
    gradients = FLOAT32_BYTES * layers * block / world_size
    if contestant == "ours":
        root = 0.0
        # The weight's gradient, its product with the loss's, and that in bfloat16.
        loss = number * head + 2 * FLOAT32_BYTES * head + number * head
        head_gradient = FLOAT32_BYTES * head / world_size
    else:
        root = 2 * number * head
        # Logits, whose gradient takes their place, and the gradient of the weight, which waits for the embedding's.
        loss = root + number * tokens * config.vocab_size + number * head
        head_gradient = number * head
    return {
        "start": state + rope,
        "head": always + (layers + 3) * stream + loss + number * block,
        "first block": always + layers * stream + root + head_gradient + one_block,
        "last block": always + gradients + stream + root + head_gradient + one_block,
    }


# The step


class HeadWithLoss(nn.Module):
    """The last linear map and the loss as one module, so that FSDP gathers the map's weight for both.

    Args:
        lm_head: the linear map.
        loss: of hidden states, the map's weight and targets.
    """

    def __init__(self, lm_head: Linear, loss: Loss) -> None:
        super().__init__()
        self.lm_head = lm_head
        self.loss = loss

    def forward(
        self, hidden: Float[Tensor, "batch context d_model"], targets: Int[Tensor, "batch context"]
    ) -> Float[Tensor, ""]:
        return self.loss(hidden, self.lm_head.weight, targets)


class ModelWithLoss(nn.Module):
    """A model from token ids to the mean loss, each block under a checkpoint.

    A checkpoint calls the block as a module, so that hooks of the block, which gather its weights, also run when
    the backward pass computes it again. What `compile_forward` compiles lies inside of the hooks.
    """

    def __init__(self, model: BasicsTransformerLM, loss: Loss) -> None:
        super().__init__()
        apply_checkpointing(model, "block")
        self.token_embeddings = model.token_embeddings
        self.layers = model.layers
        self.ln_final = model.ln_final
        self.head = HeadWithLoss(model.lm_head, loss)

    @property
    def blocks(self) -> list[nn.Module]:
        """The blocks themselves, without their checkpoints."""
        return list(self.layers.children())

    def forward(self, ids: Int[Tensor, "batch context"], targets: Int[Tensor, "batch context"]) -> Float[Tensor, ""]:
        x = self.token_embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.ln_final(x), targets)


def compile_forward(*modules: nn.Module) -> None:
    """Compile what the modules compute; their hooks, before and after it, stay as they are."""
    for module in modules:
        module.forward = torch.compile(module.forward, dynamic=False)


def compute_dtype(device: torch.device) -> torch.dtype:
    """What forward and backward pass compute in. Triton's interpreter multiplies bfloat16 wrongly."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def our_contestant(options: Leaderboard2026, process: Process) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model from ids and targets to the loss, sharded by our FSDP, and its optimizer."""
    from cs336_systems.adamw import FusedAdamW
    from cs336_systems.linear_cross_entropy import linear_cross_entropy

    on_gpu = process.device.type == "cuda"
    model = _new_model(options, process, "flash" if on_gpu else "flash-pytorch", linear_cross_entropy)
    if options.mode == "compiled":
        compile_forward(*model.blocks, model.ln_final)  # the loss is kernels already
    units = (TransformerBlock, Embedding, HeadWithLoss)
    sharded = FSDP(model, compute_dtype(process.device), units)
    return sharded, FusedAdamW(sharded.parameters(), lr=LEARNING_RATE, eps=EPS)


def torch_contestant(options: Leaderboard2026, process: Process) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The same from PyTorch's parts; gradients are reduced in the compute dtype, as ours are."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = _new_model(options, process, "sdpa-flash", torch_loss)
    if options.mode == "compiled":
        compile_forward(*model.blocks, model.ln_final, model.head)
    mesh = init_device_mesh(process.device.type, (process.world_size,))
    dtype = compute_dtype(process.device)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=dtype)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, eps=EPS, fused=True)


def torch_loss(
    hidden: Float[Tensor, "*batch d_model"], weight: Float[Tensor, "vocab d_model"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """Logits, then the loss in float32; compiled, the float32 logits are never stored."""
    logits = hidden @ weight.T
    return cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def _new_model(options: Leaderboard2026, process: Process, attention: AttentionName, loss: Loss) -> ModelWithLoss:
    """A model with the same weights in every process and contestant, in float32."""
    torch.manual_seed(0)
    model = BasicsTransformerLM.from_config(
        options.config, causal_attention=causal_attention(attention), device=process.device
    )
    return ModelWithLoss(model, loss)


def batch_of(
    options: Leaderboard2026, process: Process
) -> tuple[Int[Tensor, "batch context"], Int[Tensor, "batch context"]]:
    """This process's rows of a random batch: ids, and the ids that follow them."""
    generator = torch.Generator().manual_seed(1)
    shape = (process.world_size, options.batch_size, options.context + 1)
    ids = torch.randint(options.vocab, shape, generator=generator)[process.rank].to(process.device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def measure_contestant(process: Process, options: Leaderboard2026, contestant: Contestant) -> Row:
    """Run warm-up and timed steps in this process.

    Returns:
        "times_s" and "losses" of all steps, "matmul_TFLOP/s", and on a GPU "initial_GB" and "peak_GB", the latter
        of the timed steps.
    """
    device, on_gpu = process.device, process.device.type == "cuda"
    build = our_contestant if contestant == "ours" else torch_contestant
    model, optimizer = build(options, process)
    ids, targets = batch_of(options, process)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = model(ids, targets)
        loss.backward()
        if isinstance(model, FSDP):
            model.finish_gradient_synchronization()
        optimizer.step()
        return loss.detach()

    row: Row = {}
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        row["initial_GB"] = torch.cuda.memory_allocated(device) / GB
    times, losses = [], []
    for number in range(options.warmup + options.steps):
        if on_gpu and number == options.warmup:
            torch.cuda.reset_peak_memory_stats(device)
        dist.barrier()
        started = now_ms(device)
        losses.append(step())
        times.append((now_ms(device) - started) / 1e3)
    if on_gpu:
        row["peak_GB"] = torch.cuda.max_memory_allocated(device) / GB
    losses_of_steps = torch.stack(losses).tolist()
    return row | {"times_s": times, "losses": losses_of_steps, "matmul_TFLOP/s": _matmul_teraflops(device)}


def _matmul_teraflops(device: torch.device) -> float:
    """The ceiling, while the GPU is as warm as the steps have left it."""
    size = leaderboard.MATMUL_SIZE if device.type == "cuda" else 256
    a, b = (torch.randn(size, size, device=device, dtype=compute_dtype(device)) for _ in range(2))
    dist.barrier()
    return 2 * size**3 / median_ms(lambda: a @ b, device, rep_ms=500) / 1e9


# Running out of memory


def run_or_out_of_memory(
    function: Callable[..., Row], world_size: int, device: torch.device, *args: Any, timeout_s: float
) -> list[Row] | None:
    """Call `function(process, *args)` in new processes; None if memory ran out in any of them.

    A process without memory left ends at once, and the others, which may wait for it in a collective, are ended. It
    leaves a file behind, for what the others say depends on who notices first.
    """
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "out_of_memory"
        try:
            return run_processes(
                _ends_without_memory, world_size, function, note, args, device=device.type, timeout_s=timeout_s
            )
        except (mp.ProcessRaisedException, mp.ProcessExitedException):
            if note.exists():
                return None
            raise


def _ends_without_memory(process: Process, function: Callable[..., Row], note: Path, args: tuple[Any, ...]) -> Row:
    try:
        return function(process, *args)
    except Exception as error:
        # Compilers and NCCL wrap it.
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error):
            raise
        note.touch()
        os._exit(1)  # leaving the group in order would wait for the others
