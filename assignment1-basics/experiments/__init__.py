"""The experiments of Assignment 1's written problems: one module per problem, and `sweep`, which trains models.

Each experiment writes a file to `results/`, from which `writeup/` takes its numbers and figures. `benchmarks/` compares
the package with other libraries.
"""
