"""Token files and batches.

A token file is a `.npy` array of uint16, or of uint32 if the vocabulary has more than 65 536 tokens. numpy maps it into
memory, so that training reads only the sequences it draws. Files of uint16 without a header (`.bin`), which many course
repositories write, can be read too.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int
from torch import Tensor

from cs336_basics.pretokenization import CHUNK_CHARS, DecodeErrors, read_text, safe_chunks
from cs336_basics.tokenizer import Tokenizer


def get_batch(
    dataset: npt.NDArray[np.integer],
    batch_size: int,
    context_length: int,
    device: str | torch.device = "cpu",
    rng: np.random.Generator | None = None,
) -> tuple[Int[Tensor, "batch_size context_length"], Int[Tensor, "batch_size context_length"]]:
    """Draw random sequences from a token array, and the same sequences shifted by one token, which are the targets.

    Args:
        dataset: 1-D token ids, in memory or mapped from a file.
        batch_size: number of sequences. Each starts at 0 ... len(dataset) - context_length - 1, all equally likely.
        context_length: tokens per sequence.
        device: where to put the tensors.
        rng: source of randomness. Default: numpy's global one.

    Raises:
        ValueError: `dataset` is shorter than context_length + 1.
        RuntimeError: there is no such device.
    """
    check_length(dataset, context_length)
    high = len(dataset) - context_length
    starts = rng.integers(high, size=batch_size) if rng else np.random.randint(high, size=batch_size)
    return sequences_at(dataset, starts, context_length, device)


def check_length(tokens: npt.NDArray[np.integer], context_length: int, name: str = "the data set") -> None:
    """Raise a ValueError if `tokens`, called `name` in the message, are too few for one sequence and its targets."""
    if len(tokens) <= context_length:
        raise ValueError(
            f"{name} has {len(tokens)} tokens, but context length {context_length} needs at least {context_length + 1}"
        )


def sequences_at(
    dataset: npt.NDArray[np.integer], starts: npt.NDArray[np.integer], context_length: int, device: str | torch.device
) -> tuple[Int[Tensor, "batch context_length"], Int[Tensor, "batch context_length"]]:
    """Return the sequences that begin at `starts`, and the same sequences shifted by one token."""
    tokens = torch.from_numpy(dataset[starts[:, None] + np.arange(context_length + 1)].astype(np.int64))
    try:
        if torch.device(device).type == "cuda":  # pinned memory, so that the copy does not block the host
            tokens = tokens.pin_memory()
        tokens = tokens.to(device, non_blocking=tokens.is_pinned())
    except (RuntimeError, AssertionError) as error:
        kind = "CUDA error: " if str(device).startswith("cuda") else ""
        reason = str(error).splitlines()[0]
        raise RuntimeError(f"{kind}cannot put a batch on device {str(device)!r}: {reason}") from error
    return tokens[:, :-1], tokens[:, 1:]


def batch_starts(num_tokens: int, context_length: int, batch_size: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """Return where the sequences of a step begin: uniformly distributed, and a function of seed and step alone."""
    return np.random.default_rng((seed, step)).integers(num_tokens - context_length, size=batch_size)


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the smaller of the two types of a token file that can hold every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_tokens(path: str | os.PathLike[str], blocks: Iterable[npt.NDArray[np.integer]], vocab_size: int) -> int:
    """Stream blocks of ids into a `.npy` file, which has a temporary name until it is complete.

    Returns:
        The number of tokens.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    dtype = np.dtype(token_dtype(vocab_size))
    count = 0
    try:
        with open(unfinished, "wb") as file:
            _write_header(file, dtype, 0)
            for block in blocks:
                file.write(block.astype(dtype).tobytes())
                count += len(block)
            file.seek(0)
            _write_header(file, dtype, count)  # numpy pads the header, so a longer count does not need more room
        unfinished.replace(path)
    except OSError as error:
        raise OSError(f"cannot write {path} ({error.strerror}); free some space or choose another folder") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return count


def tokenize_file(
    tokenizer: Tokenizer,
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    num_workers: int | None = None,
    errors: DecodeErrors = "strict",
    progress: Callable[[int], None] | None = None,
) -> int:
    """Tokenize a UTF-8 file into a token file in constant memory.

    Args:
        tokenizer: the tokenizer.
        source: the text.
        destination: the `.npy` file to write.
        num_workers: processes that tokenize. Default: one per core.
        errors: "strict", or "replace" to read bytes that are not UTF-8 as U+FFFD.
        progress: called with the number of bytes read so far.

    Returns:
        The number of tokens.
    """
    chunks = safe_chunks(read_text(source, errors=errors, progress=progress), tokenizer.special_tokens, CHUNK_CHARS)
    if os.path.getsize(source) <= CHUNK_CHARS:
        num_workers = 1
    blocks = map(np.asarray, tokenizer.encode_parallel(chunks, num_workers))
    return write_tokens(destination, blocks, max(tokenizer.vocab) + 1)


def _write_header(file: BinaryIO, dtype: np.dtype, count: int) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)


def open_tokens(path: str | os.PathLike[str], vocab_size: int) -> npt.NDArray[np.integer]:
    """Map a token file into memory and check that every id lies below `vocab_size`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, is not a 1-D array of ids, or has an id outside the vocabulary.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no token file {path}; make it with `cs336-basics tokenize`")
    try:
        tokens = np.load(path, mmap_mode="r") if path.suffix == ".npy" else np.memmap(path, dtype=np.uint16, mode="r")
        if not isinstance(tokens, np.ndarray):
            raise ValueError("it is an archive of arrays")
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable token file ({error}); make it again with `cs336-basics tokenize`"
        ) from None
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(
            f"{path} holds an array of shape {tokens.shape} and type {tokens.dtype}, not a row of token ids"
        )
    step = 1 << 24  # in pieces, because the file may be larger than memory
    for start in range(0, len(tokens), step):
        piece = tokens[start : start + step]
        for token in (int(piece.min()), int(piece.max())):
            if not 0 <= token < vocab_size:
                raise ValueError(
                    f"{path} holds token id {token}, but the model's vocabulary has {vocab_size}; "
                    "set vocab_size to that of the tokenizer that made the file"
                )
    return tokens
