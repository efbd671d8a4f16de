"""Compare tokenizer training and encoding with Hugging Face tokenizers and tiktoken."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from cs336_basics.bpe import train_bpe
from cs336_basics.corpus import END_OF_TEXT
from cs336_basics.machine import available_cpus
from cs336_basics.tokenizer import Tokenizer
from experiments.benchmarks.harness import interleaved, write_rows
from experiments.results import RESULTS

if TYPE_CHECKING:
    import tiktoken

Row = dict[str, Any]


def train_hugging_face(path: Path, vocab_size: int) -> None:
    """Train Hugging Face's tokenizer on a text."""
    from tokenizers import Tokenizer as HuggingFaceTokenizer
    from tokenizers import models, pre_tokenizers, trainers

    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path)], trainer)


def training_rows(path: Path, vocab_size: int, repeats: int) -> list[Row]:
    """Time training on a text."""
    candidates: dict[str, Callable[[], object]] = {
        "cs336_basics": lambda: train_bpe(path, vocab_size, [END_OF_TEXT]),
        "tokenizers": lambda: train_hugging_face(path, vocab_size),
    }
    return [
        {
            "job": "train",
            "text": path.name,
            "megabytes": path.stat().st_size / 1e6,
            "vocab": vocab_size,
            "who": name,
            **row,
        }
        for name, row in interleaved(candidates, repeats).items()
    ]


def start_up_row(path: Path, repeats: int) -> Row:
    """Time the course's speed check, imports included: a new Python process trains a vocabulary of 500 on 130 kB."""
    small = Path("data") / "130kB.txt"
    small.parent.mkdir(exist_ok=True)
    small.write_bytes(path.read_bytes()[:130_000].decode(errors="ignore").encode())
    program = f"from cs336_basics.bpe import train_bpe; train_bpe({str(small)!r}, 500, ['{END_OF_TEXT}'])"
    timed = interleaved({"process": lambda: subprocess.run([sys.executable, "-c", program], check=True)}, repeats)
    return {
        "job": "train, new process",
        "text": "130 kB of it",
        "vocab": 500,
        "who": "cs336_basics",
        **timed["process"],
    }


