"""One training step of a model of the assignment, cut into its passes: what the measuring commands share."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from cs336_basics.model import BasicsTransformerLM, CausalAttention, ModelConfig
from cs336_basics.nn_utils import cross_entropy
from cs336_basics.optimizer import AdamW
from cs336_systems import triton_support
from cs336_systems.attention import AttentionName, causal_attention
from cs336_systems.measure import Measurement, Row, check_options, gpu_or_cpu, grid
from cs336_systems.models import SizeName, compile_blocks, model_config

#: inference: logits, without autograd. forward: logits and loss, with it, so that forward-backward less forward
#: is the backward pass. full: zero_grad, forward, backward and the optimizer's step.
Pass = Literal["inference", "forward", "forward-backward", "full"]
#: basics: Assignment 1's AdamW. fused: `cs336_systems.adamw.FusedAdamW`.
OptimizerName = Literal["basics", "fused"]
#: plain: logits, then Assignment 1's cross-entropy. fused: both at once, `cs336_systems.linear_cross_entropy`.
LossName = Literal["plain", "fused"]
#: bf16: forward and backward pass under autocast; parameters stay float32.
Precision = Literal["fp32", "bf16"]
#: compiled: the model (in several processes each of its blocks) and the loss, not the optimizer, by torch.compile.
Mode = Literal["eager", "compiled"]
#: compiled-blocks: each block and the loss, which takes seconds where the whole of many blocks takes minutes.
StepMode = Literal["eager", "compiled", "compiled-blocks"]

#: The ranges that a step is cut into, in their order.
PHASES = ("forward", "loss", "backward", "optimizer")


@dataclass(frozen=True)
class StepConfig:
    """What a training step is made of."""

    model: ModelConfig
    """Shape of the model; sequences are as long as its context."""
    device: torch.device
    """Where it runs."""
    batch_size: int = 4
    """Sequences per step."""
    attention: AttentionName = "plain"
    """Which attention."""
    precision: Precision = "fp32"
    """What forward and backward pass compute in."""
    mode: StepMode = "eager"
    """Whether torch.compile is used, and for what."""
    optimizer: OptimizerName = "basics"
    """Which AdamW."""
    loss: LossName = "plain"
    """Which cross-entropy."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"the batch size is {self.batch_size}, but must be at least 1")
        if self.device.type == "cuda":
            if self.attention in ("sdpa-flash", "sdpa-cudnn") and self.precision == "fp32":
                raise ValueError(
                    f"attention {self.attention} knows half precision alone on a GPU; choose bf16, or sdpa-efficient"
                )
        elif self.attention in ("sdpa-cudnn", "sdpa-efficient"):
            raise ValueError(
                f"attention {self.attention} needs an NVIDIA GPU; choose plain, flash-pytorch or sdpa-flash"
            )
        elif not triton_support.INTERPRETED:
            for option, name, other in (
                ("attention", self.attention, "flash-pytorch"),
                ("optimizer", self.optimizer, "basics"),
                ("loss", self.loss, "plain"),
            ):
                if name in ("flash", "fused"):
                    raise ValueError(f"{option} {name} is made of Triton kernels and needs a GPU; choose {other}")

    @property
    def tokens(self) -> int:
        """Tokens per step."""
        return self.batch_size * self.model.context_length


@dataclass(frozen=True)
class StepGrid(Measurement):
    """The options of commands that run training steps of several models."""

    sizes: tuple[SizeName, ...] = gpu_or_cpu(("small",), ("tiny",))
    """Model sizes; tiny is for a try without a GPU."""
    contexts: tuple[int, ...] = gpu_or_cpu((128, 256, 512, 1024), (64, 128))
    """Context lengths in tokens."""
    attentions: tuple[AttentionName, ...] = ("plain",)
    """plain: Assignment 1's. flash: ours. flash-pytorch: its reference. sdpa-*, flex: PyTorch's."""
    precisions: tuple[Precision, ...] = ("fp32",)
    """bf16 runs forward and backward pass under autocast; parameters stay float32."""
    losses: tuple[LossName, ...] = ("plain",)
    """Logits and cross-entropy, or both fused."""
    batch_size: int = 4
    """Sequences per step."""

    def cases(self, device: torch.device, **axes: Sequence[object]) -> list[Row]:
        """The grid of models and the given axes.

        Raises:
            ValueError: a case cannot be on this device.
        """
        check_options(self, "contexts", "batch_size")
        cases = grid(
            size=self.sizes, context=self.contexts, attention=self.attentions, precision=self.precisions,
            loss=self.losses, **axes,
        )  # fmt: skip
        for case in cases:
            self.step_config(case, device)
        return cases

    def step_config(self, case: Row, device: torch.device) -> StepConfig:
        """The training step of a case."""
        return StepConfig(
            model_config(case["size"], case["context"]), device, self.batch_size, case["attention"],
            case["precision"], case.get("mode", "eager"), case.get("optimizer", "basics"), case["loss"],
        )  # fmt: skip


