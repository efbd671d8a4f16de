"""A benchmark per kernel: `python -m cs336_systems.instruments.kernels.<name>`; --help explains the options.

adamw linear_cross_entropy rms_norm     our kernel, Assignment 1's and PyTorch's
flash_tiles flash_float32 host_time     FlashAttention: the search for tiles, float32, and the time of the host
sanitizer                               all kernels under NVIDIA's compute-sanitizer
"""
