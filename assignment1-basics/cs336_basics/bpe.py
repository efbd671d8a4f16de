"""Train a byte-level BPE tokenizer (Sennrich et al. 2016; byte-level as in Radford et al. 2019).

Start from the 256 bytes; again and again, join the most frequent pair of neighboring tokens into a new token. That is
`train_bpe_naive`. The rest of this file does the same, faster. Two ideas are enough for that in plain Python:

- A word (pre-token) is a `str` with one *character* per token, whose code is the token's id. Joining a pair everywhere
  in a word is then `str.split` and `str.join`, which run left to right without overlap, just as BPE asks, and at C
  speed.
- Only words that contain the joined pair change. An index from pairs to words finds them, and a heap finds the most
  frequent pair. A count only ever falls after the step that created its pair, so an entry that comes out of the heap
  with a stale count is put back with the true one.
"""

import heapq
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import add

from cs336_basics.pretokenization import CHUNK_CHARS, DecodeErrors, count_pretokens_in_file

Vocab = dict[int, bytes]
Merges = list[tuple[bytes, bytes]]


def train_bpe_naive(
    pretoken_counts: Mapping[bytes, int], vocab_size: int, special_tokens: Sequence[str] = ()
) -> tuple[Vocab, Merges]:
    """Train a tokenizer by counting every pair again before every merge; see `train_bpe_from_counts`.

    >>> vocab, merges = train_bpe_naive({b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}, 256 + 3)
    >>> merges
    [(b's', b't'), (b'e', b'st'), (b'o', b'w')]
    """
    vocab, merges = _first_vocab(vocab_size, special_tokens), []
    words = [([bytes([byte]) for byte in pretoken], count) for pretoken, count in pretoken_counts.items()]
    while len(vocab) < vocab_size:
        pair_counts: Counter[tuple[bytes, bytes]] = Counter()
        for word, count in words:
            for pair in pairwise(word):
                pair_counts[pair] += count
        if not pair_counts:
            break
        best = max(pair_counts, key=lambda pair: (pair_counts[pair], pair))
        words = [(_join_naively(word, best), count) for word, count in words]
        merges.append(best)
        vocab[len(vocab)] = best[0] + best[1]
    return vocab, merges


