"""Instruments that measure: each command prints a table and writes a file of results.

options/           what each command can be told, read without importing torch
measure            timing, failures as rows, progress, tables, files of results
ranks              the same on several ranks at once
step profile memory checkpointing mixed_precision     one training step on one device
attention flash leaderboard_2025                      attention alone
all_reduce ddp overlap sharding fsdp scaling leaderboard_2026    several ranks
accounting bucket_fit                                 on paper
loss_curves launch_cost batch_split                   scripts: python -m cs336_systems.instruments.<name>
kernels/           a script per kernel: python -m cs336_systems.instruments.kernels.<name>
"""
