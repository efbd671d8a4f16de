"""Everything that a command-line option can name: one table for each kind of choice.

A table maps a name to "module:attribute", which `resolve` imports when it is needed, so that `--help` does not have to
import torch. To add an optimizer, an attention or a loss, add one line to its table.
"""

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from cs336_basics.model import ModelConfig

#: Sizes of models: vocabulary, d_model, d_ff, blocks, heads (Radford et al. 2019, table 2, and one of 2.7 billion
#: parameters). tiny is ours: with it commands can be tried on a CPU.
SIZES: dict[str, tuple[int, int, int, int, int]] = {
    "tiny": (512, 64, 192, 4, 4),
    "small": (10_000, 768, 3072, 12, 12),
    "medium": (10_000, 1024, 4096, 24, 16),
    "large": (10_000, 1280, 5120, 36, 20),
    "xl": (10_000, 1600, 6400, 48, 25),
    "2.7B": (10_000, 2560, 10_240, 32, 32),
}

#: Causal attention, [... heads seq d_head] queries, keys and values -> the same shape. plain: Assignment 1's explicit
#: scores and softmax. flash: our Triton kernels. flash-pytorch: their readable reference. sdpa-*: PyTorch's fused
#: kernels (FlashAttention-2 and cuDNN for 16-bit numbers; the memory-efficient one also for float32). flex:
#: FlexAttention, compiled.
ATTENTIONS = {
    "plain": "cs336_systems.training.torch_attention:plain",
    "flash": "cs336_systems.kernels.flash_attention:flash_attention",
    "flash-pytorch": "cs336_systems.training.torch_attention:flash_pytorch",
    "sdpa-flash": "cs336_systems.training.torch_attention:sdpa_flash",
    "sdpa-cudnn": "cs336_systems.training.torch_attention:sdpa_cudnn",
    "sdpa-efficient": "cs336_systems.training.torch_attention:sdpa_efficient",
    "flex": "cs336_systems.training.torch_attention:flex",
}

#: Optimizer classes. basics: Assignment 1's AdamW. fused: the same in one kernel. torch: PyTorch's AdamW.
OPTIMIZERS = {
    "basics": "cs336_basics.optimizer:AdamW",
    "fused": "cs336_systems.kernels.adamw:FusedAdamW",
    "torch": "torch.optim:AdamW",
}

#: The mean loss, from logits and targets (plain) or, where head and loss are one operator, from hidden states, the
#: head's weight and targets (all others). plain: logits, then Assignment 1's cross-entropy. fused: both in our kernel.
#: torch: both by PyTorch.
LOSSES = {
    "plain": "cs336_basics.nn_utils:cross_entropy",
    "fused": "cs336_systems.kernels.linear_cross_entropy:linear_cross_entropy",
    "torch": "cs336_systems.training.step:torch_loss",
}

#: How the ranks of a measured training step work together: (model, StepConfig, Rank) -> the module to train.
#: none: every rank trains a model of its own. fsdp: a block of the model is a unit; fsdp-linear: every Linear and
#: Embedding is one. torch-ddp, fully-shard: PyTorch's own.
CONTAINERS = {
    "none": "cs336_systems.training.containers:none",
    "naive": "cs336_systems.training.containers:naive",
    "flat": "cs336_systems.training.containers:flat",
    "overlapped": "cs336_systems.training.containers:overlapped",
    "bucketed": "cs336_systems.training.containers:bucketed",
    "torch-ddp": "cs336_systems.training.containers:torch_ddp",
    "fsdp": "cs336_systems.training.containers:fsdp",
    "fsdp-linear": "cs336_systems.training.containers:fsdp_linear",
    "fully-shard": "cs336_systems.training.containers:fully_shard",
}

#: Strategies of the training command: (Rank, StrategyOptions) -> a `cs336_basics.strategy.Strategy`.
#: ddp: one all-reduce per gradient, during the backward pass. ddp-bucketed: one all-reduce per bucket.
#: ddp+sharded-optimizer: ddp-bucketed, and each rank updates a share of the parameters. fsdp: our FSDP. torch-fsdp2:
#: PyTorch's.
STRATEGIES = {
    "ddp": "cs336_systems.training.strategies:DDP",
    "ddp-bucketed": "cs336_systems.training.strategies:BucketedDDP",
    "ddp+sharded-optimizer": "cs336_systems.training.strategies:ShardedOptimizerDDP",
    "fsdp": "cs336_systems.training.strategies:FullySharded",
    "torch-fsdp2": "cs336_systems.training.strategies:TorchFSDP2",
}

if TYPE_CHECKING:
    SizeName = str
    AttentionName = str
    OptimizerName = str
    LossName = str
    ContainerName = str
    StrategyName = str
else:  # the names of each table, as the types of options
    SizeName = Literal[tuple(SIZES)]
    AttentionName = Literal[tuple(ATTENTIONS)]
    OptimizerName = Literal[tuple(OPTIMIZERS)]
    LossName = Literal[tuple(LOSSES)]
    ContainerName = Literal[tuple(CONTAINERS)]
    StrategyName = Literal[tuple(STRATEGIES)]

#: bfloat16: forward and backward pass under autocast, or with weights cast before they are sent where they are
#: sharded; parameters stay float32.
Precision = Literal["float32", "bfloat16"]
#: By torch.compile. compiled-model: the whole model, and the loss. compiled-blocks: each block, and the loss, which
#: takes seconds where a whole model of many blocks takes minutes.
Mode = Literal["eager", "compiled-model", "compiled-blocks"]
#: inference: logits, without autograd. forward: logits and loss, with autograd, so that forward-backward minus forward
#: is the backward pass. full: zero_grad, forward, backward and the optimizer's step.
Pass = Literal["inference", "forward", "forward-backward", "full"]
#: What shards the optimizer's state: nothing, `ShardedOptimizer`, or PyTorch's ZeroRedundancyOptimizer.
StateSharding = Literal["none", "ours", "torch"]
#: Bucket size in MiB; auto: ours shrink, PyTorch's hold 25 MiB, its default.
BucketSize = float | Literal["auto"]


def resolve(table: dict[str, str], name: str) -> Any:
    """Import what a table has under this name."""
    return resolve_name(table[name])


def model_config(size: SizeName, context: int = 1024) -> "ModelConfig":
    """Return the shape of the model of that size, for sequences of `context` tokens."""
    from cs336_basics.model import ModelConfig

    vocab_size, d_model, d_ff, layers, heads = SIZES[size]
    return ModelConfig(vocab_size, context, d_model=d_model, d_ff=d_ff, num_layers=layers, num_heads=heads)
