"""Pre-tokenize text: cut it into the words, numbers and symbols that BPE never merges across.

A text is cut twice: first at *special tokens* such as ``<|endoftext|>``, which have ids of their own and contribute
nothing to BPE; then each piece between them by GPT-2's regular expression:

>>> find_pretokens("it's 10  apples!")
['it', "'s", ' 10', ' ', ' apples', '!']

Both cuts look only a few characters ahead, so a long text can be cut into *safe chunks* (`safe_chunks`) that are
tokenized independently, in parallel or one at a time in constant memory, with the same result as the whole. Training,
tokenizing a file and `Tokenizer.encode_iterable` are all built on this.
"""

import codecs
import os
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, Literal, TypeVar

import regex

from cs336_basics.machine import available_cpus

Item = TypeVar("Item")
Result = TypeVar("Result")
DecodeErrors = Literal["strict", "replace"]

#: Radford et al. (2019), section 2.2, as published in the GPT-2 code.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
_UNICODE = regex.compile(GPT2_PATTERN)
# The same pattern for ASCII text and the standard library's `re`, which has no \p{L} but is twice as fast.
_ASCII = re.compile(r"""'(?:[sdmt]|ll|ve|re)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+""", re.ASCII)
_LAST_WORD_END = regex.compile(r"(?r)(?<=\S)\s")  # (?r): searches backwards from the end

CHUNK_CHARS = 1 << 18


def find_pretokens(text: str) -> list[str]:
    """Cut `text`, which contains no special tokens, into GPT-2's pre-tokens; their concatenation is `text`."""
    return (_ASCII if text.isascii() else _UNICODE).findall(text)


def special_token_pattern(special_tokens: Iterable[str]) -> re.Pattern[str] | None:
    """Return a pattern that finds special tokens, the longest if several match; None without special tokens.

    It has one group, so `pattern.split(text)` alternates: text, special token, text, ..., text.
    """
    longest_first = sorted(set(special_tokens), key=len, reverse=True)
    if "" in longest_first:
        raise ValueError("a special token is the empty string; give each special token at least one character")
    return re.compile(f"({'|'.join(map(re.escape, longest_first))})") if longest_first else None


def count_pretokens(text: str, special_tokens: Sequence[str] = ()) -> Counter[str]:
    """Count how often each pre-token occurs in `text`; special tokens are cut out and not counted."""
    pattern = special_token_pattern(special_tokens)
    ordinary = pattern.split(text)[::2] if pattern else [text]
    counts: Counter[str] = Counter()
    for piece in ordinary:
        counts.update(find_pretokens(piece))
    return counts


def count_pretokens_in_file(
    path: str | os.PathLike[str],
    special_tokens: Sequence[str] = (),
    *,
    num_workers: int | None = None,
    chunk_chars: int = CHUNK_CHARS,
    errors: DecodeErrors = "strict",
    progress: Callable[[int], None] | None = None,
) -> Counter[str]:
    """Count the pre-tokens of a UTF-8 file, which is streamed and counted by several processes.

    The counts do not depend on `num_workers` (default: one per core) or `chunk_chars`, the characters that a process
    counts at a time. Memory holds a few chunks and the distinct pre-tokens, never the whole file.

    Raises:
        ValueError: the file is not UTF-8 and `errors` is "strict"; the message names the byte offset.
    """
    chunks = safe_chunks(read_text(path, errors=errors, progress=progress), special_tokens, chunk_chars)
    if os.path.getsize(path) <= chunk_chars:  # one chunk, for which starting processes would take longer than counting
        num_workers = 1
    counts: Counter[str] = Counter()
    for chunk_counts in parallel_map(
        partial(count_pretokens, special_tokens=tuple(special_tokens)), chunks, num_workers
    ):
        counts.update(chunk_counts)
    return counts


