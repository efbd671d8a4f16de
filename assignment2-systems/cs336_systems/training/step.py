"""One training step of a model of the assignment, on one device or on one of several ranks, pass by pass."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy as torch_cross_entropy

from cs336_basics.model import BasicsTransformerLM, CausalAttention, ModelConfig
from cs336_systems.kernels import triton_support
from cs336_systems.parallel import ShardedOptimizer
from cs336_systems.parallel.blocks import blocks_of, compile_blocks
from cs336_systems.parallel.process_group import Rank
from cs336_systems.parallel.torch_fsdp2 import local_part
from cs336_systems.theory.activations import CheckpointStrategy
from cs336_systems.training import choices
from cs336_systems.training.checkpointing import apply_checkpointing
from cs336_systems.training.containers import HeadWithLoss

#: The named ranges of a step, in order.
PHASES = ("forward", "loss", "backward", "optimizer")
SHARDED_WEIGHTS = ("fsdp", "fsdp-linear", "fully-shard")
#: Small enough to keep many steps on one batch finite.
LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class StepConfig:
    """The parts of a training step. `choices` explains the names."""

    model: ModelConfig
    """Shape of the model; sequences are as long as its context."""
    device: torch.device
    """Device that the step runs on; a rank has its own."""
    batch_size: int = 4
    """Sequences per step and rank."""
    attention: choices.AttentionName = "plain"
    """Which attention."""
    precision: choices.Precision = "float32"
    """Precision of the forward and backward pass."""
    mode: choices.Mode = "eager"
    """Whether torch.compile is used, and for what."""
    optimizer: choices.OptimizerName = "basics"
    """Which AdamW."""
    loss: choices.LossName = "plain"
    """Which cross-entropy."""
    checkpointing: CheckpointStrategy = "none"
    """Which blocks' forward passes are repeated in the backward pass."""
    container: choices.ContainerName = "none"
    """How the ranks work together."""
    bucket_mib: choices.BucketSize = "auto"
    """Size of a bucket of the containers that have buckets."""
    sharding: choices.StateSharding = "none"
    """What shards the optimizer's state."""
    optimizer_options: Mapping[str, Any] = field(default_factory=lambda: {"lr": LEARNING_RATE})
    """Options of the optimizer."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"the batch size is {self.batch_size}, but must be at least 1")
        self._check_device()
        if self.sharding != "none" and self.container in SHARDED_WEIGHTS:
            raise ValueError(f"{self.container} has sharded the optimizer's state already; choose sharding none")
        if self.container == "fsdp-linear" and self.mode != "eager":
            raise ValueError(
                "fsdp-linear gathers weights inside a block, which therefore cannot be compiled as a whole"
            )
        if self.container != "none" and self.mode == "compiled-model":
            raise ValueError(
                f"{self.container} averages gradients while the backward pass runs, but a model compiled as a whole "
                "hands them over at the end; choose compiled-blocks"
            )

    def _check_device(self) -> None:
        """Raise a ValueError if the device cannot run what is asked for."""
        if self.device.type == "cuda":
            if self.attention in ("sdpa-flash", "sdpa-cudnn") and self.precision == "float32":
                raise ValueError(
                    f"attention {self.attention} works in half precision only on a GPU; choose bfloat16, or "
                    "attention sdpa-efficient"
                )
            return
        if self.attention in ("sdpa-cudnn", "sdpa-efficient"):
            raise ValueError(
                f"attention {self.attention} needs an NVIDIA GPU; choose plain, flash-pytorch or sdpa-flash"
            )
        if triton_support.INTERPRETED:
            return
        for option, name, other in (
            ("attention", self.attention, "flash-pytorch"),
            ("optimizer", self.optimizer, "basics"),
            ("loss", self.loss, "plain"),
        ):
            if name in ("flash", "fused"):
                raise ValueError(f"{option} {name} is made of Triton kernels and needs a GPU; choose {other}")

    @property
    def tokens(self) -> int:
        """Tokens per step and rank."""
        return self.batch_size * self.model.context_length

    @property
    def sharded_dtype(self) -> torch.dtype | None:
        """The dtype to which sharded weights are cast before they are sent; None: no casts."""
        return torch.bfloat16 if self.precision == "bfloat16" else None


class TrainingStep:
    """A model with random weights, an optimizer and a random batch, ready to be run pass by pass.

    All ranks have the same weights, and each has a batch of its own. The phases of a step lie in the ranges `PHASES`,
    which Nsight Systems and torch.profiler show.

    Args:
        config: the parts of the step.
        rank: this rank; None for a step of one process without a process group.
        attention: replaces `config.attention`.

    Attributes:
        model: the model, which is not compiled as a whole.
        module: what is trained: the model, alone or together with its loss, in its container.
        optimizer: the optimizer.
        inputs, targets: [batch context] token ids of this rank.
    """

    def __init__(self, config: StepConfig, rank: Rank | None = None, attention: CausalAttention | None = None) -> None:
        self.config, self.device = config, rank.device if rank else config.device
        shape = config.model
        torch.manual_seed(0)
        attention = attention or choices.resolve(choices.ATTENTIONS, config.attention)
        self.model = BasicsTransformerLM.from_config(shape, causal_attention=attention, device=self.device)
        if config.checkpointing != "none":
            apply_checkpointing(self.model, config.checkpointing)
        self._loss: Callable[..., Tensor] = choices.resolve(choices.LOSSES, config.loss)
        if config.mode == "compiled-blocks":
            compile_blocks(*blocks_of(self.model))
        if config.mode != "eager" and config.loss == "plain":  # the fused loss consists of kernels already
            self._loss = torch.compile(self._loss)
        self.module: nn.Module = self.model
        if config.loss != "plain":
            self.module = ModelWithLoss(self.model, self._loss, compiled=config.mode == "compiled-model")
        if rank:
            self.module = choices.resolve(choices.CONTAINERS, config.container)(self.module, config, rank)
        self._logits: Callable[[Tensor], Tensor] = self.model
        if config.mode == "compiled-model":
            self._logits = torch.compile(self.model)
        self._forward: Callable[..., Tensor] = self._logits if self.module is self.model else self.module
        self._finish: Callable[[], None] = getattr(self.module, "finish_gradient_synchronization", lambda: None)
        self._local: dict[nn.Parameter, nn.Parameter] = {}
        parameters: Iterable[nn.Parameter] = self.module.parameters()
        if config.container == "fully-shard":
            # Its parameters are DTensors. Assignment 1's AdamW and our kernels need plain tensors: the local parts.
            self._local = {parameter: nn.Parameter(local_part(parameter)) for parameter in parameters}
            parameters = self._local.values()
        self.optimizer = _new_optimizer(config, list(parameters))
        if rank:
            torch.manual_seed(1 + rank.rank)
        ids = torch.randint(shape.vocab_size, (config.batch_size, shape.context_length + 1), device=self.device)
        self.inputs, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def inference(self) -> Float[Tensor, "batch context vocab"]:
        """Compute logits, without autograd."""
        with torch.no_grad(), self.autocast(), phase("forward", self.device):
            return self._logits(self.inputs)

    def forward(self) -> Float[Tensor, ""]:
        """Compute the loss."""
        with self.autocast():
            if self.config.loss != "plain":
                return self._forward(self.inputs, self.targets)
            with phase("forward", self.device):
                logits = self._forward(self.inputs)
            with phase("loss", self.device):
                return self._loss(logits, self.targets)

    def forward_backward(self) -> Float[Tensor, ""]:
        """Compute the loss and this rank's gradients, which replace those of the last call; return the loss."""
        self.module.zero_grad(set_to_none=True)
        loss = self.forward()
        with phase("backward", self.device):
            loss.backward()
        return loss.detach()

    def full(self, mark: Callable[[], object] = lambda: None) -> Float[Tensor, ""]:
        """Run one training step and return the loss of this rank before it.

        Args:
            mark: called after the backward pass, when the gradients are averaged, and at the end.
        """
        loss = self.forward_backward()
        mark()
        self._finish()
        mark()
        with phase("optimizer", self.device):
            for parameter, local in self._local.items():
                local.grad = None if parameter.grad is None else local_part(parameter.grad)
            self.optimizer.step()
            for local in self._local.values():
                local.grad = None
        mark()
        return loss

    def run(self, which: choices.Pass) -> None:
        """Run one pass and drop its result."""
        {
            "inference": self.inference,
            "forward": self.forward,
            "forward-backward": self.forward_backward,
            "full": self.full,
        }[which]()

    def autocast(self) -> AbstractContextManager:
        """Return the context of forward passes. Containers that shard weights cast them before they send them."""
        if self.config.precision == "float32" or self.config.container in SHARDED_WEIGHTS:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def loss_of_stream(self, x: Float[Tensor, "batch context d_model"]) -> Float[Tensor, ""]:
        """Compute what follows the blocks: final norm, head and loss."""
        x = self.model.ln_final(x)
        if isinstance(self.module, ModelWithLoss):
            return self.module.head(x, self.targets)
        return self._loss(self.model.lm_head(x), self.targets)


