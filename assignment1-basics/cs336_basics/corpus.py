"""A corpus that everybody has: the source code of Python's standard library. Also splits a text of the user's own."""

import sysconfig
from pathlib import Path

from cs336_basics.pretokenization import read_text

END_OF_TEXT = "<|endoftext|>"
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "_bundled"}
_TABLES = {"encodings", "pydoc_data"}  # tables of characters and texts, hardly any code


def write_standard_library(train_path: Path, valid_path: Path, valid_every: int = 20) -> tuple[int, int]:
    """Write the standard library's modules as documents, by default every twentieth into the validation file.

    Tests, installed packages, tables of characters and files that are not UTF-8 are left out.

    Returns:
        The number of training and validation documents.

    Raises:
        FileNotFoundError: this Python was installed without the sources of its library.
    """
    library = Path(sysconfig.get_path("stdlib"))
    paths = [
        path
        for path in sorted(library.rglob("*.py"))
        if not (_SKIPPED | _TABLES) & set(path.relative_to(library).parts)
    ]
    documents = [text for path in paths if (text := _read(path))]
    if sum(map(len, documents)) < 1_000_000:
        raise FileNotFoundError(
            f"{library} holds less than a megabyte of Python source; give a text of your own with DATA=path.txt"
        )
    valid = documents[valid_every - 1 :: valid_every]
    train = [document for index, document in enumerate(documents) if index % valid_every != valid_every - 1]
    write_documents(train_path, train)
    write_documents(valid_path, valid)
    return len(train), len(valid)


def split_text(source: Path, train_path: Path, valid_path: Path, max_bytes: int, valid_share: float = 0.05) -> int:
    """Split the first `max_bytes` of a text file; its last documents, or lines, become the validation text.

    Documents are separated by `<|endoftext|>`. If none ends in the last `valid_share`, the split is at a line's end.

    Returns:
        The number of characters used.

    Raises:
        ValueError: the file is not UTF-8, or too short to split.
    """
    text, used = "", 0
    for block in read_text(source):
        text += block
        used += len(block.encode())
        if used >= max_bytes:
            break
    target = int(len(text) * (1 - valid_share))
    ends = [
        text.find(separator, target) + len(separator) for separator in (END_OF_TEXT, "\n") if separator in text[target:]
    ]
    cut = next((end for end in ends if end < len(text)), None)
    if len(text) < 10_000 or cut is None:
        raise ValueError(
            f"{source} is too short to train and validate on ({len(text)} characters in one piece); "
            "give at least a few hundred kilobytes of text in several lines"
        )
    write_documents(train_path, text[:cut].removesuffix(END_OF_TEXT).split(END_OF_TEXT))
    write_documents(valid_path, text[cut:].removesuffix(END_OF_TEXT).split(END_OF_TEXT))
    return len(text)


def write_documents(path: Path, documents: list[str]) -> None:
    """Write documents to a file, each followed by `<|endoftext|>`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        for document in documents:
            file.write(document + END_OF_TEXT)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):  # for example a dangling link
        return ""
