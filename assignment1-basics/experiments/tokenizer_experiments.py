"""tokenizer_experiments: how well each tokenizer compresses each corpus, and how fast it is."""

import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from cs336_basics.corpus import END_OF_TEXT
from cs336_basics.tokenizer import Tokenizer
from experiments.results import RESULTS, write_result

#: Size of The Pile (Gao et al. 2020) in bytes, as given by the course.
PILE_BYTES = 825e9


@dataclass(frozen=True)
class TokenizerExperiments:
    """Compress ten sampled documents of each corpus with both tokenizers, and measure their speed."""

    tinystories: Path
    """Text of TinyStories."""
    broad: Path
    """Text of the broad corpus."""
    tokenizers: Path = Path("data/tokenizers")
    """Folder of the tokenizers that `train-bpe` wrote."""
    documents: int = 10
    """Documents to sample from each corpus."""
    samples: int = 200
    """Repeat the draw of the documents this many times, to see how much the result varies."""
    megabytes: float = 10.0
    """Measure the speed on this much text of each corpus, in MB (10^6 bytes), on one core."""
    seed: int = 0
    """Determines the draws."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Measure, and write tokenizer_experiments.json."""
        from cs336_basics.load_run import load_tokenizer

        rows = []
        for corpus, path in (("tinystories", self.tinystories), ("broad", self.broad)):
            documents = list(_documents(path, int(self.megabytes * 1e6)))
            for name in ("tinystories", "broad"):
                tokenizer = load_tokenizer(self.tokenizers / name)
                seconds = []
                for _ in range(3):  # each time with an empty cache, as at the start of a file
                    tokenizer = Tokenizer(tokenizer.vocab, tokenizer.merges, tokenizer.special_tokens)
                    started = time.perf_counter()
                    lengths = [len(tokenizer.encode(document)) for document in documents]
                    seconds.append(time.perf_counter() - started)
                sizes = [len(document.encode()) for document in documents]
                rng = random.Random(self.seed)
                draws = [rng.sample(range(len(documents)), self.documents) for _ in range(self.samples)]
                ratios = [sum(sizes[i] for i in draw) / sum(lengths[i] for i in draw) for draw in draws]
                bytes_per_second = sum(sizes) / statistics.median(seconds)
                rows.append(
                    {
                        "corpus": corpus,
                        "tokenizer": name,
                        "bytes_per_token": ratios[0],
                        "of_all_draws_lowest": min(ratios),
                        "of_all_draws_highest": max(ratios),
                        "of_all_documents": sum(sizes) / sum(lengths),
                        "MB_per_s": bytes_per_second / 1e6,
                        "pile_hours": PILE_BYTES / bytes_per_second / 3600,
                    }
                )
        write_result("tokenizer_experiments", "compression and speed of both tokenizers", {"rows": rows}, self.out)


def _documents(path: Path, max_bytes: int) -> Iterator[str]:
    """Yield the documents at the start of a text."""
    with path.open(encoding="utf-8") as file:
        text = "".join(islice(iter(lambda: file.read(1 << 16), ""), -(-max_bytes >> 16)))
    yield from (document for document in text.split(END_OF_TEXT)[:-1] if document.strip())
