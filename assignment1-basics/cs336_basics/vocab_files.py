"""Read and write GPT-2's files for vocabularies and merges: `vocab.json` and `merges.txt`.

Tokens are bytes, but the files are text, so every byte is written as one printable character: bytes that are printable
in Latin-1 as themselves, the others as the characters from U+0100 on (a space is "Ġ").
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from cs336_basics.bpe import Merges, Vocab
from cs336_basics.run_folder import write_atomically

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_TO_TEXT = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(_OTHERS)}
_TO_BYTE = {char: byte for byte, char in _TO_TEXT.items()}


def token_to_text(token: bytes) -> str:
    """`b" caf\\xc3\\xa9"` -> `"ĠcafÃ©"`."""
    return token.decode("latin-1").translate(_TO_TEXT)


def text_to_token(text: str) -> bytes:
    """Invert `token_to_text`; a text with any other character stands for its own UTF-8 bytes."""
    if all(char in _TO_BYTE for char in text):
        return bytes(_TO_BYTE[char] for char in text)
    return text.encode()


def save_vocab(vocab: Vocab, path: str | os.PathLike[str], special_tokens: Iterable[str] = ()) -> None:
    """Write `{token text: id}` as JSON; special tokens are written as they are."""
    specials = {token.encode(): token for token in special_tokens}
    table = {specials.get(token) or token_to_text(token): id for id, token in vocab.items()}
    if len(table) < len(vocab):
        raise ValueError(
            "two tokens would be written the same way; choose special tokens that do not look like other tokens"
        )
    Path(path).write_text(json.dumps(table, ensure_ascii=False, indent=0), encoding="utf-8")


def load_vocab(path: str | os.PathLike[str], special_tokens: Iterable[str] = ()) -> Vocab:
    """Read `{token text: id}`, in which special tokens are written as they are.

    Raises:
        ValueError: the file is not a JSON object of this form, or two tokens have the same id.
    """
    specials = set(special_tokens)
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        if not all(isinstance(id, int) for id in table.values()):
            raise ValueError("its values are not all whole numbers")
        if len(set(table.values())) < len(table):
            raise ValueError("two of its tokens have the same id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path} is not a vocabulary, a JSON object like {{"Ġthe": 262}}: {error}') from None
    return {id: text.encode() if text in specials else text_to_token(text) for text, id in table.items()}


def save_merges(merges: Merges, path: str | os.PathLike[str]) -> None:
    """Write a version line, then one merge per line: its two tokens, separated by a space."""
    lines = ["#version: 0.2", *(f"{token_to_text(left)} {token_to_text(right)}" for left, right in merges)]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def load_merges(path: str | os.PathLike[str]) -> Merges:
    """Read merges, with or without the version line.

    Raises:
        ValueError: a line is not two tokens separated by a space; the message names the line.
    """
    merges = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").split("\n"), start=1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split(" ")
        if len(pair) != 2 or not all(pair):
            raise ValueError(f"{path}, line {number}: expected two tokens separated by a space, found {line!r}")
        merges.append((text_to_token(pair[0]), text_to_token(pair[1])))
    return merges


def tokenizer_files(folder: Path, vocab_size: int, *, required: bool) -> list[Path]:
    """Return the files of the tokenizer in `folder`, or none if it has none and `required` is False.

    Raises:
        FileNotFoundError: a required file is missing.
        ValueError: the number of tokens is not `vocab_size`, the model's.
    """
    files = [folder / "vocab.json", folder / "merges.txt"]
    missing = [path for path in files if not path.is_file()]
    if missing and required:
        raise FileNotFoundError(f"there is no {missing[0]}; name the folder that `cs336-basics train-bpe` wrote")
    if missing:
        return []
    size = len(load_vocab(files[0]))
    if size != vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {size} tokens, but the model's vocab_size is {vocab_size}; make them equal"
        )
    return files


def copy_tokenizer(files: Iterable[Path], folder: Path) -> None:
    """Copy the files of a tokenizer into another folder, each one atomically."""
    for path in files:
        write_atomically(folder / path.name, path.read_text(encoding="utf-8"))
