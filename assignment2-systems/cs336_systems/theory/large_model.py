"""Operations and peak memory of the 2026 leaderboard's training step, for both of its contestants."""

from typing import Literal

from cs336_basics.accounting import parameter_counts
from cs336_basics.model import ModelConfig
from cs336_systems.theory.activations import attention_flops
from cs336_systems.theory.units import FLOAT32


def step_flops(config: ModelConfig, sequences: int) -> float:
    """Operations of a training step on this many sequences, without what checkpointing computes again.

    Only matmuls count, and not the masked half of attention. A token meets each weight in 2 operations. The backward
    pass takes twice as many operations as the forward pass.
    """
    counts = parameter_counts(config)
    weights = counts["attention"] + counts["feed-forward"] + counts["language-model head"]
    heads, context = config.num_heads, config.context_length
    attention = config.num_layers * attention_flops(heads, context, config.d_model // heads)
    return 3 * sequences * (2 * context * weights + attention)


def step_bytes(
    config: ModelConfig, contestant: Literal["ours", "torch"], batch_size: int, world_size: int, number: int = 2
) -> dict[str, float]:
    """Bytes that tensors take on each GPU at four moments; the largest of them is the peak.

    Each of N ranks keeps 1/N of P parameters, in float32. The gradients are dropped before each step, so that 4 P/N
    (the master weights) and 8 P/N (AdamW's moments) always exist, and the gradients, 4 P/N, appear unit by unit
    while the backward pass goes through the blocks. Of the activations of the L blocks only the inputs are kept, s
    bytes each, and are freed one by one. So memory is a straight line between

        first block    12 P/N + L s + A        where the backward pass begins, with the last block,
        last block     16 P/N + s + A          where it ends,

    and A is what exists for a single block: its activations, computed again, and their gradients; the gathered weights
    of two blocks; and the gradients of two blocks on their way. A third peak is that of the head:

        head           12 P/N + L s + the head's weight, gradient and logits

    Our contestant gathers the head alone and never holds all logits, but it holds a float32 gradient of the head's
    weight. PyTorch's contestant keeps the root gathered throughout: the embedding and the head.

    Args:
        config: the shape of the model; sequences are as long as its context.
        contestant: whose memory.
        batch_size: sequences per rank.
        world_size: N.
        number: bytes of a number that is computed with or sent.

    Returns:
        Bytes at the three peaks and at "start", when only the master weights and RoPE's tables exist.
    """
    counts = parameter_counts(config)
    d, layers, tokens = config.d_model, config.num_layers, batch_size * config.context_length
    block = (counts["attention"] + counts["feed-forward"]) / layers
    head = counts["language-model head"]
    state = FLOAT32 * sum(count / (1 if name == "norms" else world_size) for name, count in counts.items())
    rope = FLOAT32 * config.context_length * d // config.num_heads
    always = 3 * state + rope  # from the first optimizer step on
    stream, inner = number * tokens * d, number * tokens * config.ffn_width

    # Compiled code keeps queries, keys, values, attention's output and the sum after it; W1 x and W3 x. Then, backward:
    # gradients of the block's output and input, of the product inside the feed-forward network, of W1 x and W3 x.
    one_block = (5 + 2) * stream + (2 + 3) * inner + (2 + 2) * number * block
    gradients = FLOAT32 * layers * block / world_size
    if contestant == "ours":
        root = 0.0
        # The weight; in float32 its gradient and that times the loss's gradient; and the result in bfloat16.
        loss = number * head + 2 * FLOAT32 * head + number * head
        head_gradient = FLOAT32 * head / world_size
    else:
        root = 2 * number * head
        # Logits, which their gradient replaces, and the gradient of the weight, which waits for the embedding's.
        loss = root + number * tokens * config.vocab_size + number * head
        head_gradient = number * head
    return {
        "start": state + rope,
        "head": always + (layers + 3) * stream + loss + number * block,
        "first block": always + layers * stream + root + head_gradient + one_block,
        "last block": always + gradients + stream + root + head_gradient + one_block,
    }
