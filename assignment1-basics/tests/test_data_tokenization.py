"""Token files: what `tokenize_file` writes, what an interrupted write leaves, what `open_tokens` refuses."""

import json
import multiprocessing
import os
import pickle
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from cs336_basics.bpe import train_bpe
from cs336_basics.data import open_tokens, token_dtype, tokenize_file, write_tokens
from cs336_basics.tokenizer import Tokenizer

END = "<|endoftext|>"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A file of several chunks: more than 600 000 characters, CRLF and characters beyond ASCII among them."""
    path = tmp_path_factory.mktemp("source") / "source.txt"
    folder = Path(json.__file__).parent
    text = END.join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py")))
    text += "\r\n\r\nGröße 漢字。 \u00a0🙂 it'll\r\n" + END
    path.write_bytes((text * (600_000 // len(text) + 1)).encode())
    return path


@pytest.fixture(scope="module")
def tokenizer(source):
    return Tokenizer(*train_bpe(source, 500, [END]), [END])


@pytest.fixture(scope="module")
def expected(source, tokenizer):
    """The ids of the source, encoded one document at a time."""
    end = tokenizer.token_to_id[END.encode()]
    documents = source.read_bytes().decode().split(END)
    ids = [id for document in documents for id in [*tokenizer.encode(document), end]]
    return ids[:-1]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_token_file_holds_the_ids_of_the_text(source, tokenizer, expected, tmp_path, num_workers):
    destination = tmp_path / "new" / "folder" / "tokens.npy"
    seen = []
    count = tokenize_file(tokenizer, source, destination, num_workers=num_workers, progress=seen.append)
    tokens = np.load(destination)
    assert tokens.tolist() == expected
    assert count == len(expected)
    assert tokens.dtype == np.uint16
    assert seen == sorted(seen)
    assert seen[-1] == source.stat().st_size
    assert os.listdir(destination.parent) == ["tokens.npy"]
    assert tokenizer.decode(tokens.tolist()).encode() == source.read_bytes()


def test_files_of_any_number_of_workers_are_the_same_bytes(source, tokenizer, tmp_path):
    for num_workers in (1, 2, 3):
        tokenize_file(tokenizer, source, tmp_path / f"{num_workers}.npy", num_workers=num_workers)
    contents = [(tmp_path / f"{num_workers}.npy").read_bytes() for num_workers in (1, 2, 3)]
    assert contents[0] == contents[1] == contents[2]


@pytest.mark.parametrize(("text", "ids"), [("", []), ("a", [97]), (END, [256])])
def test_files_of_at_most_one_token(tokenizer, tmp_path, text, ids):
    (tmp_path / "text.txt").write_text(text)
    assert tokenize_file(tokenizer, tmp_path / "text.txt", tmp_path / "tokens.npy") == len(ids)
    for tokens in (np.load(tmp_path / "tokens.npy"), open_tokens(tmp_path / "tokens.npy", 500)):
        assert tokens.tolist() == ids
        assert tokens.dtype == np.uint16


@pytest.mark.parametrize(
    ("greatest_id", "dtype"), [(300, np.uint16), (65_535, np.uint16), (65_536, np.uint32), (200_000, np.uint32)]
)
def test_type_follows_the_greatest_id(tmp_path, greatest_id, dtype):
    ours = Tokenizer({**{byte: bytes([byte]) for byte in range(256)}, greatest_id: b"zz"}, [(b"z", b"z")])
    (tmp_path / "text.txt").write_text("zz a")
    tokenize_file(ours, tmp_path / "text.txt", tmp_path / "tokens.npy")
    tokens = open_tokens(tmp_path / "tokens.npy", greatest_id + 1)
    assert tokens.tolist() == [greatest_id, 32, 97]
    assert tokens.dtype == dtype


def test_types_change_above_65536_tokens():
    assert [token_dtype(size) for size in (1, 65_535, 65_536)] == [np.uint16] * 3
    assert [token_dtype(size) for size in (65_537, 10**6)] == [np.uint32] * 2


@pytest.mark.parametrize("sizes", [[], [0], [1], [3, 0, 5], [70_000, 70_000, 1], [1] * 1001])
@pytest.mark.parametrize("vocab_size", [65_536, 65_537])
def test_header_counts_the_tokens_of_all_blocks(tmp_path, sizes, vocab_size):
    rng = np.random.default_rng(0)
    blocks = [rng.integers(vocab_size, size=size) for size in sizes]
    path = tmp_path / "tokens.npy"
    assert write_tokens(path, iter(blocks), vocab_size) == sum(sizes)
    tokens = np.load(path)
    assert tokens.dtype == token_dtype(vocab_size)
    assert tokens.tolist() == [id for block in blocks for id in block.tolist()]
    assert (path.stat().st_size - tokens.nbytes) % 64 == 0
    assert np.array_equal(open_tokens(path, vocab_size), tokens)


def failing_blocks():
    yield np.arange(100_000)
    raise RuntimeError("out of luck")


def killing_blocks():
    yield np.arange(100_000)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError, match="out of luck"):
        write_tokens(tmp_path / "tokens.npy", failing_blocks(), 65_536)
    assert os.listdir(tmp_path) == []


def test_a_failed_write_leaves_an_older_file_as_it_was(tmp_path):
    write_tokens(tmp_path / "tokens.npy", [np.arange(5)], 10)
    with pytest.raises(RuntimeError, match="out of luck"):
        write_tokens(tmp_path / "tokens.npy", failing_blocks(), 65_536)
    assert os.listdir(tmp_path) == ["tokens.npy"]
    assert np.load(tmp_path / "tokens.npy").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process to kill it, which is safe on Linux only")
def test_a_killed_write_leaves_no_file_under_the_final_name(tmp_path):
    path = tmp_path / "tokens.npy"
    writer = multiprocessing.get_context("fork").Process(target=write_tokens, args=(path, killing_blocks(), 65_536))
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert not path.exists()
    write_tokens(path, [np.arange(5)], 10)
    assert os.listdir(tmp_path) == ["tokens.npy"]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_source_that_is_not_utf8_leaves_no_file_and_names_the_offset(tokenizer, tmp_path, num_workers):
    head = b"some words " * 50_000
    (tmp_path / "text.txt").write_bytes(head + b"\xff")
    with pytest.raises(ValueError, match=rf"0xff at offset {len(head)}\b"):
        tokenize_file(tokenizer, tmp_path / "text.txt", tmp_path / "tokens.npy", num_workers=num_workers)
    assert os.listdir(tmp_path) == ["text.txt"]
    count = tokenize_file(tokenizer, tmp_path / "text.txt", tmp_path / "tokens.npy", errors="replace")
    tokens = np.load(tmp_path / "tokens.npy")
    assert len(tokens) == count
    assert tokenizer.decode(tokens.tolist()) == head.decode() + "\ufffd"


def test_a_missing_source_is_reported(tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError):
        tokenize_file(tokenizer, tmp_path / "nothing.txt", tmp_path / "tokens.npy")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["tokens.npy", "tokens.bin"])
def test_a_missing_token_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        open_tokens(tmp_path / name, 500)
    (tmp_path / name).mkdir()
    with pytest.raises(FileNotFoundError, match=re.escape(name)):
        open_tokens(tmp_path / name, 500)


@pytest.mark.parametrize("kept", [0, 5, 60, 128, 129, 327])
def test_a_truncated_token_file_is_refused(tmp_path, kept):
    path = tmp_path / "tokens.npy"
    write_tokens(path, [np.arange(100)], 500)
    assert path.stat().st_size == 328
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"tokens\.npy"):
        open_tokens(path, 500)


class Trap:
    def __reduce__(self):
        return exec, ("raise SystemExit('a token file ran code')",)


@pytest.mark.parametrize("kind", ["object array", "pickle", "npz", "text", "floats", "bools", "table", "scalar"])
def test_files_that_hold_no_row_of_ids_are_refused(tmp_path, kind):
    path = tmp_path / "tokens.npy"
    with open(path, "wb") as file:
        if kind == "object array":
            np.save(file, np.array([Trap(), 1], dtype=object), allow_pickle=True)
        elif kind == "pickle":
            pickle.dump(Trap(), file)
        elif kind == "npz":
            np.savez(file, np.arange(3))
        elif kind == "text":
            file.write(b"1 2 3\n" * 100)
        else:
            arrays = {"floats": np.ones(3), "bools": np.ones(3, bool), "table": np.ones((2, 2), int), "scalar": 3}
            np.save(file, arrays[kind])
    with pytest.raises(ValueError, match=r"tokens\.npy"):
        open_tokens(path, 500)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_an_id_outside_the_vocabulary_is_named(tmp_path, dtype):
    path = tmp_path / "tokens.npy"
    np.save(path, np.array([1, 2, 499, 0], dtype=dtype))
    assert open_tokens(path, 500).tolist() == [1, 2, 499, 0]
    with pytest.raises(ValueError, match=r"\b499\b.*\b499\b"):
        open_tokens(path, 499)


def test_a_negative_id_is_outside_the_vocabulary(tmp_path):
    np.save(tmp_path / "tokens.npy", np.array([3, -7, 4]))
    with pytest.raises(ValueError, match="-7"):
        open_tokens(tmp_path / "tokens.npy", 500)


def test_raw_files_of_uint16_are_read(tmp_path):
    path = tmp_path / "tokens.bin"
    np.array([1, 258, 65_535], dtype="<u2").tofile(path)
    assert open_tokens(path, 65_536).tolist() == [1, 258, 65_535]
    with pytest.raises(ValueError, match="65535"):
        open_tokens(path, 65_535)


@pytest.mark.parametrize("content", [b"", b"\1", b"\1\0\2"])
def test_raw_files_of_half_a_token_or_none_are_refused(tmp_path, content):
    (tmp_path / "tokens.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"tokens\.bin"):
        open_tokens(tmp_path / "tokens.bin", 500)


def test_token_files_are_mapped_into_memory_read_only(tmp_path):
    write_tokens(tmp_path / "tokens.npy", [np.arange(5)], 10)
    tokens = open_tokens(tmp_path / "tokens.npy", 10)
    assert isinstance(tokens, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 1
