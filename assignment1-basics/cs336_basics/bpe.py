"""Training a byte-level BPE tokenizer (Sennrich et al. 2016, byte-level as in Radford et al. 2019).

Start from the 256 bytes; again and again, join the most frequent pair of neighbouring tokens into a
new token. Two ideas make that fast in plain Python:

- A word (pre-token) is a `str` with one *character* per token, the character's code being the token's
  id. Joining a pair everywhere in a word is then `str.replace`, which runs left to right without
  overlap, just as BPE asks, and at C speed.
- Only words that hold the joined pair change. An index from pairs to words finds them, and a heap finds
  the most frequent pair. A count only ever falls after the step that created its pair, so an entry
  that comes out of the heap with a stale count is put back with the true one.
"""

import heapq
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import add

from cs336_basics.pretokenization import CHUNK_CHARS, DecodeErrors, count_pretokens_in_file

Vocab = dict[int, bytes]
Merges = list[tuple[bytes, bytes]]

# Maps bytes so that ascending order of the results is descending order of the bytes; see `_descending`.
_COMPLEMENT = bytes(range(255, -1, -1))


def train_bpe(
    input_path: str | os.PathLike[str],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    num_workers: int | None = None,
    chunk_chars: int = CHUNK_CHARS,
    errors: DecodeErrors = "strict",
    progress: Callable[[str, int], None] | None = None,
) -> tuple[Vocab, Merges]:
    """Train a tokenizer on a UTF-8 file.

    Args:
        input_path: the corpus. Documents are separated by a special token.
        vocab_size: the most tokens the vocabulary may have, bytes and special tokens included.
        special_tokens: strings that become one id each and that nothing merges with.
        num_workers: processes that count pre-tokens; default: one a core. The result does not depend on it.
        chunk_chars: characters that a process counts at a time. The result does not depend on it.
        errors: "strict", or "replace" to read bytes that are not UTF-8 as U+FFFD.
        progress: called with ("bytes read" or "merges", the number so far).

    Returns:
        The vocabulary (ids 0-255 are the bytes, then the special tokens, then one id per merge), and the
        merges in the order they were made.
    """
    check_vocab_size(vocab_size, special_tokens)  # before the long part
    counts = count_pretokens_in_file(
        input_path,
        special_tokens,
        num_workers=num_workers,
        chunk_chars=chunk_chars,
        errors=errors,
        progress=(lambda done: progress("bytes read", done)) if progress else None,
    )
    encoded = {pretoken.encode(): count for pretoken, count in counts.items()}
    del counts
    return train_bpe_from_counts(
        encoded, vocab_size, special_tokens, progress=(lambda done: progress("merges", done)) if progress else None
    )


def train_bpe_from_counts(
    pretoken_counts: Mapping[bytes, int],
    vocab_size: int,
    special_tokens: Sequence[str] = (),
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[Vocab, Merges]:
    """Train a tokenizer from how often each pre-token occurs; see `train_bpe`.

    Of the pairs that occur most often, the lexicographically greatest pair of bytes is joined.

    >>> vocab, merges = train_bpe_from_counts({b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}, 256 + 3)
    >>> merges
    [(b's', b't'), (b'e', b'st'), (b'o', b'w')]
    """
    specials = check_vocab_size(vocab_size, special_tokens)
    vocab = dict(enumerate([*(bytes([byte]) for byte in range(256)), *(token.encode() for token in specials)]))
    merges: Merges = []

    words = [pretoken.decode("latin-1") for pretoken in pretoken_counts]  # byte b becomes chr(b), token id b
    frequencies = list(pretoken_counts.values())
    pair_counts: defaultdict[str, int] = defaultdict(int)
    words_with: defaultdict[str, list[int]] = defaultdict(list)  # may still name words that have lost the pair
    for index, (word, frequency) in enumerate(zip(words, frequencies, strict=True)):
        for pair in map(add, word, word[1:]):
            pair_counts[pair] += frequency
            words_with[pair].append(index)

    order = [_descending(token) for token in vocab.values()]

    def heap_entry(pair: str) -> tuple[int, str, str, str]:
        left, right = map(ord, pair)
        return -pair_counts[pair], order[left], order[right], pair

    heap = [heap_entry(pair) for pair in pair_counts]
    heapq.heapify(heap)

    while len(vocab) < vocab_size and heap:
        negative_count, _, _, pair = heap[0]
        if -negative_count != pair_counts[pair]:
            if pair_counts[pair] > 0:
                heapq.heapreplace(heap, heap_entry(pair))
            else:
                heapq.heappop(heap)
            continue
        heapq.heappop(heap)

        left, right = pair[0], pair[1]
        joined = chr(len(vocab))
        merges.append((vocab[ord(left)], vocab[ord(right)]))
        vocab[len(vocab)] = vocab[ord(left)] + vocab[ord(right)]
        order.append(_descending(vocab[ord(joined)]))

        born: defaultdict[str, list[int]] = defaultdict(list)  # the pairs with the new token -> the words they are in
        for index in words_with.pop(pair):
            parts = words[index].split(pair)  # only where parts meet does the word change
            if len(parts) == 1:
                continue
            words[index] = joined.join(parts)
            frequency = frequencies[index]
            previous = ""  # the new token, if it stands right before the part
            for before, after in pairwise(parts):
                if before:
                    pair_counts[before[-1] + left] -= frequency
                    born[before[-1] + joined].append(index)
                elif previous:
                    pair_counts[right + left] -= frequency
                    born[joined + joined].append(index)
                if after:
                    pair_counts[right + after[0]] -= frequency
                    born[joined + after[0]].append(index)
                previous = joined
        del pair_counts[pair]
        for new_pair, indices in born.items():
            pair_counts[new_pair] = sum(map(frequencies.__getitem__, indices))
            heapq.heappush(heap, heap_entry(new_pair))
        words_with.update(born)
        if progress:
            progress(len(merges))
    return vocab, merges


def check_vocab_size(vocab_size: int, special_tokens: Sequence[str]) -> list[str]:
    """The distinct special tokens, in order.

    Raises:
        ValueError: they and the 256 bytes do not fit into `vocab_size`, or one of them is a single byte.
    """
    distinct = list(dict.fromkeys(special_tokens))
    for token in distinct:
        if len(token.encode()) <= 1:
            raise ValueError(f"special token {token!r} is no longer than a byte, and every byte is a token already")
    if vocab_size < 256 + len(distinct):
        raise ValueError(
            f"vocab_size is {vocab_size}, but 256 bytes and {len(distinct)} special tokens need {256 + len(distinct)}"
        )
    return distinct


def _descending(token: bytes) -> str:
    """A key whose ascending order is the descending order of bytes: the greater byte first, the longer first."""
    return token.translate(_COMPLEMENT).decode("latin-1") + "\u0100"
