"""The options of each program. Nothing here imports PyTorch, transformers or sympy, so that `--help` is quick."""