class TrainingStep:
    """A model with random weights, an optimizer and a random batch, ready to be run pass by pass.

    The phases of a step lie in the ranges `PHASES`, which Nsight Systems and torch.profiler show.

    Args:
        config: what it is made of.
        attention: takes the place of `config.attention`.

    Attributes:
        model: the model, not compiled.
        optimizer: its optimizer; a learning rate of 1e-4 keeps many steps on one batch finite.
        inputs, targets: [batch context] token ids.
    """

    def __init__(self, config: StepConfig, attention: CausalAttention | None = None) -> None:
        torch.manual_seed(0)
        device, shape = config.device, config.model
        self.config = config
        self.model = BasicsTransformerLM.from_config(
            shape, causal_attention=attention or causal_attention(config.attention), device=device
        )
        self.optimizer = _optimizer(config.optimizer, self.model)
        ids = torch.randint(shape.vocab_size, (config.batch_size, shape.context_length + 1), device=device)
        self.inputs, self.targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

        self._logits: Callable[[Tensor], Tensor] = self.model
        self._forward: Callable[[Tensor], Tensor] = self.model if config.loss == "plain" else self.model.hidden
        self._loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy if config.loss == "plain" else self._fused_loss
        if config.mode == "compiled":
            self._logits, self._forward = torch.compile(self._logits), torch.compile(self._forward)
        elif config.mode == "compiled-blocks":
            compile_blocks(self.model)
        if config.mode != "eager" and config.loss == "plain":  # the fused loss is kernels already
            self._loss = torch.compile(self._loss)

    def inference(self) -> Float[Tensor, "batch context vocab"]:
        """Logits, without autograd."""
        with torch.no_grad(), self.autocast(), phase("forward", self.config.device):
            return self._logits(self.inputs)

    def forward(self) -> Float[Tensor, ""]:
        """The loss."""
        with self.autocast():
            with phase("forward", self.config.device):
                output = self._forward(self.inputs)
            with phase("loss", self.config.device):
                return self._loss(output, self.targets)

    def forward_backward(self) -> None:
        """Loss and gradients, which replace those of the last call."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.forward()
        with phase("backward", self.config.device):
            loss.backward()

    def full(self) -> None:
        """Loss, gradients, and the optimizer's step."""
        self.forward_backward()
        with phase("optimizer", self.config.device):
            self.optimizer.step()

    def run(self, which: Pass) -> None:
        """Run one pass and drop its result."""
        {
            "inference": self.inference,
            "forward": self.forward,
            "forward-backward": self.forward_backward,
            "full": self.full,
        }[which]()

    def autocast(self) -> AbstractContextManager:
        """What forward passes run under."""
        return (
            torch.autocast(self.config.device.type, torch.bfloat16)
            if self.config.precision == "bf16"
            else nullcontext()
        )

    def loss_of_stream(self, x: Float[Tensor, "batch context d_model"]) -> Float[Tensor, ""]:
        """What follows the blocks: final norm, head and loss."""
        x = self.model.ln_final(x)
        return self._loss(x if self.config.loss == "fused" else self.model.lm_head(x), self.targets)

    def _fused_loss(
        self, hidden: Float[Tensor, "batch context d_model"], targets: Int[Tensor, "batch context"]
    ) -> Float[Tensor, ""]:
        from cs336_systems.linear_cross_entropy import linear_cross_entropy

        return linear_cross_entropy(hidden, self.model.lm_head.weight, targets)


@contextmanager
def phase(name: str, device: torch.device) -> Iterator[None]:
    """A range with a name, for Nsight Systems (NVTX) and for torch.profiler."""
    nvtx = device.type == "cuda"
    with torch.profiler.record_function(name):
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()


def _optimizer(name: OptimizerName, model: torch.nn.Module) -> torch.optim.Optimizer:
    if name == "basics":
        return AdamW(model.parameters(), lr=1e-4)
    from cs336_systems.adamw import FusedAdamW

    return FusedAdamW(model.parameters(), lr=1e-4)
