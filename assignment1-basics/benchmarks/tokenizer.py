"""Tokenizer training and encoding beside Hugging Face tokenizers and tiktoken, on the same texts in one run.

    python -m benchmarks.tokenizer TEXT [TEXT ...] --gpt2 FOLDER

Every candidate of `encode` starts from an object of its own with empty caches. `--gpt2` names a folder with
gpt2_vocab.json and gpt2_merges.txt; tiktoken takes its own copy of GPT-2's vocabulary (TIKTOKEN_CACHE_DIR).
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tiktoken
from tokenizers import ByteLevelBPETokenizer, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as HuggingFaceTokenizer

from benchmarks.harness import interleaved, write_result
from cs336_basics.bpe import train_bpe
from cs336_basics.corpus import END_OF_TEXT
from cs336_basics.data import tokenize_file
from cs336_basics.machine import available_cpus
from cs336_basics.tokenizer import Tokenizer


def train_hugging_face(path: Path, vocab_size: int) -> None:
    tokenizer = HuggingFaceTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(path)], trainer)


def training_rows(path: Path, vocab_size: int, repeats: int) -> list[dict]:
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
            "who": who,
            **row,
        }
        for who, row in interleaved(candidates, repeats).items()
    ]


def start_up_row(path: Path, repeats: int) -> dict:
    """The course's speed check, with everything: a new Python process trains on 130 kB to a vocabulary of 500."""
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


def encoding_rows(path: Path, gpt2: Path, megabytes: float, repeats: int) -> list[dict]:
    text = path.read_bytes()[: int(megabytes * 1e6)].decode(errors="ignore")
    documents = text.split(END_OF_TEXT)
    vocab, merges = gpt2 / "gpt2_vocab.json", gpt2 / "gpt2_merges.txt"
    cores = available_cpus()

    def tiktoken_encoding() -> tiktoken.Encoding:
        reference = tiktoken.get_encoding("gpt2")
        return tiktoken.Encoding(
            "fresh",
            pat_str=reference._pat_str,
            mergeable_ranks=reference._mergeable_ranks,
            special_tokens=reference._special_tokens,
        )

    def fresh() -> dict:
        ours, ours_lines, ours_batch = (Tokenizer.from_files(vocab, merges, [END_OF_TEXT]) for _ in range(3))
        reference, reference_batch = tiktoken_encoding(), tiktoken_encoding()
        theirs, theirs_batch = (ByteLevelBPETokenizer(str(vocab), str(merges)) for _ in range(2))
        lines = text.splitlines(keepends=True)
        return {
            "cs336_basics encode": lambda: ours.encode(text),
            "tiktoken encode": lambda: reference.encode(text, allowed_special={END_OF_TEXT}),
            "tokenizers encode, a document each": lambda: [theirs.encode(document) for document in documents],
            "cs336_basics encode_iterable": lambda: sum(1 for _ in ours_lines.encode_iterable(lines)),
            f"cs336_basics encode_batch, {cores} processes": lambda: ours_batch.encode_batch(documents, cores),
            f"tiktoken encode_batch, {cores} threads": lambda: reference_batch.encode_ordinary_batch(
                documents, num_threads=cores
            ),
            f"tokenizers encode_batch, {cores} threads": lambda: theirs_batch.encode_batch(documents),
        }

    ids = Tokenizer.from_files(vocab, merges, [END_OF_TEXT]).encode(text)
    assert ids == tiktoken_encoding().encode(text, allowed_special={END_OF_TEXT})
    timings: dict[str, list[float]] = {}
    for _ in range(repeats):
        for who, timed in interleaved(fresh(), 1).items():
            timings.setdefault(who, []).append(timed["median_s"])
    size = len(text.encode()) / 1e6
    rows = []
    for who, taken in timings.items():
        median = sorted(taken)[len(taken) // 2]
        row: dict[str, str | float] = {
            "job": "encode",
            "text": path.name,
            "megabytes": size,
            "who": who,
            "median_s": median,
        }
        rows.append({**row, "min_s": min(taken), "max_s": max(taken), "MB_per_s": size / median})
    return rows


def corpus_rows(path: Path, gpt2: Path, repeats: int) -> list[dict]:
    """The whole job: a text file into a file of uint16 token ids, on all cores."""
    cores = available_cpus()
    files = gpt2 / "gpt2_vocab.json", gpt2 / "gpt2_merges.txt"
    reference = tiktoken.get_encoding("gpt2")
    destination = Path("data") / "benchmark.npy"

    def with_tiktoken() -> None:
        documents = path.read_text(encoding="utf-8").split(END_OF_TEXT)
        end = [reference.eot_token]
        with open(destination, "wb") as file:
            for ids in reference.encode_ordinary_batch(documents, num_threads=cores):
                file.write(np.array(ids + end, dtype=np.uint16).tobytes())

    def with_ours() -> None:
        tokenize_file(Tokenizer.from_files(*files, [END_OF_TEXT]), path, destination)

    size = path.stat().st_size / 1e6
    timed = interleaved({"cs336_basics tokenize": with_ours, "tiktoken encode_batch": with_tiktoken}, repeats)
    return [
        {"job": f"file to token file, {cores} cores", "text": path.name, "megabytes": size, "who": who, **row,
         "MB_per_s": size / row["median_s"]}
        for who, row in timed.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--gpt2", type=Path, required=True)
    parser.add_argument("--megabytes", type=float, default=10, help="how much of a text to encode")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = [start_up_row(arguments.texts[0], arguments.repeats)]
    for path in arguments.texts:
        rows += training_rows(path, 32_000 if path.stat().st_size > 50e6 else 10_000, arguments.repeats)
        rows += encoding_rows(path, arguments.gpt2, arguments.megabytes, arguments.repeats)
        rows += corpus_rows(path, arguments.gpt2, arguments.repeats)
    write_result("benchmark_tokenizer", "tokenizer training and encoding beside tokenizers and tiktoken", rows)


if __name__ == "__main__":
    main()
