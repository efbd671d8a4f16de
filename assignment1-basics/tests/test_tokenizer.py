"""Encoding and decoding against tiktoken, Hugging Face and a textbook encoder, with a tokenizer trained here."""

import io
import os
import pickle
import random
import subprocess
import sys
import sysconfig
import unicodedata
from itertools import count, islice, pairwise
from pathlib import Path

import pytest
import regex
import tiktoken
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cs336_basics.bpe import train_bpe, train_bpe_from_counts
from cs336_basics.tokenizer import Tokenizer

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
END = "<|endoftext|>"
SPECIALS = [END, "<|名 é|>", "<| pad\n|>"]
OVERLAPPING = [*SPECIALS, END + END, "|>x", "<|end"]
DATA = os.environ.get("CS336_REFERENCE_DATA")
needs_data = pytest.mark.skipif(
    not DATA, reason="CS336_REFERENCE_DATA does not name a folder with GPT-2's files and texts"
)

# Unassigned code points are left out: each library follows a Unicode version of its own.
assigned_text = st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=60)
fragments = st.sampled_from(
    [
        *("'", "'s", "'ll", "'ve", "'l", " the", "the", "def ", "self", "return", "import", "x", "é", "ß"),
        *("0", "12", "3.14", "²", " ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "\x1c", "\x85", "\u00a0", "\u3000"),
        *("漢字", "名", "。", "🙂", "👩\u200d👩", "e\u0301", "Größe", "!", "...", "==", "((", '"""', "http://", "a_b"),
    ]
)
# Hypothesis also tries the literals that it finds in the code, and special tokens are among them.
plain_text = (assigned_text | st.lists(fragments, max_size=30).map("".join)).filter(
    lambda text: not any(special in text for special in SPECIALS)
)
special_pieces = st.sampled_from([*OVERLAPPING, "<|", "|>", "<|endof", "text|>", "<|名", " é|>", "<| pad", "x"])
text_with_specials = st.lists(special_pieces | fragments | assigned_text, max_size=15).map("".join)


def encode_by_the_textbook(tokenizer, word):
    """Join all occurrences of the pair that was learned first, again and again."""
    ranks = {pair: rank for rank, pair in enumerate(tokenizer.merges)}
    tokens = [bytes([byte]) for byte in word.encode()]
    while pairs := [pair for pair in pairwise(tokens) if pair in ranks]:
        best = min(pairs, key=ranks.__getitem__)
        joined, position = [], 0
        while position < len(tokens):
            width = 2 if tuple(tokens[position : position + 2]) == best else 1
            joined.append(b"".join(tokens[position : position + width]))
            position += width
        tokens = joined
    ids = {token: id for id, token in tokenizer.vocab.items()}
    return [ids[token] for token in tokens]


def tiktoken_of(tokenizer):
    specials = {token: tokenizer.token_to_id[token.encode()] for token in tokenizer.special_tokens}
    ranks = {token: id for id, token in tokenizer.vocab.items() if id not in specials.values()}
    return tiktoken.Encoding("ours", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def hugging_face_of(tokenizer):
    printable = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}

    def spell(token):
        return token if token in tokenizer.special_tokens else "".join(alphabet[byte] for byte in token)

    specials = {token.encode(): token for token in tokenizer.special_tokens}
    vocab = {specials.get(token) or spell(token): id for id, token in tokenizer.vocab.items()}
    merges = [(spell(left), spell(right)) for left, right in tokenizer.merges]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.add_special_tokens(tokenizer.special_tokens)
    return theirs


@pytest.fixture(scope="session")
def library_text():
    """2 MB of the standard library's sources: the separator between files, and some text beyond ASCII."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for name in ("asyncio", "email", "json", "unittest") for path in (folder / name).rglob("*.py"))
    beyond_ascii = "Die Größe der Straße: 3½ Meter, naïve café, 漢字 仮名。 🙂🙂 привет мир\n" * 20
    return END.join([beyond_ascii, *(path.read_text(encoding="utf-8") for path in paths)])


@pytest.fixture(scope="session")
def trained(tmp_path_factory, library_text):
    path = tmp_path_factory.mktemp("library") / "library.txt"
    path.write_text(library_text, encoding="utf-8", newline="")
    return train_bpe(path, 3000, [END])


@pytest.fixture(scope="session")
def tokenizer(trained):
    return Tokenizer(*trained, SPECIALS)


@pytest.fixture(scope="session")
def overlapping(trained):
    return Tokenizer(*trained, OVERLAPPING)


@pytest.fixture(scope="session")
def runs_tokenizer():
    """Merges learned from words over two letters: overlapping pairs and long tokens."""
    rng = random.Random(1)
    words = {bytes(rng.choices(b"ab", k=rng.randrange(2, 30))): rng.randrange(1, 5) for _ in range(200)}
    return Tokenizer(*train_bpe_from_counts(words, 400))


@pytest.fixture(scope="session")
def as_tiktoken(tokenizer):
    return tiktoken_of(tokenizer)


@pytest.fixture(scope="session")
def as_hugging_face(tokenizer):
    return hugging_face_of(tokenizer)


@settings(deadline=None, max_examples=1000)
@given(text=plain_text)
def test_encode_equals_tiktoken_and_hugging_face_and_decodes_to_the_text(tokenizer, as_tiktoken, as_hugging_face, text):
    ids = tokenizer.encode(text)
    assert ids == as_tiktoken.encode_ordinary(text)
    assert ids == as_hugging_face.encode(text).ids
    assert tokenizer.decode(ids) == text


@settings(deadline=None, max_examples=700)
@given(text=text_with_specials)
def test_encode_with_special_tokens_equals_tiktoken_and_hugging_face(tokenizer, as_tiktoken, as_hugging_face, text):
    ids = tokenizer.encode(text)
    assert ids == as_tiktoken.encode(text, allowed_special="all")
    assert ids == as_hugging_face.encode(text).ids
    assert tokenizer.decode(ids) == text


@pytest.fixture(scope="session")
def overlapping_as_hugging_face(overlapping):
    return hugging_face_of(overlapping)


@settings(deadline=None, max_examples=400)
@given(text=text_with_specials)
@example(text=END + END + END)
def test_encode_with_overlapping_special_tokens_equals_hugging_face(overlapping, overlapping_as_hugging_face, text):
    ids = overlapping.encode(text)
    assert ids == overlapping_as_hugging_face.encode(text).ids
    assert overlapping.decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(text=st.text())
def test_decoding_gives_back_any_text_even_of_unassigned_characters(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(text=plain_text)
def test_encode_equals_the_textbook_encoder(tokenizer, text):
    expected = [id for word in regex.findall(PATTERN, text) for id in encode_by_the_textbook(tokenizer, word)]
    assert tokenizer.encode(text) == expected


def test_encode_of_real_text_equals_tiktoken_and_hugging_face(tokenizer, as_tiktoken, as_hugging_face, library_text):
    ids = tokenizer.encode(library_text)
    assert ids == as_tiktoken.encode(library_text, allowed_special="all")
    assert ids == as_hugging_face.encode(library_text).ids
    assert len(ids) < len(library_text.encode()) / 2.5


@settings(deadline=None, max_examples=200)
@given(word=st.text("ab", min_size=1, max_size=200) | st.text("ab", min_size=60, max_size=70))
@example(word="a" * 64)
@example(word="a" * 65)
@example(word="ab" * 33)
def test_long_words_of_few_letters_equal_the_textbook_encoder(runs_tokenizer, word):
    assert runs_tokenizer.encode(word) == encode_by_the_textbook(runs_tokenizer, word)


@settings(deadline=None, max_examples=150)
@given(word=st.lists(st.sampled_from(["e", "s", "t", "self", "tion", "return", "é", "漢字"]), min_size=30, max_size=80))
def test_words_longer_than_64_bytes_equal_the_textbook_encoder_and_tiktoken(tokenizer, as_tiktoken, word):
    word = "".join(word)
    ids = tokenizer.encode(word)
    assert ids == encode_by_the_textbook(tokenizer, word)
    assert ids == as_tiktoken.encode_ordinary(word)


@pytest.mark.parametrize("kind", ["one letter", "random letters", "spaces", "no-break spaces", "symbols"])
def test_pretokens_of_100_000_characters_equal_tiktoken(tokenizer, as_tiktoken, kind):
    rng = random.Random(2)
    text = {
        "one letter": "a" * 100_000,
        "random letters": "".join(rng.choices("etaoinshrdlu", k=100_000)),
        "spaces": " " * 100_000,
        "no-break spaces": "\u00a0" * 100_000,
        "symbols": "".join(rng.choices("=-#_()", k=100_000)),
    }[kind]
    assert tokenizer.encode(text) == as_tiktoken.encode_ordinary(text)


def test_the_longest_special_token_wins(trained):
    ours = Tokenizer(*trained, [END, END + END])
    one, two = (ours.token_to_id[token.encode()] for token in (END, END + END))
    assert ours.encode(END * 5) == [two, two, one]
    assert ours.encode(f"{END} {END}") == [one, *ours.encode(" "), one]
    assert Tokenizer(*trained, [END + END, END]).decode([two, one]) == END * 3


def test_special_tokens_that_are_not_listed_are_ordinary_text(trained):
    vocab, merges = trained
    end = next(id for id, token in vocab.items() if token == END.encode())
    for special_tokens in (None, [], ["<|other|>"]):
        ours = Tokenizer(vocab, merges, special_tokens)
        words = regex.findall(PATTERN, END)
        assert ours.encode(END) == [id for word in words for id in encode_by_the_textbook(ours, word)]
        assert end not in ours.encode(f"a{END}b")
        assert ours.decode([end]) == END


def test_special_tokens_that_the_vocabulary_lacks_are_appended_once_in_order(trained):
    vocab, merges = trained
    before = dict(vocab)
    ours = Tokenizer(vocab, merges, ["<|b|>", END, "<|a|>", "<|b|>"])
    assert {id: token for id, token in ours.vocab.items() if id not in before} == {3000: b"<|b|>", 3001: b"<|a|>"}
    assert ours.encode("<|a|><|b|>") == [3001, 3000]
    assert vocab == before


def test_appended_ids_follow_the_greatest_id_of_a_vocabulary_with_gaps():
    ours = Tokenizer({7: b"a", 300: b"b", 2: b"ab"}, [(b"a", b"b")], ["<|e|>"])
    assert ours.encode("ab<|e|>ba") == [2, 301, 300, 7]


def test_an_empty_special_token_is_refused(trained):
    with pytest.raises(ValueError, match="empty"):
        Tokenizer(*trained, ["<|e|>", ""])


def test_nothing_encodes_to_nothing(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.decode([]) == ""
    assert list(tokenizer.encode_iterable([])) == []
    assert list(tokenizer.encode_iterable(["", ""])) == []
    assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("unknown", [3002, 10**9, -1])
def test_decoding_an_unknown_id_names_it(tokenizer, unknown):
    assert max(tokenizer.vocab) == 3001
    with pytest.raises(ValueError, match=rf"(?<!\S){unknown}\b"):
        tokenizer.decode([65, unknown, 66])


@pytest.mark.parametrize("broken", [b"\xff", b"a\xe2\x82", b"\x80\x80", b"\xf0\x9f\x99 \xc3\xa9", b"\xed\xa0\x80"])
def test_decoding_bytes_that_are_not_utf8_gives_replacement_characters(tokenizer, broken):
    ids = [tokenizer.token_to_id[bytes([byte])] for byte in broken]
    assert tokenizer.decode(ids) == broken.decode("utf-8", errors="replace")
    assert tokenizer.decode_bytes(ids) == broken


def test_characters_split_over_tokens_are_decoded_whole(tokenizer):
    ids = [tokenizer.token_to_id[bytes([byte])] for byte in "🙂語".encode()]
    assert tokenizer.decode(ids) == "🙂語"
    assert tokenizer.decode(iter(ids)) == "🙂語"


@pytest.mark.parametrize("num_workers", [1, 3])
def test_encode_batch_equals_encode(tokenizer, library_text, num_workers):
    texts = [*library_text[:200_000].split("\n\n"), "", "漢字", f"a{END}b", "x" * 1000]
    assert tokenizer.encode_batch(iter(texts), num_workers) == [tokenizer.encode(text) for text in texts]


def test_a_pickled_tokenizer_is_the_same(overlapping):
    text = f"Größe 漢字{END}{END} self.assertEqual(1, 2)<|名 é|>"
    ids = overlapping.encode(text)
    copy = pickle.loads(pickle.dumps(overlapping))
    assert copy.encode(text) == ids
    assert copy.decode(ids) == text
    assert (copy.vocab, copy.merges, copy.special_tokens) == (
        overlapping.vocab,
        overlapping.merges,
        overlapping.special_tokens,
    )


@pytest.mark.parametrize("text", ["abc", "ab" * 40 + "c", "é"])
def test_a_byte_that_the_vocabulary_lacks_is_an_error_when_met(text):
    ours = Tokenizer({0: b"a", 1: b"b", 2: b"ab"}, [(b"a", b"b")])
    assert ours.encode("abba") == [2, 1, 0]
    with pytest.raises(ValueError, match=r"byte b'(c|\\xc3)'"):
        ours.encode(text)


@pytest.mark.parametrize("merge", [(b"a", b"x"), (b"x", b"a"), (b"b", b"a")])
def test_a_merge_of_tokens_that_the_vocabulary_lacks_is_an_error(merge):
    with pytest.raises(ValueError, match="not in the vocabulary"):
        Tokenizer({0: b"a", 1: b"b", 2: b"ab"}, [(b"a", b"b"), merge])


def test_the_first_of_repeated_merges_counts():
    vocab = {0: b"a", 1: b"b", 2: b"c", 3: b"ab", 4: b"bc"}
    ours = Tokenizer(vocab, [(b"a", b"b"), (b"b", b"c"), (b"a", b"b")])
    assert ours.encode("abc") == [3, 2]
    assert ours.encode("abc" * 30) == [3, 2] * 30


def test_the_word_cache_may_overflow_at_any_time(trained, library_text, monkeypatch):
    monkeypatch.setattr("cs336_basics.tokenizer.CACHED_WORDS", 3)
    text = library_text[:20_000]
    ours = Tokenizer(*trained, SPECIALS)
    assert ours.encode(text) == tiktoken_of(ours).encode(text, allowed_special="all")


@settings(deadline=None, max_examples=400)
@given(text=text_with_specials | plain_text, places=st.lists(st.integers(0, 1000), max_size=10))
@example(text=END + END, places=[5, 13, 20])
@example(text="a  b\n\n c", places=[2, 5, 6])
def test_encode_iterable_of_any_pieces_equals_encode_of_the_whole(overlapping, text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    ids = overlapping.encode(text)
    assert list(overlapping.encode_iterable(text[start:end] for start, end in pairwise(edges))) == ids
    assert list(overlapping.encode_iterable(text)) == ids
    assert list(overlapping.encode_iterable(io.StringIO(text, newline=""))) == ids


@settings(deadline=None, max_examples=300)
@given(text=text_with_specials, size=st.integers(1, 30), chunk_chars=st.integers(1, 40))
@example(text="\n\n!漢字", size=1, chunk_chars=1)
def test_encode_iterable_equals_encode_when_it_holds_few_characters(overlapping, text, size, chunk_chars):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cs336_basics.tokenizer.STREAM_CHARS", chunk_chars)
        pieces = (text[start : start + size] for start in range(0, len(text), size))
        assert list(overlapping.encode_iterable(pieces)) == overlapping.encode(text)


@pytest.mark.parametrize("size", [1, 7, 1000, 100_000])
def test_encode_iterable_of_real_text_equals_encode(tokenizer, library_text, size):
    text = library_text[:300_000]
    pieces = (text[start : start + size] for start in range(0, len(text), size))
    assert list(tokenizer.encode_iterable(pieces)) == tokenizer.encode(text)


def test_encode_iterable_of_an_open_file_equals_encode(tokenizer, library_text, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(library_text[:300_000], encoding="utf-8", newline="")
    with open(path, encoding="utf-8", newline="") as file:
        assert list(tokenizer.encode_iterable(file)) == tokenizer.encode(library_text[:300_000])


def test_encode_iterable_never_tokenizes_white_space_apart_from_the_word_that_follows(tokenizer):
    text = "\n\n" + "a" * 9000 + "!"
    assert list(tokenizer.encode_iterable([text])) == tokenizer.encode(text)


def endless_lines():
    for number in count():
        assert number < 2000, "read far ahead of the ids that were asked for"
        yield f"line number {number}\n"


def test_encode_iterable_is_lazy_on_an_endless_stream(tokenizer):
    ids = list(islice(tokenizer.encode_iterable(endless_lines()), 1000))
    assert tokenizer.decode(ids).startswith("line number 0\nline number 1\nline number 2\n")


STREAM = """
import random, resource, sys
from pathlib import Path
from cs336_basics.tokenizer import Tokenizer

assert "torch" not in sys.modules
folder = Path(sys.argv[1])
tokenizer = Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt", ["<|endoftext|>"])
known = (folder / "known.txt").read_text(encoding="utf-8")
rng = random.Random(0)
letters = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=300_000))

