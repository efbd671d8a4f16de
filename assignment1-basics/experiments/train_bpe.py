"""train_bpe_tinystories, train_bpe_expts_owt: train two tokenizers, measure their cost, compare what they learned.

    python -m experiments train-bpe --tinystories data/tinystories/TinyStoriesV2-GPT4-train.txt \
        --broad data/owt/owt_train.txt

A corpus is a text, or a table of `hex(pre-token)<TAB>count` (.tsv) if its pre-tokens have been counted already. Each
tokenizer is trained in a process of its own, so that its peak memory can be measured.
"""

import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cs336_basics.bpe import Merges, Vocab, train_bpe, train_bpe_from_counts
from cs336_basics.corpus import END_OF_TEXT
from cs336_basics.tokenizer import Tokenizer
from experiments.results import RESULTS, write_result


@dataclass(frozen=True)
class TrainBPE:
    """Train both tokenizers; measure time and memory; compare what they learned."""

    tinystories: Path
    """Training text of TinyStories, or the counts of its pre-tokens (.tsv)."""
    broad: Path
    """Training text of the broad corpus: OpenWebText, or a substitute."""
    tinystories_vocab: int = 10_000
    """Vocabulary size of the TinyStories tokenizer."""
    broad_vocab: int = 32_000
    """Vocabulary size of the broad tokenizer."""
    tokenizers: Path = Path("data/tokenizers")
    """Folder to write the tokenizers to, each in a folder of its own."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Train, measure, and write train_bpe.json."""
        jobs = {
            "tinystories": (self.tinystories, self.tinystories_vocab),
            "broad": (self.broad, self.broad_vocab),
        }
        rows, vocabularies = {}, {}
        for name, (corpus, size) in jobs.items():
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                rows[name], tokenizer = pool.submit(_train, corpus, size).result()
            tokenizer.save(self.tokenizers / name)
            vocabularies[name] = set(tokenizer.vocab.values())
        first, second = vocabularies["tinystories"], vocabularies["broad"]
        comparison = {
            "in both": len(first & second),
            "only TinyStories, longest": [_shown(token) for token in _longest(first - second, 12)],
            "only broad, longest": [_shown(token) for token in _longest(second - first, 12)],
        }
        write_result("train_bpe", "two byte-level BPE tokenizers", {**rows, "comparison": comparison}, self.out)


def _train(corpus: Path, size: int) -> tuple[dict[str, Any], Tokenizer]:
    before, started = _peak_bytes(resource.RUSAGE_SELF), time.perf_counter()
    if corpus.suffix == ".tsv":
        pairs = (line.split("\t") for line in corpus.read_text(encoding="ascii").splitlines())
        counts = {bytes.fromhex(pretoken): int(count) for pretoken, count in pairs}
        counted = time.perf_counter()
        vocab, merges = train_bpe_from_counts(counts, size, [END_OF_TEXT])
        what: dict[str, float] = {"pre-tokens": sum(counts.values()), "distinct pre-tokens": len(counts)}
    else:
        vocab, merges, counted = _train_on_text(corpus, size)
        what = {"MB": corpus.stat().st_size / 1e6}
    ended = time.perf_counter()
    row = {
        "corpus": corpus.name,
        **what,
        "tokens": len(vocab),
        "seconds": ended - started,
        "counting_s": counted - started,
        "merging_s": ended - counted,
        "peak_MB": _peak_bytes(resource.RUSAGE_SELF) / 1e6,
        "peak_MB_before": before / 1e6,  # Python with its imports
        "peak_MB_of_a_worker": _peak_bytes(resource.RUSAGE_CHILDREN) / 1e6,
        "longest": [_shown(token) for token in _longest(set(vocab.values()) - {END_OF_TEXT.encode()}, 10)],
    }
    return row, Tokenizer(vocab, merges, [END_OF_TEXT])


def _train_on_text(corpus: Path, size: int) -> tuple[Vocab, Merges, float]:
    first_merge: list[float] = []

    def note(phase: str, _: int) -> None:
        if phase == "merges" and not first_merge:
            first_merge.append(time.perf_counter())

    vocab, merges = train_bpe(corpus, size, [END_OF_TEXT], progress=note)
    return vocab, merges, first_merge[0]


def _peak_bytes(who: int) -> int:
    return resource.getrusage(who).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _longest(tokens: set[bytes], count: int) -> list[bytes]:
    return sorted(tokens, key=lambda token: (-len(token), token))[:count]


def _shown(token: bytes) -> str:
    return token.decode(errors="backslashreplace")
