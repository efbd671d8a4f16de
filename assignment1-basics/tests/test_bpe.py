"""BPE training against a trainer that recounts every pair before every merge."""

import json
from collections import Counter
from pathlib import Path

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cs336_basics.bpe import check_vocab_size, train_bpe, train_bpe_from_counts, train_bpe_naive

PATTERN = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
HANDOUT = {b"low": 5, b"lower": 2, b"widest": 3, b"newest": 6}
SPECIAL_SETS = [[], ["<|e|>"], ["<|e|>", "<|e|><|e|>"], ["aab", "ba"], ["é"], [" a", "b\n"]]


def ordinary_pieces(text, specials):
    """The pieces of `text` around its special tokens, found from left to right, the longest first."""
    pieces, start, position = [], 0, 0
    while position < len(text):
        found = max((token for token in specials if text.startswith(token, position)), key=len, default="")
        if found:
            pieces.append(text[start:position])
            start = position = position + len(found)
        else:
            position += 1
    return [*pieces, text[start:]]


def count_words(text, specials=()):
    return Counter(word.encode() for piece in ordinary_pieces(text, specials) for word in PATTERN.findall(piece))


def assert_consistent(vocab, merges, specials):
    first_merge = 256 + len(specials)
    assert list(vocab) == list(range(first_merge + len(merges)))
    assert [vocab[id] for id in range(256)] == [bytes([byte]) for byte in range(256)]
    assert [vocab[id] for id in range(256, first_merge)] == [token.encode() for token in specials]
    assert [vocab[first_merge + rank] for rank in range(len(merges))] == [left + right for left, right in merges]
    assert len(set(vocab.values())) == len(vocab)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tmp_path_factory.mktemp("corpus") / "corpus.txt"


@pytest.fixture(scope="module")
def english():
    """About 40 kB of prose and code from the standard library."""
    folder = Path(json.__file__).parent
    return "<|e|>".join(
        path.read_text(encoding="utf-8") for path in [folder / "__init__.py", folder / "decoder.py", folder / "tool.py"]
    )


def test_handout_example_gives_the_known_merges_and_stops_when_no_pair_is_left():
    vocab, merges = train_bpe_from_counts(HANDOUT, 1000)
    assert [f"{left.decode()} {right.decode()}" for left, right in merges] == [
        *("s t", "e st", "o w", "l ow", "w est", "n e", "ne west"),
        *("w i", "wi d", "wid est", "low e", "lowe r"),
    ]
    assert_consistent(vocab, merges, [])


@pytest.mark.parametrize("merge_count", range(13))
def test_handout_example_stops_at_the_vocabulary_size(merge_count):
    assert train_bpe_from_counts(HANDOUT, 256 + merge_count) == train_bpe_naive(HANDOUT, 256 + merge_count)
    assert len(train_bpe_from_counts(HANDOUT, 256 + merge_count)[1]) == merge_count


@pytest.mark.parametrize(
    ("counts", "first"),
    [
        ({b"ab": 1, b"ba": 1, b"aa": 1}, (b"b", b"a")),
        ({b"AB": 2, b"ab": 2, b"zz": 1}, (b"a", b"b")),
        ({b"\x7f\x80": 1, b"\x80\x00": 1}, (b"\x80", b"\x00")),
        ({"é".encode(): 3, b"zz": 3}, (b"\xc3", b"\xa9")),
        ({b"a": 9, b"xy": 1}, (b"x", b"y")),
    ],
)
def test_the_greater_pair_of_bytes_wins_a_tie(counts, first):
    assert train_bpe_from_counts(counts, 257)[1] == [first]


def test_in_a_tie_a_token_precedes_its_own_prefix_and_bytes_are_compared_before_length():
    counts = {b"ab": 9, b"ab!": 4, b"a!": 4, b"b!": 3}
    merges = train_bpe_from_counts(counts, 260)[1]
    assert merges == [(b"a", b"b"), (b"ab", b"!"), (b"a", b"!"), (b"b", b"!")]


@pytest.mark.parametrize("length", range(2, 20))
def test_runs_of_one_byte_are_joined_from_the_left_without_overlap(length):
    counts = {b"a" * length: 2, b"baa": 1}
    assert train_bpe_from_counts(counts, 300) == train_bpe_naive(counts, 300)


words = st.one_of(
    st.text("ab", min_size=1, max_size=12).map(str.encode),
    st.text("abc é漢", min_size=1, max_size=8).map(str.encode),
    st.binary(min_size=1, max_size=6),
    st.lists(st.sampled_from([0, 1, 127, 128, 255]), min_size=1, max_size=8).map(bytes),
)


@settings(deadline=None, max_examples=600)
@given(st.dictionaries(words, st.integers(1, 4), max_size=25), st.integers(0, 60))
@example({b"aaaa": 1, b"aaa": 1, b"baaab": 2}, 60)
@example({b"abababab": 1, b"bababa": 1}, 60)
def test_training_from_counts_equals_recounting(counts, merge_count):
    vocab, merges = train_bpe_from_counts(counts, 256 + merge_count)
    assert (vocab, merges) == train_bpe_naive(counts, 256 + merge_count)
    assert_consistent(vocab, merges, [])


texts = st.one_of(
    st.lists(
        st.sampled_from(
            [
                *("a", "b", "aa", "ab", "aab", "ba", " a", " ", "\n", "\r\n", "'ll", "12", "é", "漢字", "🙂"),
                *("<|e|>", "<|", "|>", "e", "b\n"),
            ]
        ),
        max_size=60,
    ).map("".join),
    st.text(max_size=40),
)