class ModelWithLoss(nn.Module):
    """A model from token ids to the mean loss, with head and loss as one module.

    Args:
        model: the model.
        loss: the mean loss, from hidden states, the head's weight and targets.
        compiled: compile the model up to its hidden states.
    """

    def __init__(self, model: BasicsTransformerLM, loss: Callable[..., Tensor], compiled: bool = False) -> None:
        super().__init__()
        self.model = model
        self.head = HeadWithLoss(model.lm_head, loss)
        self._hidden = torch.compile(model.hidden_states) if compiled else model.hidden_states

    def forward(self, ids: Int[Tensor, "batch context"], targets: Int[Tensor, "batch context"]) -> Float[Tensor, ""]:
        with phase("forward", ids.device):
            hidden = self._hidden(ids)
        with phase("loss", ids.device):
            return self.head(hidden, targets)


@contextmanager
def phase(name: str, device: torch.device) -> Iterator[None]:
    """Mark a named range for Nsight Systems (NVTX) and for torch.profiler."""
    nvtx = device.type == "cuda"
    with torch.profiler.record_function(name):
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()


def torch_loss(
    hidden: Float[Tensor, "*batch d_model"], weight: Float[Tensor, "vocab d_model"], targets: Int[Tensor, "*batch"]
) -> Float[Tensor, ""]:
    """Logits, then the loss in float32; when this is compiled, the float32 logits are never stored."""
    logits = hidden @ weight.T
    return torch_cross_entropy(logits.flatten(0, -2).float(), targets.flatten())


def _new_optimizer(config: StepConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    optimizer_class = choices.resolve(choices.OPTIMIZERS, config.optimizer)
    if config.sharding == "ours":
        return ShardedOptimizer(parameters, optimizer_class, **config.optimizer_options)
    if config.sharding == "torch":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(parameters, optimizer_class, **config.optimizer_options)
    return optimizer_class(parameters, **config.optimizer_options)
