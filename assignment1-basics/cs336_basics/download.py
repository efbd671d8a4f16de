"""Fetch the course's public data sets: `python -m cs336_basics.download tinystories`.

huggingface_hub does the transfer: it resumes what was interrupted and refuses a file whose size is not the
one that the server announced.
"""

import argparse
import gzip
import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError


@dataclass(frozen=True)
class Source:
    """Files of a data set on the Hugging Face Hub: for training, then for validation."""

    repository: str
    files: tuple[str, str]
    vocab_size: int
    preset: str


SOURCES = {
    "tinystories": Source(
        "roneneldan/TinyStories",
        ("TinyStoriesV2-GPT4-train.txt", "TinyStoriesV2-GPT4-valid.txt"),
        10_000,
        "tinystories-17m",
    ),
    "owt": Source("stanford-cs336/owt-sample", ("owt_train.txt.gz", "owt_valid.txt.gz"), 32_000, "owt"),
}


def download(name: str, folder: Path) -> list[Path]:
    """Fetch a data set into `folder`, unpacked; files that are there already are left alone.

    Returns:
        The text files.

    Raises:
        ConnectionError: the hub cannot be reached; running it again resumes.
    """
    texts = []
    for file in SOURCES[name].files:
        text = folder / file.removesuffix(".gz")
        if not text.exists():
            try:
                fetched = Path(hf_hub_download(SOURCES[name].repository, file, repo_type="dataset", local_dir=folder))
            except (OSError, HfHubHTTPError) as error:
                reason = (str(error) or type(error).__name__).strip().splitlines()[0]
                raise ConnectionError(
                    f"cannot fetch {file} of {SOURCES[name].repository} ({reason}); "
                    "run the same command again to resume"
                ) from error
            if fetched.suffix == ".gz":
                unfinished = text.with_name(text.name + ".tmp")
                with gzip.open(fetched) as packed, open(unfinished, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, length=1 << 20)  # checks the archive's checksum at its end
                unfinished.replace(text)
                fetched.unlink()
        print(f"{text}: {text.stat().st_size:,} bytes")
        texts.append(text)
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the course's public data sets.")
    parser.add_argument("name", choices=sorted(SOURCES))
    parser.add_argument("--folder", type=Path, help="where to; default: data/NAME")
    arguments = parser.parse_args()
    folder = arguments.folder or Path("data") / arguments.name
    try:
        train, valid = download(arguments.name, folder)
    except (ConnectionError, gzip.BadGzipFile, EOFError) as error:
        raise SystemExit(f"cs336-basics: {error}") from None
    source, run = SOURCES[arguments.name], ".venv/bin/cs336-basics"
    print(
        f"""
What to run next, in assignment1-basics/:
  {run} train-bpe {train} -o {folder} --vocab-size {source.vocab_size}
  {run} tokenize {train} -o {folder}/train.npy --tokenizer {folder}
  {run} tokenize {valid} -o {folder}/valid.npy --tokenizer {folder}
  {run} train {source.preset} --train-data {folder}/train.npy --valid-data {folder}/valid.npy"""
    )


if __name__ == "__main__":
    main()
