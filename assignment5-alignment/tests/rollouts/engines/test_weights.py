"""Weights of another architecture are refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cs336_alignment.rollouts.engines.weights import WeightCheck

SIZES = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def model(request):
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=request.param))


def test_the_models_own_weights_fit(model):
    for check in (WeightCheck(model), WeightCheck.of_architecture(model.config)):
        check(model.state_dict())
        check({name: weight.clone().to(torch.bfloat16) for name, weight in model.state_dict().items()})


def test_a_tied_weight_may_be_missing_and_must_not_differ():
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True))
    check = WeightCheck.of_architecture(model.config)
    weights = model.state_dict()
    complete = check({name: weight for name, weight in weights.items() if name != "lm_head.weight"})
    assert complete.keys() == weights.keys()
    assert complete["lm_head.weight"] is complete["model.embed_tokens.weight"]
    weights["lm_head.weight"] = weights["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head.weight and model.embed_tokens.weight differ"):
        check(weights)


def test_an_output_layer_of_its_own_must_be_there():
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=False))
    weights = model.state_dict()
    del weights["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lm_head.weight is missing \(1 in all\)"):
        WeightCheck(model)(weights)


def test_other_names_and_shapes_are_refused(model):
    check = WeightCheck(model)
    with pytest.raises(ValueError, match=r"module.model.embed_tokens.weight is unknown|is missing"):
        check({f"module.{name}": weight for name, weight in model.state_dict().items()})
    with pytest.raises(ValueError, match=r"extra is unknown \(1 in all\)"):
        check({**model.state_dict(), "extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(17,\), but the engine's has \(16,\)"):
        check({**model.state_dict(), "model.norm.weight": torch.zeros(17)})
    with pytest.raises(ValueError, match=r"q_proj.bias is missing"):
        check(LlamaForCausalLM(LlamaConfig(**SIZES)).state_dict())


def test_a_configuration_alone_allocates_nothing():
    huge = Qwen2Config(**{**SIZES, "hidden_size": 1 << 14, "vocab_size": 1 << 20})  # 64 GB of embeddings
    with pytest.raises(ValueError, match="is missing"):
        WeightCheck.of_architecture(huge)({})
