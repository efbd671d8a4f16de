"""Prompts are encoded by the tokenizer's defaults; texts end where a stop string is complete."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from cs336_alignment.policy.tiny_model import byte_tokenizer
from cs336_alignment.rollouts.engines.completion_text import CompletionText, encode_prompts, end_of_sequence_ids

TOKENIZER = byte_tokenizer()


def feed(token_ids, **options):
    """Append tokens until a stop string ends the text. Returns it, and the number of tokens (None: it never ended)."""
    text = CompletionText(TOKENIZER, TOKENIZER("Q:").input_ids, **options)
    for count, token_id in enumerate(token_ids, start=1):
        if text.append(token_id):
            return text.text, count
    return text.text, None


@given(
    st.text("ab<>", max_size=30),
    st.lists(st.text("ab<>", min_size=1, max_size=4), max_size=3),
    st.integers(0, 12),
)
def test_ends_at_the_first_token_that_completes_a_stop_string(text, stop, min_tokens):
    # Each character is a token, so that a stop string always ends with a token.
    expected = next(
        (count for count in range(min_tokens + 1, len(text) + 1) if text[:count].endswith(tuple(stop))), None
    )
    assert feed(TOKENIZER(text).input_ids, stop=tuple(stop), min_tokens=min_tokens) == (text[:expected], expected)


@pytest.mark.parametrize("tag", ["</answer>", "</ans", "nswer", "9</a", "</answer"])
def test_text_is_cut_after_a_stop_string_inside_a_token(tag):
    token_ids = TOKENIZER("49</answer>7").input_ids
    assert len(token_ids) == 4
    whole = "49</answer>"
    assert feed(token_ids, stop=(tag,)) == (whole[: whole.index(tag) + len(tag)], 3)


def test_the_stop_string_that_is_complete_first_counts():
    (token,) = TOKENIZER("</answer>").input_ids
    assert feed([token], stop=("answer", "</an", ">")) == ("</an", 1)


# Hypothesis also tries the literals that it finds in the code, and special tokens, which leave no text, are among them.
without_special_tokens = st.text(max_size=40).filter(
    lambda text: not any(token in text for token in TOKENIZER.all_special_tokens)
)


@given(without_special_tokens)
def test_characters_of_several_bytes_appear_whole(text):
    token_ids = TOKENIZER(text).input_ids
    whole = CompletionText(TOKENIZER, [0])
    for token_id in token_ids:
        whole.append(token_id)
        assert text.startswith(whole.text)
    assert whole.text == text


def test_stop_strings_of_several_bytes():
    assert feed(TOKENIZER("a é!").input_ids, stop=("é",)) == ("a é", 4)


def test_special_tokens_leave_no_text():
    assert feed([*TOKENIZER("a").input_ids, TOKENIZER.eos_token_id, *TOKENIZER("b").input_ids]) == ("ab", None)


def test_prompts_are_encoded_as_the_tokenizer_does():
    prompts = ["User: 1+1=?", "é", "<think> 2"]
    assert encode_prompts(TOKENIZER, prompts, 100) == [TOKENIZER(prompt)["input_ids"] for prompt in prompts]
    assert encode_prompts(TOKENIZER, [], 100) == []


def test_prompts_that_do_not_fit_are_refused():
    assert encode_prompts(TOKENIZER, ["x" * 7], 8) == [TOKENIZER("x" * 7).input_ids]
    with pytest.raises(ValueError, match=r"prompt 1 has 8 tokens, but the model's context is 8.*shorten the prompt"):
        encode_prompts(TOKENIZER, ["x", "x" * 8], 8)
    with pytest.raises(ValueError, match="prompt 2 is empty"):
        encode_prompts(TOKENIZER, ["x", "y", ""], 8)


@pytest.mark.parametrize(("named", "more"), [(None, []), (5, [5]), ([1, 5, 7], [5, 7])])
def test_ends_are_the_tokenizers_and_the_generation_configs(named, more):
    expected = {TOKENIZER.eos_token_id, *more}
    assert end_of_sequence_ids(TOKENIZER, GenerationConfig(eos_token_id=named)) == expected
    assert end_of_sequence_ids(TOKENIZER, None) == {TOKENIZER.eos_token_id}
