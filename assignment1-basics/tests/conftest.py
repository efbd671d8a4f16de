"""Settings for all tests."""

import os

# The tensors here are so small that threads would only wait for each other. Subprocesses inherit the setting.
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for this machine may have a GPU that PyTorch cannot use
