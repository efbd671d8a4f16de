"""The model against PyTorch's operators and against Hugging Face's Llama, which has the same architecture."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from einops import rearrange
from torch.nn import functional as F

from cs336_basics import model as model_module
from cs336_basics.model import (
    BasicsTransformerLM,
    CausalMultiHeadSelfAttention,
    Embedding,
    Linear,
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    scaled_dot_product_attention,
)
from cs336_basics.model_config import ModelConfig

TINY = ModelConfig(vocab_size=97, context_length=24, d_model=32, num_layers=3, num_heads=4, d_ff=48)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def build(**changes):
    return BasicsTransformerLM.from_config(dataclasses.replace(TINY, **changes))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3)])
def test_layers_equal_torch(leading):
    x = torch.randn(*leading, 16, dtype=torch.float64)
    linear, norm, ffn = (m.double() for m in (Linear(16, 9), RMSNorm(16, eps=1e-3), SwiGLU(16, 24)))
    with torch.no_grad():
        norm.weight.uniform_(0.5, 1.5)
    torch.testing.assert_close(linear(x), F.linear(x, linear.weight))
    torch.testing.assert_close(norm(x), F.rms_norm(x, (16,), norm.weight, 1e-3))
    gated = F.silu(F.linear(x, ffn.w1.weight)) * F.linear(x, ffn.w3.weight)
    torch.testing.assert_close(ffn(x), F.linear(gated, ffn.w2.weight))
    ids = torch.randint(11, (*leading, 4))
    embedding = Embedding(11, 16)
    torch.testing.assert_close(embedding(ids), F.embedding(ids, embedding.weight))


def test_initialisation_is_truncated_normal():
    linear, embedding = Linear(600, 400), Embedding(1000, 300)
    std = (2 / 1000) ** 0.5
    truncated = 0.98658  # the standard deviation of a unit normal cut at ±3
    assert linear.weight.abs().max() <= 3 * std
    assert linear.weight.std().item() == pytest.approx(std * truncated, rel=0.01)
    assert embedding.weight.abs().max() <= 3
    assert embedding.weight.std().item() == pytest.approx(truncated, rel=0.01)
    assert (RMSNorm(7).weight == 1).all()


def test_rmsnorm_is_computed_in_float32():
    x = torch.full((1, 64), 300.0, dtype=torch.float16)  # whose squares overflow float16
    y = RMSNorm(64, dtype=torch.float16)(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, torch.ones_like(x))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 7), (1, 17, 17)])
def test_attention_equals_torch(shape, masked):
    batch, queries, keys = shape
    q, k, v = torch.randn(batch, 3, queries, 8), torch.randn(batch, 3, keys, 8), torch.randn(batch, 3, keys, 5)
    mask = (torch.rand(batch, 1, queries, keys) < 0.6) | (torch.arange(keys) == 0) if masked else None
    expected = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), attn_mask=mask)
    if mask is not None:
        mask = mask.expand(batch, 3, queries, keys)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, mask).double(), expected, rtol=0, atol=1e-6)


def test_rope_is_a_rotation_of_complex_pairs():
    x, positions, theta = torch.randn(2, 3, 5, 8), torch.tensor([0, 1, 7, 3, 19]), 100.0
    angle = positions[:, None] / theta ** (torch.arange(0, 8, 2) / 8)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(RotaryEmbedding(20, 8, theta)(x, positions), torch.view_as_real(turned).flatten(-2))


def test_rope_positions_may_differ_between_rows():
    rope, x = RotaryEmbedding(10, 4), torch.randn(2, 3, 4)
    positions = torch.tensor([[0, 1, 2], [7, 5, 9]])
    rows = [rope(x[row], positions[row]) for row in range(2)]
    torch.testing.assert_close(rope(x, positions), torch.stack(rows))


@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_attention_layer_takes_any_leading_dimensions(leading):
    layer = CausalMultiHeadSelfAttention(16, 4, RotaryEmbedding(9, 4))
    x = torch.randn(*leading, 9, 16)
    expected = torch.stack([layer(row) for row in x.reshape(-1, 9, 16)]).reshape(x.shape)
    torch.testing.assert_close(layer(x), expected)


def llama(ours):
    """Hugging Face's Llama with our weights; Qwen 3, which is Llama with norms of queries and keys, if there are such.

    We rotate the pairs (2k, 2k+1) of a head, Llama (k, k + d/2): its row k is our row 2k, its row k + d/2 our 2k+1.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    config = ours.config
    make, make_config = (Qwen3ForCausalLM, Qwen3Config) if config.qk_norm else (LlamaForCausalLM, LlamaConfig)
    theirs = make(
        make_config(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            intermediate_size=config.ffn_width,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_heads,
            head_dim=config.d_model // config.num_heads,
            max_position_embeddings=config.context_length,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_embeddings,
        )
    )
    names = {
        "token_embeddings": "model.embed_tokens", "ln_final": "model.norm", "layers": "model.layers",
        "ln1": "input_layernorm", "ln2": "post_attention_layernorm", "attn": "self_attn", "output_proj": "o_proj",
        "ffn": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj",
    }  # fmt: skip
    mapping = {name: ".".join(names.get(part, part) for part in name.split(".")) for name in ours.state_dict()}

    def permute(name, tensor):
        if "q_proj" in name or "k_proj" in name:
            return rearrange(tensor, "(head pair two) d -> (head two pair) d", head=config.num_heads, two=2)
        if "q_norm" in name or "k_norm" in name:
            return rearrange(tensor, "(pair two) -> (two pair)", two=2)
        return tensor

    theirs.load_state_dict({mapping[name]: permute(name, tensor) for name, tensor in ours.state_dict().items()})
    return theirs, mapping, permute


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"num_heads": 1, "num_layers": 1}, {"rope_theta": 37.0, "d_ff": 5},
        {"qk_norm": True}, {"tie_embeddings": True}, {"qk_norm": True, "tie_embeddings": True},
    ],
)  # fmt: skip
def test_logits_and_gradients_equal_llama(changes):
    ours = build(**changes)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if "ln" in name or "norm" in name:
                parameter.uniform_(0.5, 1.5)
    theirs, mapping, permute = llama(ours)
    ids = torch.randint(97, (2, 19))
    logits, expected = ours(ids), theirs(ids).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)

    for output in (logits, expected):
        F.cross_entropy(output[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(permute(name, parameter.grad), gradients[mapping[name]], rtol=0, atol=1e-5, msg=name)


def test_the_square_of_relu_equals_torch():
    model, x = build(ffn="relu2", d_ff=None), torch.randn(5, 32)
    ffn = model.layers[0].ffn
    assert ffn.w1.weight.shape == (128, 32)
    torch.testing.assert_close(ffn(x), F.linear(F.relu(F.linear(x, ffn.w1.weight)) ** 2, ffn.w2.weight))


def test_tied_embeddings_are_one_parameter(tmp_path):
    model = build(tie_embeddings=True)
    assert model.lm_head.weight is model.token_embeddings.weight
    assert model.get_num_params(non_embedding=False) == build().get_num_params(non_embedding=False) - 97 * 32
    assert model.lm_head.weight.std() < 0.2  # as the head's, not as embeddings of variance 1
    other = build(tie_embeddings=True)
    other.load_state_dict(model.state_dict())
    ids = torch.randint(97, (1, 7))
    torch.testing.assert_close(other(ids), model(ids), rtol=0, atol=0)


def test_the_hidden_states_are_the_input_of_the_head():
    ours, ids = build(), torch.randint(97, (2, 19))
    theirs, _, _ = llama(ours)
    hidden_states = ours.hidden_states(ids)
    torch.testing.assert_close(hidden_states, theirs.model(ids).last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.lm_head(hidden_states), ours(ids), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"norm": "post"}, {"norm": "none"}, {"position": "none"}, {"ffn": "silu", "d_ff": None},
        {"qk_norm": True}, {"ffn": "relu2"},
    ],
)  # fmt: skip
def test_a_token_depends_on_those_before_it_only(changes):
    model = build(**changes)
    embeddings = []
    model.token_embeddings.register_forward_hook(lambda _m, _i, out: embeddings.append(out.requires_grad_()))
    logits = model(torch.randint(97, (1, 12)))
    for position in (0, 4, 11):
        (gradient,) = torch.autograd.grad(logits[0, position].sum(), embeddings[0], retain_graph=True)
        influence = gradient[0].abs().sum(-1)
        assert (influence[: position + 1] > 0).all()
        assert (influence[position + 1 :] == 0).all()


