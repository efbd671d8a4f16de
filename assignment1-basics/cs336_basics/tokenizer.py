"""Turn text into token ids and back.

As in training (`cs336_basics.bpe`), a word is a `str` with one character per token, whose code is the token's id. Words
repeat, so nearly all time goes into looking them up: the loop over a text is three C functions chained together
(`re.findall`, `dict.__getitem__`, `chain.from_iterable`).
"""

import heapq
import os
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from operator import add
from pathlib import Path

from cs336_basics.bpe import Merges, Vocab
from cs336_basics.pretokenization import CHUNK_CHARS, find_pretokens, parallel_map, safe_chunks, special_token_pattern
from cs336_basics.vocab_files import load_merges, load_vocab, save_merges, save_vocab

#: Characters that `encode_iterable` holds at a time.
STREAM_CHARS = 1 << 13
#: The most words whose tokens are kept.
CACHED_WORDS = 1 << 17
#: Longer words are merged with a heap and are not kept.
SHORT_WORD_BYTES = 64
#: The rank of a pair that is never merged, greater than all others.
UNRANKED = sys.maxsize


class Tokenizer:
    """A byte-level BPE tokenizer; with GPT-2's vocabulary and merges it encodes as GPT-2's tokenizer does.

    Args:
        vocab: token id -> bytes.
        merges: pairs of tokens, in the order they were learned.
        special_tokens: strings that are one token each and are never split; if two match, the longer one wins. Those
            that are not in `vocab` are appended to it. A special token of `vocab` that is not listed here is ordinary
            text.

    Raises:
        ValueError: a merge names or makes a token that is not in the vocabulary.

    >>> tokenizer = Tokenizer({0: b"a", 1: b"b", 2: b"ab"}, [(b"a", b"b")], ["<|end|>"])
    >>> tokenizer.encode("abba<|end|>")
    [2, 1, 0, 3]
    """

    def __init__(self, vocab: Vocab, merges: Merges, special_tokens: Sequence[str] | None = None) -> None:
        if isinstance(special_tokens, str):
            raise ValueError(f"special_tokens is the string {special_tokens!r}; give a list of strings")
        self.vocab = dict(vocab)
        self.merges = list(merges)
        self.special_tokens = list(dict.fromkeys(special_tokens or ()))
        self._special_pattern = special_token_pattern(self.special_tokens)

        for token in self.special_tokens:
            if token.encode() not in self.vocab.values():
                self.vocab[max(self.vocab, default=-1) + 1] = token.encode()
        self.token_to_id = {token: id for id, token in self.vocab.items()}
        self._words = _WordCache(self.token_to_id, self.merges)

    @classmethod
    def from_files(
        cls,
        vocab_filepath: str | os.PathLike[str],
        merges_filepath: str | os.PathLike[str],
        special_tokens: Sequence[str] | None = None,
    ) -> "Tokenizer":
        """Load `vocab.json` and `merges.txt` in GPT-2's format, as `save` and Hugging Face write them."""
        return cls(load_vocab(vocab_filepath, special_tokens or ()), load_merges(merges_filepath), special_tokens)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `vocab.json` and `merges.txt` into `folder`, in GPT-2's format."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_vocab(self.vocab, folder / "vocab.json", self.special_tokens)
        save_merges(self.merges, folder / "merges.txt")

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`."""
        ids: list[int] = []
        parts = self._special_pattern.split(text) if self._special_pattern else [text]
        for index, part in enumerate(parts):
            if index % 2:
                ids.append(self.token_to_id[part.encode()])
            else:
                ids.extend(chain.from_iterable(map(self._words.__getitem__, find_pretokens(part))))
        return ids

    def encode_iterable(self, iterable: Iterable[str]) -> Iterator[int]:
        """Yield the token ids of the concatenated strings lazily, in constant memory.

        The ids are those of `encode("".join(iterable))`, wherever the strings are cut.
        """
        for chunk in safe_chunks(iterable, self.special_tokens, STREAM_CHARS):
            yield from self.encode(chunk)

    def encode_batch(self, texts: Iterable[str], num_workers: int = 1) -> list[list[int]]:
        """Encode each text, using `num_workers` processes."""
        if num_workers == 1:
            return [self.encode(text) for text in texts]
        return [ids.tolist() for ids in self.encode_parallel(texts, num_workers)]

    def encode_parallel(self, texts: Iterable[str], num_workers: int | None = None) -> Iterator[array]:
        """Encode texts lazily in `num_workers` processes (default: one per core), each into an array of C ints."""
        for group in parallel_map(_encode_in_worker, _groups(texts), num_workers, _start_worker, (self,)):
            yield from group

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of `ids`."""
        try:
            return b"".join([self.vocab[id] for id in ids])
        except KeyError as error:
            raise ValueError(
                f"token id {error.args[0]} is not in the vocabulary of {len(self.vocab)} tokens; "
                "decode with the tokenizer that made the ids"
            ) from None

    def __reduce__(self) -> tuple[type["Tokenizer"], tuple[Vocab, Merges, list[str]]]:
        return Tokenizer, (self.vocab, self.merges, self.special_tokens)  # without the cache


class _WordCache(dict[str, tuple[int, ...]]):
    """Word -> token ids, computed when first asked for.

    When it holds `CACHED_WORDS` words, it is cleared; the frequent ones are soon back.
    """

    def __init__(self, token_to_id: dict[bytes, int], merges: Merges) -> None:
        if token_to_id and not 0 <= min(token_to_id.values()) <= max(token_to_id.values()) <= 0x10FFFF:
            raise ValueError(
                "token ids must lie between 0 and 1114111, the range of the characters that stand for them"
            )
        self.byte_to_char = {
            byte: chr(token_to_id[bytes([byte])]) for byte in range(256) if bytes([byte]) in token_to_id
        }
        self.pairs: list[str] = []  # by rank
        self.joined: list[str] = []  # the token that the pair of this rank becomes
        for left, right in merges:
            for token in (left, right, left + right):
                if token not in token_to_id:
                    raise ValueError(
                        f"merge ({left!r}, {right!r}) needs the token {token!r}, which is not in the vocabulary"
                    )
            self.pairs.append(chr(token_to_id[left]) + chr(token_to_id[right]))
            self.joined.append(chr(token_to_id[left + right]))
        self.ranks = {
            pair: rank for rank, pair in reversed(list(enumerate(self.pairs)))
        }  # of equal pairs, the first counts

    def __missing__(self, word: str) -> tuple[int, ...]:
        try:
            tokens = "".join(map(self.byte_to_char.__getitem__, word.encode()))
        except KeyError as error:
            byte = bytes([error.args[0]])
            raise ValueError(f"cannot encode {word!r}: the vocabulary has no token for the byte {byte!r}") from None
        merge = self.merge_short if len(tokens) <= SHORT_WORD_BYTES else self.merge_long
        ids = tuple(map(ord, merge(tokens)))
        if len(tokens) <= SHORT_WORD_BYTES:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids

    def merge_short(self, word: str) -> str:
        """Join the leftmost pair of the lowest rank until no pair has a rank."""
        rank_of, joined = self.ranks.get, self.joined
        tokens = list(word)
        ranks = [*map(rank_of, map(add, word, word[1:]), repeat(UNRANKED)), UNRANKED]  # of each token with the next
        while (rank := min(ranks)) != UNRANKED:
            i = ranks.index(rank)
            del tokens[i], ranks[i]
            tokens[i] = joined[rank]
            if i > 0:
                ranks[i - 1] = rank_of(tokens[i - 1] + tokens[i], UNRANKED)
            if i + 1 < len(tokens):
                ranks[i] = rank_of(tokens[i] + tokens[i + 1], UNRANKED)
        return "".join(tokens)

    def merge_long(self, word: str) -> str:
        """Do the same in about linear time: a heap finds the lowest rank, `str.split` all its places at once.

        The result is the same for learned merges, where no merge uses a token before the merge that makes it.
        """
        heap = [self.ranks[pair] for pair in set(map(add, word, word[1:])) if pair in self.ranks]
        heapq.heapify(heap)
        while heap:
            rank = heapq.heappop(heap)
            parts = word.split(self.pairs[rank])
            if len(parts) == 1:
                continue
            joined = self.joined[rank]
            word = joined.join(parts)
            new_pairs = {part[-1] + joined for part in parts[:-1] if part}
            new_pairs |= {joined + part[0] for part in parts[1:] if part}
            if "" in parts[1:-1]:
                new_pairs.add(joined + joined)
            for pair in new_pairs & self.ranks.keys():
                heapq.heappush(heap, self.ranks[pair])
        return word


_tokenizer_of_worker: Tokenizer


def _start_worker(tokenizer: Tokenizer) -> None:
    global _tokenizer_of_worker
    _tokenizer_of_worker = tokenizer


def _encode_in_worker(texts: list[str]) -> list[array]:
    return [array("I", _tokenizer_of_worker.encode(text)) for text in texts]


def _groups(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group texts so that each group is large enough to be worth sending to another process."""
    group: list[str] = []
    chars = 0
    for text in texts:
        group.append(text)
        chars += len(text)
        if chars >= CHUNK_CHARS:
            yield group
            group, chars = [], 0
    if group:
        yield group
