"""Logits of a padded batch with a cache equal those of each text alone, computed from scratch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from cs336_alignment.rollouts.engines import decoding
from cs336_alignment.rollouts.engines.decoding import GROUPED_ATTENTION, Decoder, step_logits

ROOT = Path(__file__).parents[3]
VOCAB = 37
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
MODELS = {
    "qwen2, 4 heads": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=4)),
    "qwen2, 2 groups": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen3, 1 group": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=16)),
    "llama, 2 groups": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2)),
}


def make_model(name="qwen2, 2 groups"):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@torch.no_grad()
def reference(model, texts):
    """Compute the logits of the next token of each text, without padding or cache."""
    model.set_attn_implementation("eager")
    logits = torch.stack([model(torch.tensor([text])).logits[0, -1] for text in texts])
    model.set_attn_implementation(GROUPED_ATTENTION)
    return logits


@torch.no_grad()
def check_batch(decoder, model, prompts, prompt_of_row, steps, keep_at):
    """Run a batch with random tokens, dropping rows at some steps."""
    logits = decoder.start(prompts, prompt_of_row)
    texts = [list(prompts[prompt]) for prompt in prompt_of_row]
    for step in range(steps):
        torch.testing.assert_close(logits, reference(model, texts), rtol=1e-4, atol=1e-4)
        tokens = torch.randint(VOCAB, (len(texts),))
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        if step in keep_at:
            decoder.keep(keep_at[step])
            texts, tokens = [texts[row] for row in keep_at[step]], tokens[keep_at[step]]
        logits = decoder.step(tokens)


@pytest.mark.parametrize("few_shapes", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_equals_each_text_alone(name, few_shapes, monkeypatch):
    monkeypatch.setattr(decoding, "COLUMN_BLOCK", 8)  # so that blocks end on the way
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 40)  # so that prompts need several passes
    model = make_model(name)
    prompts = [torch.randint(VOCAB, (length,)).tolist() for length in (1, 19, 2, 11)]
    rows = [0, 0, 0, 1, 2, 2, 2, 2, 2, 3, 3]
    decoder = Decoder(model, rows=len(rows), columns=40, compiled=step_logits if few_shapes else None)
    check_batch(decoder, model, prompts, rows, steps=12, keep_at={3: [0, 3, 4, 8, 9], 7: [2], 9: [0]})
    # The same buffers serve another batch.
    check_batch(decoder, model, prompts[:2], [0, 1, 1], steps=4, keep_at={})


def test_one_token_prompts():
    model = make_model()
    check_batch(Decoder(model, 3, 10), model, [[5], [7]], [0, 1, 1], steps=3, keep_at={})


@torch.no_grad()
def test_a_batch_that_ended_in_nan_leaves_no_trace():
    model = make_model()
    decoder = Decoder(model, 2, 20, compiled=step_logits)
    weight = model.model.layers[0].self_attn.v_proj.weight
    good = weight.clone()
    weight.fill_(torch.nan)
    decoder.start([[1, 2, 3]], [0, 0])
    assert decoder.step(torch.tensor([4, 5])).isnan().all()
    weight.copy_(good)
    check_batch(decoder, model, [[3]], [0], steps=3, keep_at={})


def test_holds_and_worth_dropping():
    exact, rounded = Decoder(make_model(), 10, 30), Decoder(make_model(), 10, 30, compiled=step_logits)
    assert exact.holds(10, 30)
    assert not exact.holds(11, 30)
    assert not exact.holds(10, 31)
    assert rounded.holds(16, 256)
    assert not rounded.holds(17, 256)
    for decoder in (exact, rounded):
        with torch.no_grad():
            decoder.start([[1]], [0] * 10)
    assert [exact.worth_dropping(rows) for rows in (8, 7)] == [False, True]
    assert [rounded.worth_dropping(rows) for rows in (9, 8)] == [False, True]


TRACE = """
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM
from cs336_alignment.rollouts.engines import decoding
from cs336_alignment.rollouts.engines.decoding import GROUPED_ATTENTION, Decoder, step_logits

decoding.COLUMN_BLOCK = 32
traced = []
def count(graph, inputs):
    traced.append(graph)
    return graph

sizes = {"vocab_size": 9, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=2, num_key_value_heads=1)).eval()
model.set_attn_implementation(GROUPED_ATTENTION)
compiled = torch.compile(step_logits, dynamic=True, fullgraph=True, backend=count)
with torch.no_grad():
    for rows in (9, 40, 17, 70):
        decoder = Decoder(model, rows, 90, compiled)
        decoder.start([[1] * 25], [0] * rows)
        for _ in range(12):
            decoder.step(torch.zeros(rows, dtype=torch.long))
print(len(traced))
"""


def test_compilation_sees_a_step_as_one_graph_for_all_shapes():
    # In a process of its own, where no shapes are checked: the checks cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_COMPILE_DISABLE"}
    process = subprocess.run(
        [sys.executable, "-c", TRACE], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(process.stdout) == 1