def test_state_dict_names_are_the_courses():
    block = [
        "ln1",
        "attn.q_proj",
        "attn.k_proj",
        "attn.v_proj",
        "attn.output_proj",
        "ln2",
        "ffn.w1",
        "ffn.w2",
        "ffn.w3",
    ]
    expected = [f"layers.{layer}.{name}.weight" for layer in range(3) for name in block]
    expected += ["token_embeddings.weight", "ln_final.weight", "lm_head.weight"]
    assert sorted(build().state_dict()) == sorted(expected)


def test_ablations_change_what_they_name():
    norms = {norm: [n for n in build(norm=norm).state_dict() if "ln" in n] for norm in ("pre", "post", "none")}
    assert (len(norms["pre"]), len(norms["post"]), len(norms["none"])) == (7, 6, 0)
    assert "layers.0.ffn.w3.weight" not in build(ffn="silu").state_dict()
    assert not list(build(position="none").buffers())
    wide, gated = ModelConfig(d_model=768, ffn="silu"), ModelConfig(d_model=768)
    assert (wide.ffn_width, gated.ffn_width) == (3072, 2048)  # two and three matrices of equal size in all
    assert ModelConfig(d_model=512).ffn_width == 1344


def test_post_norm_normalises_the_sum():
    block = build(norm="post").layers[0]
    x = torch.randn(1, 5, 32)
    middle = F.rms_norm(x + block.attn(x), (32,), block.ln1.weight, 1e-5)
    torch.testing.assert_close(block(x), F.rms_norm(middle + block.ffn(middle), (32,), block.ln2.weight, 1e-5))


