"""Pre-tokenization against the `regex` module, and chunking against pre-tokenization of the whole."""

import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from itertools import count, islice, pairwise, product

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cs336_basics.pretokenization import (
    GPT2_PATTERN,
    count_pretokens,
    count_pretokens_in_file,
    find_pretokens,
    parallel_map,
    read_text,
    safe_chunks,
    special_token_pattern,
)

PATTERN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
SPECIAL_SETS = [
    [],
    ["<|endoftext|>"],
    ["<|e|>", "<|e|><|e|>"],
    ["aab", "ba"],
    ["<|a|>", "|>x"],
    ["ab", "abcab", "bcabd", "ca"],
    [" a b ", "  ", "<| x\n|>"],
    ["aaaa", "aa"],
    ["'l", "\r\n", "語<|"],
]
FRAGMENTS = [
    *("'", "''", "'s", "'ll", "'l", "'ve", "'v", "'re", "'r", "'S", "a", "b", "c", "d", "é", "s", "Xyz"),
    *("0", "12", "²", "Ⅷ", " ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", "\r", "\x0b", "\x1c", "\x85", "\u00a0"),
    *("\u3000", "\u2028", "語", "漢字", "。", "🙂", "👩\u200d👩", "e\u0301", "!", "...", "-", "x"),
    *("<|endoftext|>", "<|endof", "text|>", "<|e|>", "<|e", "|>", "<|", "|", ">", "<", "<|a|>", "|>x", "a b", "<| x"),
]
fast = settings(deadline=None, max_examples=300)
nasty_text = st.lists(st.sampled_from(FRAGMENTS), max_size=25).map("".join)


def split_at_specials(text, specials):
    """[text, special, text, ..., text]: from left to right, the longest special token wins."""
    pieces, start, position = [], 0, 0
    while position < len(text):
        found = max((token for token in specials if text.startswith(token, position)), key=len, default="")
        if found:
            pieces += [text[start:position], found]
            start = position = position + len(found)
        else:
            position += 1
    return [*pieces, text[start:]]


def pretokenize(text, specials):
    parts = split_at_specials(text, specials)
    return [
        token
        for index, part in enumerate(parts)
        for token in ([("special", part)] if index % 2 else PATTERN.findall(part))
    ]


def cut(text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:end] for start, end in pairwise(edges)]


def assert_chunks_keep_pretokens(pieces, specials, chunk_chars):
    whole = "".join(pieces)
    chunks = list(safe_chunks(pieces, specials, chunk_chars))
    assert "".join(chunks) == whole
    assert all(chunks)
    assert [token for chunk in chunks for token in pretokenize(chunk, specials)] == pretokenize(whole, specials)


def test_pattern_is_the_one_of_gpt2():
    assert PATTERN.pattern == GPT2_PATTERN


@pytest.mark.parametrize(
    ("text", "pretokens"),
    [
        ("", []),
        ("I'll  pay 10€,\n\nok?", ["I", "'ll", " ", " pay", " 10", "€,", "\n", "\n", "ok", "?"]),
        ("they've''re 'LL", ["they", "'ve", "''", "re", " '", "LL"]),
        ("a \u00a0b\u3000\r\n", ["a", " ", "\u00a0", "b", "\u3000\r\n"]),
        ("x   ", ["x", "   "]),
        ("über 漢字。²½ 🙂", ["über", " 漢字", "。", "²½", " 🙂"]),
    ],
)
def test_find_pretokens_of_known_texts(text, pretokens):
    assert find_pretokens(text) == pretokens


def test_find_pretokens_of_every_pair_of_ascii_characters():
    for first, second in product(map(chr, range(128)), repeat=2):
        for text in (first + second, f"a{first}{second}b", f" {first}{second} "):
            assert find_pretokens(text) == PATTERN.findall(text)


@settings(deadline=None, max_examples=1000)
@given(
    st.text(st.characters(max_codepoint=127))
    | st.text("' sdmtlvreLVRE09\n\t\r\x0b\x0c\x1c\x1d\x1e\x1f\0!|", max_size=40)
)
def test_find_pretokens_equals_the_regex_module_on_ascii(text):
    assert find_pretokens(text) == PATTERN.findall(text)


@fast
@given(st.text() | nasty_text)
def test_find_pretokens_equals_the_regex_module_and_loses_nothing_on_unicode(text):
    assert find_pretokens(text) == PATTERN.findall(text)
    assert "".join(find_pretokens(text)) == text


@fast
@given(nasty_text, st.sampled_from(SPECIAL_SETS))
def test_special_token_pattern_splits_at_the_longest_tokens(text, specials):
    pattern = special_token_pattern(specials)
    assert (pattern.split(text) if pattern else [text]) == split_at_specials(text, specials)


def test_no_special_tokens_need_no_pattern_and_an_empty_one_is_refused():
    assert special_token_pattern([]) is None
    with pytest.raises(ValueError, match="empty"):
        special_token_pattern(["<|a|>", ""])


