"""Where the Triton kernels run: on a GPU, or in Triton's interpreter, which is slow, on a CPU."""

from torch import Tensor

try:
    import triton
except ModuleNotFoundError:  # Triton exists for Linux only
    INTERPRETED = False
else:
    #: Whether TRITON_INTERPRET=1 runs the kernels in Python, on CPU tensors. Triton looks at it when a kernel is
    #: defined, so that it has to be set before the import.
    INTERPRETED = triton.knobs.runtime.interpret


def check_device(tensor: Tensor, subject: str, instead: str) -> None:
    """Refuse a tensor on a device where the kernels cannot run.

    Args:
        tensor: an input of a kernel.
        subject: the beginning of the error: "the tensors are", say.
        instead: what to do in place of running the kernel.

    Raises:
        ValueError: it is on such a device.
    """
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError(
            f"{subject} on {tensor.device}, where Triton cannot run: {instead}, or set TRITON_INTERPRET=1 "
            "before the import to debug"
        )
