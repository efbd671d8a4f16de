"""Tiny models and their byte-level tokenizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from cs336_alignment.policy.loading import (
    load_model,
)
from cs336_alignment.policy.tiny_model import TAGS, byte_tokenizer, make_tiny_model

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@given(st.text())
def test_bytes_come_back_unchanged(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@given(st.lists(st.sampled_from([*TAGS, " ", "7", "<", "think>", "\n", "</"]), max_size=12).map("".join))
def test_tags_come_back_unchanged(text):
    token_ids = TOKENIZER(text).input_ids
    assert TOKENIZER.decode(token_ids) == TOKENIZER.decode(token_ids, skip_special_tokens=True) == text
    assert len(token_ids) == len(text) - sum(text.count(tag) * (len(tag) - 1) for tag in TAGS)


def test_a_trace_is_short_and_exact():
    response = " 3 + 4 = 7 </think> <answer> 7 </answer>"
    token_ids = TOKENIZER(response).input_ids
    assert len(token_ids) == len(" 3 + 4 = 7 ") + 3 + len("  7 ")
    assert TOKENIZER.decode(token_ids) == response


def test_a_tiny_model_is_what_was_asked_for(tmp_path):
    path = make_tiny_model(
        tmp_path / "new" / "tiny", hidden_size=96, layers=3, context_length=77, initializer_range=0.5
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.config.hidden_size == 96
    assert model.config.num_attention_heads == 3
    assert model.config.num_hidden_layers == 3
    assert model.config.max_position_embeddings == 77
    assert model.config.vocab_size == len(tokenizer) == 262
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert "lm_head.weight" not in load_names(path)
    assert tokenizer("é <think>").input_ids == TOKENIZER("é <think>").input_ids


def load_names(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_seeds_make_tiny_models(tmp_path, folder):
    state = torch.get_rng_state()
    weights = [
        load_model(make_tiny_model(tmp_path / str(number), seed), "cpu").state_dict()
        for number, seed in enumerate((1, 2))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    same = load_model(folder, "cpu").state_dict()
    assert all(torch.equal(weights[0][name], weight) for name, weight in same.items())
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights[1][name], same[name])


def test_tiny_heads_have_a_fixed_size(tmp_path):
    for hidden_size in (0, 16, 80):
        with pytest.raises(ValueError, match=f"hidden_size is {hidden_size}, but must be a multiple of 32"):
            make_tiny_model(tmp_path / "tiny", hidden_size=hidden_size)