def read_text(
    path: str | os.PathLike[str],
    *,
    errors: DecodeErrors = "strict",
    block_bytes: int = 1 << 16,
    progress: Callable[[int], None] | None = None,
) -> Iterator[str]:
    r"""Yield the text of a UTF-8 file in blocks, with every character as it is ("\r\n" is not turned into "\n").

    `progress` is called with the number of bytes read so far. Bytes that are not UTF-8 raise a ValueError that names
    their offset, or become U+FFFD if `errors` is "replace".
    """
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    offset = 0  # the first byte that the decoder has not yet turned into text
    with open(path, "rb") as file:
        while True:
            block = file.read(block_bytes)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at offset {offset + error.start}; "
                    'convert the file, or read such bytes as U+FFFD with errors="replace" (--errors replace)'
                ) from None
            offset = file.tell() - len(decoder.getstate()[0])
            if text:
                yield text
            if not block:
                return
            if progress:
                progress(file.tell())


def safe_chunks(
    pieces: Iterable[str], special_tokens: Sequence[str] = (), chunk_chars: int = CHUNK_CHARS
) -> Iterator[str]:
    """Regroup a stream of strings into chunks of about `chunk_chars` or more that can be tokenized one by one.

    No pre-token or special token extends from one chunk into the next, however the stream was cut. Memory holds one
    chunk, unless a single pre-token is longer than that.

    >>> list(safe_chunks(["It's <|end", "oftext|> o", "k"], ["<|endoftext|>"], chunk_chars=1))
    ["It's", ' <|endoftext|>', ' ok']
    """
    pattern = special_token_pattern(special_tokens)
    pending: list[str] = []
    pending_chars, wanted = 0, chunk_chars
    for piece in pieces:
        pending.append(piece)
        pending_chars += len(piece)
        if pending_chars >= wanted:
            text = "".join(pending)
            cut = _last_safe_cut(text, special_tokens, pattern)
            if cut:
                yield text[:cut]
            pending, pending_chars = [text[cut:]], len(text) - cut
            # Doubling keeps the work linear when a pre-token is so long that no cut is found in it.
            wanted = max(chunk_chars, 2 * pending_chars)
    if pending_chars:
        yield "".join(pending)


def _last_safe_cut(text: str, special_tokens: Sequence[str], pattern: re.Pattern[str] | None) -> int:
    """Return the last position in `text` that is a boundary between pre-tokens whatever text follows."""
    settled = 0  # the end of the last special token that is one whatever follows
    end = len(text)  # where the part begins that may become a special token
    if pattern:
        longest = max(map(len, special_tokens))
        unfinished = [
            start
            for start in range(max(0, len(text) - longest + 1), len(text))
            if any(token.startswith(text[start:]) and len(token) > len(text) - start for token in special_tokens)
        ]
        for match in pattern.finditer(text):
            if any(settled <= start <= match.start() for start in unfinished):
                break  # a longer special token may begin no later than this one
            settled = match.end()
        end = min((start for start in unfinished if start >= settled), default=len(text))

    # White space in a pre-token is always at its start, so the end of a word is a boundary ...
    word_end = _LAST_WORD_END.search(text, settled, end)
    if word_end:
        return word_end.start()
    # ... and without one, as in Chinese, all pre-tokens but the last two are final: "'" + "l" may become "'ll". A chunk
    # must not end with white space, whose last character a following word takes, but which stays whole at a text's end.
    pretokens = find_pretokens(text[settled:end])[:-2]
    while pretokens and pretokens[-1].isspace():
        pretokens.pop()
    return settled + sum(map(len, pretokens))


def parallel_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int | None = None,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Map a function over items in several processes; results come in order, with only a few items in flight.

    One worker means this process. `initializer(*initargs)` is called once in each process.
    """
    num_workers = num_workers or available_cpus()
    if num_workers == 1:
        if initializer:
            initializer(*initargs)
        yield from map(function, items)
        return
    # Forked workers start in milliseconds and need no `if __name__ == "__main__"` in the caller's script; they run only
    # `function`. On macOS forking is not safe.
    context = get_context("fork" if sys.platform == "linux" else "spawn")
    with ProcessPoolExecutor(num_workers, mp_context=context, initializer=initializer, initargs=initargs) as pool:
        in_flight: deque = deque()
        for item in items:
            in_flight.append(pool.submit(function, item))
            if len(in_flight) > 2 * num_workers:
                yield in_flight.popleft().result()
        while in_flight:
            yield in_flight.popleft().result()
