"""Settings for all tests."""

import os

# The tensors here are tiny: threads would only wait for each other. Subprocesses inherit it.
os.environ["OMP_NUM_THREADS"] = "1"

from pathlib import Path

import jaxtyping
import pytest
import torch

torch.set_num_threads(1)

# Without a GPU the Triton kernels run in Triton's interpreter. Triton looks at this when a kernel is decorated.
if not torch.cuda.is_available():
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for this machine may have a GPU that PyTorch cannot use
    os.environ["TRITON_INTERPRET"] = "1"


# Annotated shapes and types are checked, as in Assignment 1, where an int will do for a float (PEP 484). Not in the
# module of the Triton kernels: Triton reads their source and could not see through a wrapper.
PACKAGE = Path(__file__).parent.parent / "cs336_systems"
CHECKED = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if path.stem not in ("__init__", "__main__", "triton_kernels")
]
# The bytecode of checked modules is cached under a name that depends on this text. If it were that of Assignment 1's
# tests, a module of theirs that a checked module imports would be taken from their cache, with its checks.
TYPECHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True, is_debug=False))"
jaxtyping.install_import_hook(CHECKED, TYPECHECKER)


# Triton is made for Linux only. Elsewhere the tests of its kernels, which import it, are left out.
try:
    import triton  # noqa: F401
except ModuleNotFoundError:
    names = ("flash_attention/test_triton_ops", "flash_attention/test_gpu", "test_adamw", "test_linear_cross_entropy")
    collect_ignore = [f"kernels/{name}.py" for name in (*names, "test_rms_norm")]
    collect_ignore += ["instruments/test_leaderboard_2026.py"]


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def poison_new_tensors(monkeypatch):
    """Call it, and from then on `torch.empty` and its relatives return NaN: what is not written shows."""

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return make_poisoned

    def poison():
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))

    return poison


@pytest.fixture(scope="session")
def workers():
    """Processes that wait for work: `workers.run(function, world_size, *args)`."""
    from tests.workers import Workers

    workers = Workers()
    yield workers
    workers.stop()
