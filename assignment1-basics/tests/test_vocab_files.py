"""Vocabulary and merge files: GPT-2's byte alphabet, round trips, and exchange with Hugging Face in both directions."""

import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import ByteLevelBPETokenizer
from tokenizers.pre_tokenizers import ByteLevel

from cs336_basics.bpe import train_bpe
from cs336_basics.tokenizer import Tokenizer
from cs336_basics.vocab_files import load_merges, load_vocab, save_merges, save_vocab, text_to_token, token_to_text

END = "<|endoftext|>"
fast = settings(deadline=None, max_examples=200)
tokens = st.binary(min_size=1, max_size=6)
texts = st.lists(
    st.sampled_from(["the ", "self.", "import", "def", "\n\n", "    ", "\r\n", "Größe", "漢字", "🙂", "'ll", "12", " "])
    | st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=8),
    max_size=15,
).map("".join)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("files")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    library = Path(sysconfig.get_path("stdlib"))
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    sources = [source.read_text(encoding="utf-8") for source in sorted((library / "json").glob("*.py"))]
    path.write_text(END.join([*sources, "Größe 漢字 🙂\n" * 9]), encoding="utf-8", newline="")
    return path


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return Tokenizer(*train_bpe(corpus, 700, [END]), [END])


def test_every_byte_is_written_as_the_character_that_gpt2_uses():
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in kept]
    assert len(moved) == 68
    expected = {byte: chr(byte) for byte in kept} | {byte: chr(0x100 + n) for n, byte in enumerate(moved)}
    assert {byte: token_to_text(bytes([byte])) for byte in range(256)} == expected
    assert set(expected.values()) == set(ByteLevel.alphabet())


@pytest.mark.parametrize(
    ("token", "text"),
    [(b" the", "Ġthe"), (b"\n\t", "Ċĉ"), (b" caf\xc3\xa9", "ĠcafÃ©"), (b"\xad\xa0\x7f", "Ńłġ"), (b"", "")],
)
def test_known_spellings(token, text):
    assert token_to_text(token) == text
    assert text_to_token(text) == token


@fast
@given(st.text(min_size=1, max_size=20))
def test_spelling_agrees_with_hugging_face(text):
    theirs = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert token_to_text(text.encode()) == "".join(piece for piece, _ in theirs)


@fast
@given(st.binary(max_size=20))
def test_text_to_token_inverts_token_to_text(token):
    assert text_to_token(token_to_text(token)) == token


@pytest.mark.parametrize("text", ["<|end of text|>", "<|結束|>", "<|🙂|>", "a\nb"])
def test_special_tokens_with_characters_outside_the_alphabet_stand_for_themselves(text):
    assert text_to_token(text) == text.encode()


@fast
@given(known=st.lists(tokens, unique=True), merges=st.lists(st.tuples(tokens, tokens)))
def test_files_give_back_any_tokens_and_merges(folder, known, merges):
    vocab = {7 * number + 3: token for number, token in enumerate(known)}
    save_vocab(vocab, folder / "vocab.json")
    save_merges(merges, folder / "merges.txt")
    assert load_vocab(folder / "vocab.json") == vocab
    assert load_merges(folder / "merges.txt") == merges


def test_files_look_as_gpt2s_do(folder):
    save_vocab({0: b" a", 1: b"\n", 2: "é".encode()}, folder / "vocab.json")
    save_merges([(b" ", b"a"), (b"\xc3", b"\xa9")], folder / "merges.txt")
    assert json.loads((folder / "vocab.json").read_text(encoding="utf-8")) == {"Ġa": 0, "Ċ": 1, "Ã©": 2}
    assert (folder / "merges.txt").read_bytes().decode() == "#version: 0.2\nĠ a\nÃ ©\n"