@settings(deadline=None, max_examples=300)
@given(text=texts, specials=st.sampled_from(SPECIAL_SETS), merge_count=st.integers(0, 40))
def test_training_on_a_file_equals_recounting_and_never_crosses_special_tokens(corpus, text, specials, merge_count):
    corpus.write_bytes(text.encode())
    vocab_size = 256 + len(specials) + merge_count
    vocab, merges = train_bpe(corpus, vocab_size, specials)
    counts = count_words(text, specials)
    assert (vocab, merges) == train_bpe_naive(counts, vocab_size, specials)
    assert_consistent(vocab, merges, specials)
    for left, right in merges:
        assert any(left + right in word for word in counts)


def test_training_on_real_text_equals_recounting(corpus, english):
    corpus.write_text(english, encoding="utf-8", newline="")
    expected = train_bpe_naive(count_words(english, ["<|e|>"]), 457, ["<|e|>"])
    assert train_bpe(corpus, 457, ["<|e|>"]) == expected


@pytest.mark.parametrize(("num_workers", "chunk_chars"), [(1, 313), (2, 1000), (3, 4001), (8, 2000), (None, 10**6)])
def test_result_does_not_depend_on_workers_or_chunks(corpus, english, num_workers, chunk_chars):
    corpus.write_text(english, encoding="utf-8", newline="")
    expected = train_bpe_from_counts(count_words(english, ["<|e|>"]), 1000, ["<|e|>"])
    assert train_bpe(corpus, 1000, ["<|e|>"], num_workers=num_workers, chunk_chars=chunk_chars) == expected


@pytest.mark.parametrize("text", ["", "<|e|>", "<|e|><|e|>" * 100, "a<|e|>b<|e|>c"])
def test_text_without_pairs_gives_no_merges(corpus, text):
    corpus.write_text(text)
    vocab, merges = train_bpe(corpus, 1000, ["<|e|>"])
    assert merges == []
    assert_consistent(vocab, merges, ["<|e|>"])


def test_special_tokens_contribute_nothing_even_when_they_are_most_of_the_text(corpus):
    corpus.write_text("ab" + "<|end of text|>" * 1000 + "cd")
    vocab, merges = train_bpe(corpus, 300, ["<|end of text|>"])
    assert merges == [(b"c", b"d"), (b"a", b"b")]
    assert list(vocab.values()).count(b"<|end of text|>") == 1


def test_carriage_returns_are_kept(corpus):
    corpus.write_bytes(b"a\r\n\r\n1" * 50)
    assert train_bpe(corpus, 300)[1] == [(b"\r", b"\n"), (b"\r\n", b"\r")]


def test_repeated_special_tokens_count_once(corpus):
    corpus.write_text("abab")
    vocab, merges = train_bpe(corpus, 259, ["<|e|>", "<|f|>", "<|e|>"])
    assert_consistent(vocab, merges, ["<|e|>", "<|f|>"])
    assert len(vocab) == 259
    assert check_vocab_size(258, ["<|e|>", "<|f|>", "<|e|>"]) == ["<|e|>", "<|f|>"]


@pytest.mark.parametrize("specials", [[], ["<|e|>"], ["<|e|>", "<|f|>"]])
def test_vocabulary_must_hold_bytes_and_special_tokens(corpus, specials):
    corpus.write_text("some text some text")
    smallest = 256 + len(specials)
    for vocab_size in (smallest - 1, 1, 0, -5):
        with pytest.raises(ValueError, match=str(smallest)):
            train_bpe(corpus, vocab_size, specials)
        with pytest.raises(ValueError, match=str(smallest)):
            train_bpe_from_counts({b"ab": 1}, vocab_size, specials)
    vocab, merges = train_bpe(corpus, smallest, specials)
    assert merges == []
    assert_consistent(vocab, merges, specials)


@pytest.mark.parametrize("token", ["", "a", "\n", "\x7f"])
def test_special_tokens_of_at_most_one_byte_are_refused(corpus, token):
    corpus.write_text("some text")
    with pytest.raises(ValueError, match="special token"):
        train_bpe(corpus, 300, ["<|e|>", token])
    with pytest.raises(ValueError, match="special token"):
        train_bpe_from_counts({b"ab": 1}, 300, [token])


def test_bytes_that_are_not_utf8_are_reported_or_replaced(corpus):
    corpus.write_bytes(b"good \xff bad")
    with pytest.raises(ValueError, match=r"offset 5\b"):
        train_bpe(corpus, 300)
    assert train_bpe(corpus, 300, errors="replace") == train_bpe_naive(count_words("good \ufffd bad"), 300)


def test_progress_reports_bytes_then_merges(corpus):
    corpus.write_bytes("é low low lower".encode())
    seen = []
    train_bpe(corpus, 260, progress=lambda stage, done: seen.append((stage, done)))
    assert seen == [("bytes read", 16), *(("merges", number) for number in range(1, 5))]


def test_inputs_are_left_as_they_were():
    counts, specials = {b"abab": 2, b"b": 1}, ["<|e|>", "<|e|>"]
    train_bpe_from_counts(counts, 300, specials)
    assert counts == {b"abab": 2, b"b": 1}
    assert specials == ["<|e|>", "<|e|>"]
