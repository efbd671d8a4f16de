"""Settings for all tests."""

import os
import signal

# The tensors here are tiny: threads would only wait for each other. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
# Nothing is fetched from a hub, and vLLM runs in this process; both are read when the libraries are imported.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for this machine may have a GPU that PyTorch cannot use
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # compiling for a CPU takes longer than the tests
torch.set_num_threads(1)
settings.register_profile("tests", deadline=None)  # so that a busy machine fails no test
settings.load_profile("tests")


@pytest.fixture
def interruptible():
    """SIGINT interrupts, here and in processes started from here, even where it is ignored, as in a background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