def _join_naively(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """Join `pair` wherever it occurs in a word, from left to right."""
    joined: list[bytes] = []
    position = 0
    while position < len(word):
        if tuple(word[position : position + 2]) == pair:
            joined.append(pair[0] + pair[1])
            position += 2
        else:
            joined.append(word[position])
            position += 1
    return joined


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
        input_path: the corpus, whose documents are separated by a special token.
        vocab_size: the most tokens the vocabulary may have, including the bytes and the special tokens.
        special_tokens: strings that become one token each and never take part in a merge.
        num_workers: processes that count pre-tokens. Default: one per core. The result does not depend on it.
        chunk_chars: characters that a process counts at a time. The result does not depend on it.
        errors: "strict", or "replace" to read bytes that are not UTF-8 as U+FFFD.
        progress: called with ("bytes read" or "merges", the number so far).

    Returns:
        The vocabulary (ids 0-255 are the bytes, then come the special tokens, then one id per merge), and the merges
        in the order they were made.
    """
    check_vocab_size(vocab_size, special_tokens)  # before the counting, which takes long
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
    """Train a tokenizer from the number of times each pre-token occurs; see `train_bpe` for the other arguments.

    Among equally frequent pairs, the lexicographically greatest pair of bytes is joined.

    >>> vocab, merges = train_bpe_from_counts({b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}, 256 + 3)
    >>> merges
    [(b's', b't'), (b'e', b'st'), (b'o', b'w')]
    """
    vocab, merges = _first_vocab(vocab_size, special_tokens), []
    pairs = _Pairs(pretoken_counts, vocab)
    while len(vocab) < vocab_size and (pair := pairs.most_frequent()):
        left, right = vocab[ord(pair[0])], vocab[ord(pair[1])]
        merges.append((left, right))
        vocab[len(vocab)] = left + right
        pairs.join(pair, token_id=len(vocab) - 1, token=left + right)
        if progress:
            progress(len(merges))
    return vocab, merges


class _Pairs:
    """The pairs of neighboring tokens: how often each occurs, and in which words.

    A token is a character, a pair is a string of two, and a word is a string.
    """

    def __init__(self, pretoken_counts: Mapping[bytes, int], vocab: Vocab) -> None:
        self.words = [pretoken.decode("latin-1") for pretoken in pretoken_counts]  # byte b becomes chr(b), token id b
        self.frequencies = list(pretoken_counts.values())
        self.counts: defaultdict[str, int] = defaultdict(int)
        self.words_with: defaultdict[str, list[int]] = defaultdict(list)  # some of them may have lost the pair since
        for index, (word, frequency) in enumerate(zip(self.words, self.frequencies, strict=True)):
            for pair in map(add, word, word[1:]):
                self.counts[pair] += frequency
                self.words_with[pair].append(index)
        self.order = [_descending(token) for token in vocab.values()]
        self.heap = [self._heap_entry(pair) for pair in self.counts]
        heapq.heapify(self.heap)

    def _heap_entry(self, pair: str) -> tuple[int, str, str, str]:
        left, right = map(ord, pair)
        return -self.counts[pair], self.order[left], self.order[right], pair

    def most_frequent(self) -> str | None:
        """Take the most frequent pair, the greatest of several, off the heap; None if there is no pair left."""
        heap, counts = self.heap, self.counts
        while heap:
            negative_count, _, _, pair = heap[0]
            if -negative_count == counts[pair]:
                return heapq.heappop(heap)[-1]
            if counts[pair] > 0:
                heapq.heapreplace(heap, self._heap_entry(pair))
            else:
                heapq.heappop(heap)
        return None

    def join(self, pair: str, token_id: int, token: bytes) -> None:
        """Join `pair` into the token with this id and these bytes, in all words."""
        self.order.append(_descending(token))
        joined = chr(token_id)
        new_pairs: defaultdict[str, list[int]] = defaultdict(list)  # pairs with the new token -> the words they are in
        for index in self.words_with.pop(pair):
            parts = self.words[index].split(pair)
            if len(parts) > 1:
                self.words[index] = joined.join(parts)
                self._recount(parts, index, pair, joined, new_pairs)
        del self.counts[pair]
        for new_pair, indices in new_pairs.items():
            self.counts[new_pair] = sum(map(self.frequencies.__getitem__, indices))
            heapq.heappush(self.heap, self._heap_entry(new_pair))
        self.words_with.update(new_pairs)

    def _recount(
        self, parts: list[str], index: int, pair: str, joined: str, new_pairs: defaultdict[str, list[int]]
    ) -> None:
        """Update the counts for one word, which changes only where its parts meet: there `pair` becomes `joined`."""
        left, right, frequency, counts = pair[0], pair[1], self.frequencies[index], self.counts
        previous = ""  # the new token, if it comes right before the part
        for before, after in pairwise(parts):
            if before:
                counts[before[-1] + left] -= frequency
                new_pairs[before[-1] + joined].append(index)
            elif previous:
                counts[right + left] -= frequency
                new_pairs[joined + joined].append(index)
            if after:
                counts[right + after[0]] -= frequency
                new_pairs[joined + after[0]].append(index)
            previous = joined


def _first_vocab(vocab_size: int, special_tokens: Sequence[str]) -> Vocab:
    """Return the vocabulary before the first merge: the bytes, then the special tokens."""
    specials = check_vocab_size(vocab_size, special_tokens)
    return dict(enumerate([*(bytes([byte]) for byte in range(256)), *(token.encode() for token in specials)]))


def check_vocab_size(vocab_size: int, special_tokens: Sequence[str]) -> list[str]:
    """Return the distinct special tokens, in order.

    Raises:
        ValueError: they and the 256 bytes do not fit into `vocab_size`, or one of them is a single byte.
    """
    distinct = list(dict.fromkeys(special_tokens))
    for token in distinct:
        if len(token.encode()) <= 1:
            raise ValueError(
                f"special token {token!r} is a single byte, and every byte is a token already; make it longer"
            )
    if vocab_size < 256 + len(distinct):
        raise ValueError(
            f"vocab_size is {vocab_size}, but 256 bytes and {len(distinct)} special tokens need {256 + len(distinct)}"
        )
    return distinct


# Maps bytes so that ascending order of the results is descending order of the bytes.
_COMPLEMENT = bytes(range(255, -1, -1))


def _descending(token: bytes) -> str:
    """Return a key that sorts tokens in descending order: the greater byte first, the longer token first."""
    return token.translate(_COMPLEMENT).decode("latin-1") + "\u0100"