def lines(size, new_words):
    made = 0
    while made < size:
        start = rng.randrange(len(known) - 2000)
        words = [known[start : start + 2000]]
        for _ in range(new_words):
            at = rng.randrange(len(letters) - 12)
            words.append(letters[at : at + rng.randrange(5, 12)])
        line = " ".join(words) + "\\n"
        made += len(line)
        yield line

def stream(size, new_words):
    return sum(1 for _ in tokenizer.encode_iterable(lines(size, new_words)))

stream(20_000_000, new_words=40)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 1_000_000
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
print(stream(100_000_000, new_words=10))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces a limit on the address space")
def test_encode_iterable_takes_constant_memory(trained, library_text, tmp_path):
    Tokenizer(*trained, [END]).save(tmp_path)
    (tmp_path / "known.txt").write_text(library_text[-300_000:], encoding="utf-8")
    result = subprocess.run([sys.executable, "-c", STREAM, tmp_path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 20_000_000


@pytest.fixture(scope="module")
def gpt2():
    folder = Path(DATA) / "tokenizers" / "gpt2"
    return Tokenizer.from_files(folder / "gpt2_vocab.json", folder / "gpt2_merges.txt", [END])


@pytest.fixture(scope="module")
def tiktoken_gpt2():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(Path(DATA) / "tokenizers" / "tiktoken_cache"))
        yield tiktoken.get_encoding("gpt2")


@needs_data
def test_gpt2_has_tiktokens_vocabulary(gpt2, tiktoken_gpt2):
    assert len(gpt2.vocab) == tiktoken_gpt2.n_vocab == 50_257
    assert all(tiktoken_gpt2.decode_single_token_bytes(id) == token for id, token in gpt2.vocab.items())


@needs_data
@pytest.mark.parametrize(
    "name", ["tinystories/tinystories_valid.txt", "wikipedia/wikipedia_en_valid.txt", "novels/novels_valid.txt"]
)
def test_gpt2_equals_tiktoken_on_every_document(gpt2, tiktoken_gpt2, name):
    text = (Path(DATA) / name).read_bytes().decode()
    ids = gpt2.encode(text)
    assert ids == tiktoken_gpt2.encode(text, allowed_special="all")
    assert list(gpt2.encode_iterable(text.splitlines(keepends=True))) == ids
    assert gpt2.decode(ids) == text
    for document in text.split(END):
        assert gpt2.encode(document) == tiktoken_gpt2.encode_ordinary(document)


@needs_data
@settings(deadline=None, max_examples=2500)
@given(texts=st.tuples(assigned_text, plain_text, text_with_specials, st.text("aeinrst '\n0漢é", max_size=100)))
def test_gpt2_equals_tiktoken_on_10_000_texts(gpt2, tiktoken_gpt2, texts):
    for text in texts:
        assert gpt2.encode(text) == tiktoken_gpt2.encode(text, allowed_special="all")


@needs_data
@pytest.mark.parametrize("unit", ["a", " ", "=", "ab", "\n", "🙂", "the", "\u00a0"])
def test_gpt2_equals_tiktoken_on_long_runs(gpt2, tiktoken_gpt2, unit):
    text = unit * 5000
    assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)


@needs_data
def test_gpt2_equals_tiktoken_on_every_assigned_character(gpt2, tiktoken_gpt2):
    characters = [char for char in map(chr, range(0x110000)) if unicodedata.category(char) not in ("Cs", "Cn", "Co")]
    for start in range(0, len(characters), 1000):
        text = "".join(f"{char}a {char}1{char}" for char in characters[start : start + 1000])
        assert gpt2.encode(text) == tiktoken_gpt2.encode_ordinary(text)