@fast
@given(nasty_text, st.sampled_from(SPECIAL_SETS))
def test_count_pretokens_leaves_special_tokens_out(text, specials):
    expected = Counter(token for token in pretokenize(text, specials) if isinstance(token, str))
    assert count_pretokens(text, specials) == expected


@settings(deadline=None, max_examples=1500)
@given(nasty_text, st.lists(st.integers(0, 1000), max_size=12), st.integers(1, 50), st.sampled_from(SPECIAL_SETS))
@example("it'll", [2, 3, 4], 1, [])
@example("<|e|><|e|><|e|>", [5, 7, 11], 1, ["<|e|>", "<|e|><|e|>"])
@example("aaba", [1, 2, 3], 1, ["aab", "ba"])
@example("\n\n<|endof", [], 1, [])
@example("  <|endof", [3], 1, ["<|endoftext|>"])
def test_safe_chunks_keep_all_pretokens(text, places, chunk_chars, specials):
    assert_chunks_keep_pretokens(cut(text, places), specials, chunk_chars)


@settings(deadline=None, max_examples=1000)
@given(st.text("ab<|e>x ' \nl語", max_size=40), st.integers(1, 9), st.sampled_from(SPECIAL_SETS))
def test_safe_chunks_of_single_characters_keep_all_pretokens(text, chunk_chars, specials):
    assert_chunks_keep_pretokens(list(text), specials, chunk_chars)


@settings(deadline=None, max_examples=600)
@given(st.data())
def test_safe_chunks_keep_all_pretokens_for_any_special_tokens(data):
    specials = data.draw(st.lists(st.text("ab ", min_size=1, max_size=5), max_size=4))
    pieces = data.draw(st.lists(st.text("ab '", max_size=6), max_size=20))
    assert_chunks_keep_pretokens(pieces, specials, data.draw(st.integers(1, 50)))


@pytest.mark.parametrize("unit", ["The cat's 12 hats.\n", "漢字。仮名、", "<|endoftext|>", "a<|endoftext|>"])
def test_safe_chunks_are_hardly_longer_than_asked_for(unit):
    text = unit * 1000
    pieces = [text[start : start + 10] for start in range(0, len(text), 10)]
    sizes = [len(chunk) for chunk in safe_chunks(pieces, ["<|endoftext|>"], chunk_chars=100)]
    assert sum(sizes) == len(text)
    assert max(sizes) <= 100 + 10 + 2 * len(unit)


@pytest.mark.parametrize("unit", ["x", " ", "é", "\n", "<", "<|endoftext|"])
def test_safe_chunks_of_a_run_without_boundary_take_linear_time(unit):
    pieces = [(unit * 10)[:10]] * 20_000
    start = time.perf_counter()
    chunks = list(safe_chunks(pieces, ["<|endoftext|>"], chunk_chars=20))
    assert time.perf_counter() - start < 5  # quadratic time would be minutes, linear time is a fraction of a second
    assert "".join(chunks) == "".join(pieces)


def numbers_up_to(limit):
    for number in count(1):
        assert number <= limit, "read far ahead of the results that were asked for"
        yield number


def test_safe_chunks_are_lazy():
    chunks = safe_chunks((f"word {number}\n" for number in numbers_up_to(100)), chunk_chars=30)
    assert "".join(islice(chunks, 3)).startswith("word 1\nword 2\nword 3\n")


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("text") / "text.txt"


utf8_ish = st.lists(
    st.sampled_from([*b"a\n\r\xff\xc3\xa9\x80\xe2\x82\xac\xed\xa0\xf0\x9f\x99\x82\xf4\x90\xc0\xaf"]), max_size=30
).map(bytes) | st.binary(max_size=40)


@fast
@given(data=st.text().map(str.encode) | nasty_text.map(str.encode), block_bytes=st.integers(1, 9))
@example(data=b"one\r\ntwo\rthree\n", block_bytes=4)
def test_read_text_gives_every_character_as_it_stands(scratch, data, block_bytes):
    scratch.write_bytes(data)
    blocks = list(read_text(scratch, block_bytes=block_bytes))
    assert "".join(blocks).encode() == data
    assert all(len(block.encode()) <= block_bytes + 3 for block in blocks)


@settings(deadline=None, max_examples=500)
@given(data=utf8_ish, block_bytes=st.integers(1, 9))
@example(data="😀".encode()[:3], block_bytes=2)
@example(data=b"ab\xe2\x82", block_bytes=3)
def test_read_text_agrees_with_bytes_decode_on_any_bytes(scratch, data, block_bytes):
    scratch.write_bytes(data)
    replaced = "".join(read_text(scratch, errors="replace", block_bytes=block_bytes))
    assert replaced == data.decode("utf-8", errors="replace")
    try:
        expected = data.decode("utf-8")
    except UnicodeDecodeError as error:
        with pytest.raises(ValueError, match=rf"byte 0x{data[error.start]:02x} at offset {error.start}\b") as caught:
            list(read_text(scratch, block_bytes=block_bytes))
        assert str(scratch) in str(caught.value)
    else:
        assert "".join(read_text(scratch, block_bytes=block_bytes)) == expected


