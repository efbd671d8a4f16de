"""The experiments of Assignment 1's written problems: one module per problem, and `sweep`, which trains models.

Each experiment writes a file to `results/`, from which `writeup/` takes its numbers and figures. `leaderboard/` holds
the ladder and what only it needs; `benchmarks/` measures speed and compares the package with other libraries.
"""