@pytest.mark.parametrize("head", ["", "#version: 0.2\n", "#version: 0.2 - Trained by `huggingface/tokenizers`\n"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_merges_are_read_with_and_without_version_line(folder, head, newline, end):
    text = f"{head}Ġ t\n#version :\n# #{end}".replace("\n", newline)
    (folder / "merges.txt").write_bytes(text.encode())
    assert load_merges(folder / "merges.txt") == [(b" ", b"t"), (b"#version", b":"), (b"#", b"#")]


@pytest.mark.parametrize("line", ["alone", "a b c", "a  b", " a", "a "])
def test_a_line_that_is_no_merge_is_named(folder, line):
    (folder / "merges.txt").write_text(f"#version: 0.2\na b\n{line}\nc d\n")
    with pytest.raises(ValueError, match=r"merges\.txt, line 3\b"):
        load_merges(folder / "merges.txt")


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b'"a"', b"3", b'{"a": "0"}', b'{"a": 1.5}', b'{"a": null}', b"\xff"]
)
def test_a_file_that_is_no_vocabulary_is_named(folder, content):
    (folder / "vocab.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"vocab\.json is not a vocabulary"):
        load_vocab(folder / "vocab.json")


def test_missing_files_are_reported(folder):
    with pytest.raises(FileNotFoundError):
        load_vocab(folder / "nothing.json")
    with pytest.raises(FileNotFoundError):
        load_merges(folder / "nothing.txt")


@pytest.mark.parametrize(
    "specials", [[], [END], [END, END + END], ["<|é|>"], ["<|結束|>", "<| pad\r\n|>", "<|🙂|>", "Ġx"]], ids=ascii
)
def test_a_saved_tokenizer_loads_and_encodes_as_before(corpus, tmp_path, specials):
    before = Tokenizer(*train_bpe(corpus, 600, specials), specials)
    before.save(tmp_path / "new" / "folder")
    files = (tmp_path / "new" / "folder" / "vocab.json", tmp_path / "new" / "folder" / "merges.txt")
    after = Tokenizer.from_files(*files, specials)
    assert (after.vocab, after.merges) == (before.vocab, before.merges)
    text = "".join(f"{special} Größe, self.x 漢字\n{special}" for special in [*specials, ""])
    assert after.encode(text) == before.encode(text)
    assert after.decode(before.encode(text)) == text


def test_special_tokens_that_were_appended_are_saved(tokenizer, tmp_path):
    before = Tokenizer(tokenizer.vocab, tokenizer.merges, [END, "<|ü|>", "<|b c|>"])
    before.save(tmp_path)
    after = Tokenizer.from_files(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), before.special_tokens)
    assert after.vocab == before.vocab
    assert after.encode("<|ü|><|b c|>") == [700, 701]


@pytest.fixture(scope="module")
def loaded_by_hugging_face(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    tokenizer.save(folder)
    theirs = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    theirs.add_special_tokens([END])
    return theirs


@fast
@given(text=texts, separator=st.sampled_from(["", END]))
def test_hugging_face_loads_our_files_and_encodes_alike(tokenizer, loaded_by_hugging_face, text, separator):
    text = f"{text}{separator}x{text}"
    assert loaded_by_hugging_face.encode(text).ids == tokenizer.encode(text)


@pytest.fixture(scope="module")
def trained_by_hugging_face(corpus):
    theirs = ByteLevelBPETokenizer()
    theirs.train([str(corpus)], vocab_size=600, special_tokens=[END, "<|結束|>"], show_progress=False)
    return theirs


@pytest.fixture(scope="module")
def loaded_from_hugging_face(trained_by_hugging_face, tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs")
    trained_by_hugging_face.save_model(str(folder))
    return Tokenizer.from_files(folder / "vocab.json", folder / "merges.txt", [END, "<|結束|>"])


@fast
@given(text=texts, special=st.sampled_from(["", END, "<|結束|>"]))
def test_we_load_files_of_hugging_face_and_encode_alike(
    loaded_from_hugging_face, trained_by_hugging_face, text, special
):
    text = f"{text}{special}x{text}"
    ids = loaded_from_hugging_face.encode(text)
    assert ids == trained_by_hugging_face.encode(text).ids
    assert loaded_from_hugging_face.decode(ids) == text
    assert len(loaded_from_hugging_face.vocab) == trained_by_hugging_face.get_vocab_size()


@pytest.mark.parametrize("special", ["<|é|>", "<|Ġ|>", "<|ü ü|>"])
def test_special_tokens_in_latin_letters_keep_their_ids_in_files_of_hugging_face(corpus, tmp_path, special):
    theirs = ByteLevelBPETokenizer()
    theirs.train([str(corpus)], vocab_size=300, special_tokens=[special], show_progress=False)
    theirs.save_model(str(tmp_path))
    ours = Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", [special])
    assert ours.encode(f"a{special}b") == theirs.encode(f"a{special}b").ids
    assert len(ours.vocab) == theirs.get_vocab_size()


@pytest.mark.parametrize("special", ["<|é|>", "<|結束|>", "<|b c|>"])
def test_hugging_face_finds_our_special_tokens_beyond_plain_ascii(corpus, tmp_path, special):
    ours = Tokenizer(*train_bpe(corpus, 300, [special]), [special])
    ours.save(tmp_path)
    theirs = ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    theirs.add_special_tokens([special])
    assert theirs.encode(f"a{special}b").ids == ours.encode(f"a{special}b")