@fast
@given(
    before=st.text(max_size=30).map(str.encode),
    bad=st.sampled_from([b"\xff", b"\x80", b"\xc0\x80", b"\xed\xa0\x80", b"\xf8", b"\xe9x", b"\xf0\x9f\x99 "]),
    after=st.binary(max_size=10),
    block_bytes=st.integers(1, 40),
)
def test_read_text_names_the_offset_of_the_first_bad_byte(scratch, before, bad, after, block_bytes):
    scratch.write_bytes(before + bad + after)
    with pytest.raises(ValueError, match=rf"0x{bad[0]:02x} at offset {len(before)}\b"):
        list(read_text(scratch, block_bytes=block_bytes))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_read_text_reports_a_character_cut_off_by_the_end_of_the_file(scratch, length):
    scratch.write_bytes(b"12345" + "🙂".encode()[:length])
    with pytest.raises(ValueError, match=r"0xf0 at offset 5\b"):
        list(read_text(scratch, block_bytes=6))
    assert "".join(read_text(scratch, errors="replace", block_bytes=6)) == "12345\ufffd"


def test_read_text_reports_progress_in_bytes(scratch):
    scratch.write_bytes("é".encode() * 10)
    seen = []
    list(read_text(scratch, block_bytes=7, progress=seen.append))
    assert seen == [7, 14, 20]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    documents = [f"It's document {n}, isn't it?\r\n\n 漢字{n % 7}。 \u00a0 <|e|>" for n in range(600)]
    path.write_bytes("<|endoftext|>".join(documents).encode())
    return path


@pytest.mark.parametrize(("num_workers", "chunk_chars"), [(1, 97), (2, 1000), (3, 211), (8, 5000), (3, 10**7)])
def test_counts_of_a_file_do_not_depend_on_workers_or_chunks(corpus, num_workers, chunk_chars):
    specials = ["<|endoftext|>", "<|e|>"]
    expected = Counter(token for token in pretokenize(corpus.read_bytes().decode(), specials) if isinstance(token, str))
    seen = []
    counts = count_pretokens_in_file(
        corpus, specials, num_workers=num_workers, chunk_chars=chunk_chars, progress=seen.append
    )
    assert counts == expected
    assert seen[-1] == corpus.stat().st_size


def test_counting_in_processes_reports_bytes_that_are_not_utf8(scratch):
    data = b"some words " * 500
    scratch.write_bytes(data + b"\xff" + data)
    with pytest.raises(ValueError, match=rf"offset {len(data)}\b"):
        count_pretokens_in_file(scratch, num_workers=2, chunk_chars=100)
    counts = count_pretokens_in_file(scratch, num_workers=2, chunk_chars=100, errors="replace")
    assert counts == Counter(PATTERN.findall(scratch.read_bytes().decode(errors="replace")))


def process_and_square(n):
    return os.getpid(), n * n


def divide(n):
    return 1 // n


def test_parallel_map_keeps_the_order_and_uses_other_processes():
    results = list(parallel_map(process_and_square, range(50), 2))
    assert [square for _, square in results] == [n * n for n in range(50)]
    assert os.getpid() not in {process for process, _ in results}


def test_parallel_map_with_one_worker_stays_in_this_process():
    assert list(parallel_map(process_and_square, [3], 1)) == [(os.getpid(), 9)]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_parallel_map_reads_only_a_few_items_ahead(num_workers):
    results = parallel_map(divide, numbers_up_to(3 + 2 * num_workers), num_workers)
    assert list(islice(results, 3)) == [1, 0, 0]
    results.close()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_parallel_map_passes_errors_on(num_workers):
    with pytest.raises(ZeroDivisionError):
        list(parallel_map(divide, [1, 0, 1], num_workers))


def test_error_message_names_the_remedy(scratch):
    scratch.write_bytes(b"\xff")
    with pytest.raises(ValueError, match=re.escape('errors="replace"')):
        list(read_text(scratch))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a process in /proc")
def test_counting_a_file_ten_times_as_long_takes_no_more_memory(tmp_path):
    program = """
import sys
from cs336_basics.pretokenization import count_pretokens_in_file
count_pretokens_in_file(sys.argv[1], ["<|endoftext|>"], num_workers=2)
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    words = random.Random(0).choices([f" word{number}" for number in range(10_000)], k=500_000)
    text = "".join(words) + "<|endoftext|>"
    peaks = []
    for times in (1, 10):
        path = tmp_path / "text.txt"
        path.write_text(text * times, encoding="utf-8")
        command = [sys.executable, "-c", program, path]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout) / 1024)
    assert peaks[1] - peaks[0] < 10, (
        f"{peaks[0]:.0f} MB for {len(text) / 1e6:.0f} MB, {peaks[1]:.0f} MB for ten times that"
    )