def encoding_rows(path: Path, gpt2: Path, megabytes: float, repeats: int) -> list[Row]:
    """Time the encoding of the beginning of a text with GPT-2's vocabulary."""
    text = path.read_bytes()[: int(megabytes * 1e6)].decode(errors="ignore")
    ids = _ours(gpt2).encode(text)
    assert ids == _tiktoken().encode(text, allowed_special={END_OF_TEXT})
    timings: dict[str, list[float]] = {}
    for _ in range(repeats):
        for name, timed in interleaved(_fresh_encoders(text, gpt2), 1).items():
            timings.setdefault(name, []).append(timed["median_s"])
    size = len(text.encode()) / 1e6
    rows = []
    for name, taken in timings.items():
        median = sorted(taken)[len(taken) // 2]
        row: Row = {"job": "encode", "text": path.name, "megabytes": size, "who": name, "median_s": median}
        rows.append({**row, "min_s": min(taken), "max_s": max(taken), "MB_per_s": size / median})
    return rows


def _fresh_encoders(text: str, gpt2: Path) -> dict[str, Callable[[], object]]:
    """Return the jobs to time, each with a tokenizer of its own whose caches are empty."""
    from tokenizers import ByteLevelBPETokenizer

    documents, lines, cores = text.split(END_OF_TEXT), text.splitlines(keepends=True), available_cpus()
    ours, ours_lines, ours_batch = (_ours(gpt2) for _ in range(3))
    reference, reference_batch = _tiktoken(), _tiktoken()
    files = str(gpt2 / "gpt2_vocab.json"), str(gpt2 / "gpt2_merges.txt")
    hugging_face, hugging_face_batch = (ByteLevelBPETokenizer(*files) for _ in range(2))
    return {
        "cs336_basics encode": lambda: ours.encode(text),
        "tiktoken encode": lambda: reference.encode(text, allowed_special={END_OF_TEXT}),
        "tokenizers encode, a document each": lambda: [hugging_face.encode(document) for document in documents],
        "cs336_basics encode_iterable": lambda: sum(1 for _ in ours_lines.encode_iterable(lines)),
        f"cs336_basics encode_batch, {cores} processes": lambda: ours_batch.encode_batch(documents, cores),
        f"tiktoken encode_batch, {cores} threads": lambda: reference_batch.encode_ordinary_batch(
            documents, num_threads=cores
        ),
        f"tokenizers encode_batch, {cores} threads": lambda: hugging_face_batch.encode_batch(documents),
    }


def _ours(gpt2: Path) -> Tokenizer:
    return Tokenizer.from_files(gpt2 / "gpt2_vocab.json", gpt2 / "gpt2_merges.txt", [END_OF_TEXT])


def _tiktoken() -> "tiktoken.Encoding":
    import tiktoken

    reference = tiktoken.get_encoding("gpt2")
    return tiktoken.Encoding(
        "fresh",
        pat_str=reference._pat_str,
        mergeable_ranks=reference._mergeable_ranks,
        special_tokens=reference._special_tokens,
    )


def corpus_rows(path: Path, gpt2: Path, repeats: int) -> list[Row]:
    """Time the whole job, from a text file to a file of uint16 token ids, on all cores."""
    import numpy as np
    import tiktoken

    from cs336_basics.data import tokenize_file

    cores = available_cpus()
    reference = tiktoken.get_encoding("gpt2")
    destination = Path("data") / "benchmark.npy"

    def with_tiktoken() -> None:
        documents = path.read_text(encoding="utf-8").split(END_OF_TEXT)
        end = [reference.eot_token]
        with open(destination, "wb") as file:
            for ids in reference.encode_ordinary_batch(documents, num_threads=cores):
                file.write(np.array(ids + end, dtype=np.uint16).tobytes())

    def with_ours() -> None:
        tokenize_file(_ours(gpt2), path, destination)

    size = path.stat().st_size / 1e6
    timed = interleaved({"cs336_basics tokenize": with_ours, "tiktoken encode_batch": with_tiktoken}, repeats)
    job = {"job": f"file to token file, {cores} cores", "text": path.name, "megabytes": size}
    return [{**job, "who": name, **row, "MB_per_s": size / row["median_s"]} for name, row in timed.items()]


@dataclass(frozen=True)
class TokenizerBenchmark:
    """Compare tokenizer training and encoding with Hugging Face tokenizers and tiktoken, on the same texts."""

    texts: Positional[tuple[Path, ...]]
    """UTF-8 texts, whose documents end with <|endoftext|>."""
    gpt2: Path
    """Folder with gpt2_vocab.json and gpt2_merges.txt. tiktoken reads its own copy of them (TIKTOKEN_CACHE_DIR)."""
    megabytes: float = 10
    """Encode this much of each text, in MB (10^6 bytes)."""
    repeats: int = 5
    """Repeat every measurement this many times, in turn with the others."""
    out: Path = RESULTS
    """Folder of the results."""

    def execute(self) -> None:
        """Measure, and write benchmark_tokenizer.json."""
        if not self.texts:
            raise ValueError("no text was given; name at least one")
        rows = [start_up_row(self.texts[0], self.repeats)]
        for path in self.texts:
            rows += training_rows(path, 32_000 if path.stat().st_size > 50e6 else 10_000, self.repeats)
            rows += encoding_rows(path, self.gpt2, self.megabytes, self.repeats)
            rows += corpus_rows(path, self.gpt2, self.repeats)
        what = "tokenizer training and encoding, compared with tokenizers and tiktoken"
        write_rows("benchmark_tokenizer", what, rows, self.out)
