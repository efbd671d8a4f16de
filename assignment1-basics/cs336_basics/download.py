"""Download the course's public data sets: `python -m cs336_basics.download tinystories`.

huggingface_hub does the transfer: it resumes an interrupted download and refuses a file whose size is not the one that
the server announced.
"""

import gzip
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from tyro.conf import Positional

from cs336_basics.command import run_command


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
if TYPE_CHECKING:
    SourceName = str
else:
    SourceName = Literal[tuple(SOURCES)]


@dataclass(frozen=True)
class Download:
    """Download one of the course's public data sets."""

    name: Positional[SourceName]
    """Which data set."""
    folder: Path | None = None
    """Folder for the texts. Default: data/NAME."""

    def execute(self) -> None:
        folder = self.folder or Path("data") / self.name
        try:
            train, valid = download(self.name, folder)
        except (gzip.BadGzipFile, EOFError) as error:
            raise ValueError(str(error)) from None
        source, run = SOURCES[self.name], ".venv/bin/cs336-basics"
        print(
            f"""
What to run next, in assignment1-basics/:
  {run} train-bpe {train} -o {folder} --vocab-size {source.vocab_size}
  {run} tokenize {train} -o {folder}/train.npy --tokenizer {folder}
  {run} tokenize {valid} -o {folder}/valid.npy --tokenizer {folder}
  {run} train {source.preset} --train-data {folder}/train.npy --valid-data {folder}/valid.npy"""
        )


def download(name: str, folder: Path) -> list[Path]:
    """Download a data set into `folder` and unpack it; files that are there already are left alone.

    Returns:
        The text files.

    Raises:
        ConnectionError: the hub cannot be reached. Running the command again resumes the download.
    """
    texts = []
    for file in SOURCES[name].files:
        text = folder / file.removesuffix(".gz")
        if not text.exists():
            fetched = _fetch(SOURCES[name].repository, file, folder)
            if fetched.suffix == ".gz":
                unfinished = text.with_name(text.name + ".tmp")
                with gzip.open(fetched) as packed, open(unfinished, "wb") as unpacked:
                    shutil.copyfileobj(packed, unpacked, length=1 << 20)  # checks the archive's checksum at its end
                unfinished.replace(text)
                fetched.unlink()
        print(f"{text}: {text.stat().st_size:,} bytes")
        texts.append(text)
    return texts


def _fetch(repository: str, file: str, folder: Path) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset", local_dir=folder))
    except (OSError, HfHubHTTPError) as error:
        reason = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise ConnectionError(
            f"cannot download {file} of {repository} ({reason}); run the same command again to resume"
        ) from error


def main(args: Sequence[str] | None = None) -> None:
    """Run the command. A user's mistake is reported in one line, with exit status 2."""
    run_command(
        Download,
        "cs336_basics.download",
        args,
        interrupted="run the same command again to resume",
        out_of_memory="close other programs",
    )


if __name__ == "__main__":
    main()
