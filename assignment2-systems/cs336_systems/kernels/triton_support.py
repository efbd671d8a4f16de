"""Where the Triton kernels can run: on a GPU, or slowly, in Triton's interpreter, on a CPU."""

from torch import Tensor

try:
    import triton
except ModuleNotFoundError:  # Triton exists for Linux only
    INTERPRETED = False
else:
    #: Whether TRITON_INTERPRET=1 runs the kernels in Python, on CPU tensors. Triton reads it when a kernel is defined,
    #: so it has to be set before the import.
    INTERPRETED = triton.knobs.runtime.interpret


def check_device(tensor: Tensor, subject: str, instead: str) -> None:
    """Refuse a tensor on a device where the kernels cannot run.

    Args:
        tensor: an input of a kernel.
        subject: the beginning of the error, for example "the tensors are".
        instead: the remedy, besides the interpreter.

    Raises:
        ValueError: the tensor is on such a device.
    """
    if not (tensor.is_cuda or INTERPRETED):
        raise ValueError(
            f"{subject} on {tensor.device}, where Triton cannot run: {instead}, or set TRITON_INTERPRET=1 "
            "before the import to debug"
        )