def test_without_positions_order_of_the_past_does_not_matter():
    model = build(position="none", num_layers=1)
    ids = torch.randint(97, (1, 10))
    shuffled = torch.cat((ids[:, torch.randperm(9)], ids[:, 9:]), dim=1)
    torch.testing.assert_close(model(ids)[:, -1], model(shuffled)[:, -1], rtol=0, atol=1e-5)
    assert not torch.allclose(build(num_layers=1)(ids)[:, -1], build(num_layers=1)(shuffled)[:, -1], atol=1e-3)


def test_attention_can_be_replaced_from_outside(monkeypatch):
    model, ids = build(), torch.randint(97, (2, 6))
    expected = model(ids)
    calls = []
    original = model_module.scaled_dot_product_attention
    monkeypatch.setattr(model_module, "scaled_dot_product_attention", lambda *a: calls.append(1) or original(*a))
    torch.testing.assert_close(model(ids), expected, rtol=0, atol=0)
    assert len(calls) == 3

    plugged = BasicsTransformerLM.from_config(
        TINY, causal_attention=lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)
    )
    plugged.load_state_dict(model.state_dict())
    torch.testing.assert_close(plugged(ids), expected, rtol=0, atol=1e-5)
    assert len(calls) == 3


def test_compiled_model_keeps_its_names_and_its_answers():
    program = """
import torch
from cs336_basics.model import BasicsTransformerLM
model, ids = BasicsTransformerLM(97, 24, 32, 2, 4), torch.randint(97, (2, 6))
expected, names = model(ids), list(model.state_dict())
model.compile(backend="aot_eager", fullgraph=True)
torch.testing.assert_close(model(ids), expected, rtol=0, atol=1e-6)
assert list(model.state_dict()) == names
"""  # a process of its own: torch.compile does not trace the checks of shapes that are active in tests
    subprocess.run([sys.executable, "-c", program], check=True)


def test_bfloat16_autocast_is_close_to_float32():
    model, ids = build(), torch.randint(97, (2, 20))
    with torch.autocast("cpu", torch.bfloat16):
        half = model(ids)
    exact = model(ids)
    assert half.dtype == torch.bfloat16
    assert ((half - exact).norm() / exact.norm()).item() < 2e-2


def test_parameter_counts():
    model = build()
    assert model.get_num_params(non_embedding=False) == sum(p.numel() for p in model.parameters())
    assert model.get_num_params(non_embedding=False) - model.get_num_params() == 97 * 32
    tinystories = BasicsTransformerLM.from_config(ModelConfig(), device=torch.device("meta"))
    assert 16.5e6 < tinystories.get_num_params() < 18e6


def test_too_long_input_is_refused():
    with pytest.raises(ValueError, match="25 tokens do not fit into the context length 24"):
        build()(torch.zeros(1, 25, dtype=torch.long))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "d_model 32 is not a multiple of num_heads 5"),
        ({"d_model": 12, "num_heads": 4}, "odd width 3"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"d_ff": -5}, "d_ff is -5"),
    ],
)
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)
