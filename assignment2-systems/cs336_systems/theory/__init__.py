"""The costs of training on paper: functions of sizes and rates that measure nothing and print nothing.

units          bytes of numbers; MiB, MB and GB
collectives    bytes and seconds of ring collectives; the overhead of DDP with buckets
state          weights, gradients and optimizer state on each rank: ZeRO and FSDP
tpu_mesh       data, FSDP and tensor parallelism of a stack of linear layers on a mesh of devices
activations    what a forward pass keeps for its backward pass, of attention and of checkpointed blocks
large_model    operations and peak memory of the 2026 leaderboard's training step
"""
