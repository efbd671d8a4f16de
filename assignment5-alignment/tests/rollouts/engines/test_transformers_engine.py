"""The transformers engine against transformers' own `generate`, and against the model's forward pass."""

import jaxtyping
import pytest
import torch
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from cs336_alignment.policy.loading import load_model, load_tokenizer
from cs336_alignment.policy.tiny_model import make_tiny_model
from cs336_alignment.rollouts.config import SamplingParams
from cs336_alignment.rollouts.engines import make_engine
from cs336_alignment.rollouts.engines.transformers_engine import TransformersEngine

CONTEXT = 192
PROMPTS = ["User: 1+1=?", "x", "A much longer prompt, about é and so on: what is it? " * 2, "<think> 2", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "tiny"
    return make_tiny_model(path, seed=3, context_length=CONTEXT, initializer_range=0.2)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture
def model(folder):
    return load_model(folder, "cpu")


@pytest.fixture
def engine(model, tokenizer):
    return TransformersEngine(model, tokenizer)


@pytest.fixture(params=[False, True], ids=["any shapes", "few shapes"])
def either_engine(request, model, tokenizer):
    # torch.compile is switched off in tests: what is left of it are the shapes of rows and columns.
    return TransformersEngine(model, tokenizer, compiled=request.param)


def flat(completions):
    return [completion for group in completions for completion in group]


@torch.no_grad()
def forward_log_probs(model, tokenizer, prompt, completion):
    """Compute the log-probabilities of a completion's tokens in one forward pass, in float64."""
    prompt_ids = tokenizer(prompt).input_ids
    logits = model(torch.tensor([[*prompt_ids, *completion.token_ids]])).logits[0, len(prompt_ids) - 1 : -1]
    token_ids = torch.tensor(completion.token_ids)
    return logits.double().log_softmax(-1).gather(1, token_ids[:, None]).squeeze(1)


def generate(model, tokenizer, prompts, **options):
    """Let transformers complete the prompts greedily, as a batch padded on the left."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    config = GenerationConfig(
        do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **options
    )
    return model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :].tolist()


def test_greedy_equals_generate(either_engine, model, tokenizer):
    params = SamplingParams(temperature=0, max_tokens=24)
    (alone,) = zip(*either_engine.generate(PROMPTS, params), strict=True)
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=24)
    for prompt, completion, batched in zip(PROMPTS, alone, together, strict=True):
        count = len(completion.token_ids)
        assert [*completion.token_ids] == generate(model, tokenizer, [prompt], max_new_tokens=24)[0] == batched[:count]
        assert set(batched[count:]) <= {tokenizer.pad_token_id}
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True).rstrip("�")
        assert completion.finish_reason == ("length" if count == 24 else "stop")


def test_an_untied_output_layer(tmp_path):
    folder = make_tiny_model(tmp_path / "tiny", initializer_range=0.2, tie_word_embeddings=False)
    model, tokenizer = load_model(folder, "cpu"), load_tokenizer(folder)
    (completions,) = zip(
        *TransformersEngine(model, tokenizer).generate(PROMPTS, SamplingParams(temperature=0, max_tokens=9))
    )
    expected = [generate(model, tokenizer, [prompt], max_new_tokens=9)[0] for prompt in PROMPTS]
    assert [[*completion.token_ids] for completion in completions] == expected


def test_log_probs_are_the_models_whatever_the_sampling(either_engine, model, tokenizer):
    params = SamplingParams(temperature=0.6, top_p=0.8, max_tokens=20, n=3, seed=0, min_tokens=5)
    for prompt, completions in zip(PROMPTS, either_engine.generate(PROMPTS, params), strict=True):
        for completion in completions:
            expected = forward_log_probs(model, tokenizer, prompt, completion)
            torch.testing.assert_close(
                torch.tensor(completion.log_probs, dtype=torch.float64), expected, rtol=0, atol=1e-4
            )


@torch.no_grad()
def test_first_tokens_are_drawn_from_the_models_distribution(engine, model, tokenizer):
    count = 3000
    params = SamplingParams(temperature=1.5, max_tokens=1, n=count, seed=1)
    drawn = torch.tensor([completion.token_ids[0] for completion in engine.generate(["x"], params)[0]])
    logits = model(**tokenizer("x", return_tensors="pt")).logits[0, -1]
    expected = count * (logits / 1.5).softmax(-1)
    seen = torch.bincount(drawn, minlength=len(expected))
    often = expected > 20
    chi_squared = ((seen - expected) ** 2 / expected)[often].sum()
    assert chi_squared < often.sum() + 5 * (2 * often.sum()).sqrt()


def test_seeds_fix_the_draws_and_samples_differ(engine):
    params = SamplingParams(n=3, max_tokens=16, seed=5)
    first = engine.generate(PROMPTS, params)
    assert [len(group) for group in first] == [3] * len(PROMPTS)
    assert engine.generate(PROMPTS, params) == first
    assert len({completion.token_ids for completion in first[1] + first[4]}) == 6  # the same prompt
    assert flat(engine.generate(PROMPTS, SamplingParams(n=3, max_tokens=16, seed=6))) != flat(first)
    unseeded = SamplingParams(max_tokens=16)
    torch.manual_seed(0)
    drawn = engine.generate(PROMPTS, unseeded)
    assert engine.generate(PROMPTS, unseeded) != drawn
    torch.manual_seed(0)
    assert engine.generate(PROMPTS, unseeded) == drawn


def test_how_rows_are_spread_over_batches_changes_nothing(model, tokenizer):
    params = SamplingParams(n=4, max_tokens=30, seed=2, stop=("e", "7"))
    together = TransformersEngine(model, tokenizer).generate(PROMPTS, params)
    apart = TransformersEngine(model, tokenizer, max_batch_tokens=300).generate(PROMPTS, params)
    for one, other in zip(flat(together), flat(apart), strict=True):
        assert (one.token_ids, one.text, one.finish_reason) == (other.token_ids, other.text, other.finish_reason)


def test_memory_is_bounded(model, tokenizer, monkeypatch):
    widths = []

    class Spy(TransformersEngine):
        def _decoder_for(self, rows, columns):
            widths.append((rows, columns))
            return super()._decoder_for(rows, columns)

    Spy(model, tokenizer, max_batch_tokens=300).generate(PROMPTS, SamplingParams(n=4, max_tokens=30))
    assert sum(rows for rows, _ in widths) == 4 * len(PROMPTS)
    assert all(rows * columns <= 300 or rows == 1 for rows, columns in widths)


@pytest.mark.parametrize("min_tokens", [0, 9])
def test_stop_strings_cut_what_would_have_come(either_engine, tokenizer, min_tokens):
    free = SamplingParams(n=6, max_tokens=40, seed=4)
    stop = ("e", "3", "</answer>", "\n")
    stopped = either_engine.generate(
        PROMPTS, SamplingParams(n=6, max_tokens=40, seed=4, stop=stop, min_tokens=min_tokens)
    )
    reasons = set()
    for whole, cut in zip(flat(either_engine.generate(PROMPTS, free)), flat(stopped), strict=True):
        count = len(cut.token_ids)
        reasons.add(cut.finish_reason)
        if min_tokens == 0:  # otherwise an end of sequence may have been held back, and all is different after it
            assert cut.token_ids == whole.token_ids[:count]
            assert cut.log_probs == pytest.approx(whole.log_probs[:count], abs=1e-4)
            assert whole.text.startswith(cut.text)
        if cut.finish_reason == "stop" and cut.token_ids[-1] != tokenizer.eos_token_id:
            assert cut.text.endswith(stop)
            assert count > min_tokens
            shorter = tokenizer.decode(cut.token_ids[min_tokens:-1], skip_special_tokens=True)
            assert not any(string in shorter for string in stop)
    assert reasons == {"stop", "length"}


def test_end_of_sequence(model, tokenizer):
    """A generation config can make another token an end of sequence; here one that comes early."""
    params = SamplingParams(temperature=0, max_tokens=12)
    (before,) = TransformersEngine(model, tokenizer).generate(["x"], params)[0]
    end = before.token_ids[4]
    first = before.token_ids.index(end)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]
    engine = TransformersEngine(model, tokenizer)

    (completion,) = engine.generate(["x"], params)[0]
    assert completion.token_ids == before.token_ids[: first + 1]
    assert completion.text == tokenizer.decode(before.token_ids[:first]).rstrip("�")
    assert completion.finish_reason == "stop"

    (later,) = engine.generate(["x"], SamplingParams(temperature=0, max_tokens=12, min_tokens=first + 2))[0]
    assert later.token_ids[:first] == before.token_ids[:first]
    assert end not in later.token_ids[: first + 2]
    expected = forward_log_probs(model, tokenizer, "x", later)
    assert later.log_probs == pytest.approx(expected.tolist(), abs=1e-4)  # as if nothing had been held back


def test_rows_end_at_the_models_context(either_engine, tokenizer):
    prompts = ["y" * length for length in (5, CONTEXT - 3, CONTEXT - 1)]
    completions = either_engine.generate(prompts, SamplingParams(max_tokens=1000, min_tokens=200, seed=0))
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        assert len(prompt) + len(completion.token_ids) == CONTEXT
        assert completion.finish_reason == "length"


def test_a_shorter_context_can_be_asked_for(model, tokenizer):
    engine = TransformersEngine(model, tokenizer, max_model_len=20)
    (completion,) = engine.generate(["y" * 12], SamplingParams(temperature=0, min_tokens=30, max_tokens=30))[0]
    assert len(completion.token_ids) == 8
    with pytest.raises(ValueError, match="prompt 0 has 20 tokens, but the model's context is 20"):
        engine.generate(["y" * 20], SamplingParams())


def test_no_prompts(engine):
    assert engine.generate([], SamplingParams()) == []


def test_the_model_is_left_as_it_was(model, tokenizer, monkeypatch):
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    model.model.layers[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    engine = TransformersEngine(model, tokenizer)
    params = SamplingParams(temperature=0, max_tokens=8)
    first = engine.generate(PROMPTS, params)
    assert engine.generate(PROMPTS, params) == first  # without dropout
    monkeypatch.setattr(engine, "_choose", None)
    with pytest.raises(TypeError):
        engine.generate(PROMPTS, params)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == "sdpa"
    model(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_shared_model_needs_no_loading(engine, model):
    params = SamplingParams(temperature=0, max_tokens=12)
    before = engine.generate(PROMPTS, params)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    engine.load_weights(model.state_dict())
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert engine.generate(PROMPTS, params) != before


def test_an_engine_of_its_own_takes_weights(folder, model, tokenizer):
    engine = TransformersEngine(folder, tokenizer, "cpu")
    params = SamplingParams(temperature=0, max_tokens=12)
    before = engine.generate(PROMPTS, params)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.3)
    expected = TransformersEngine(model, tokenizer).generate(PROMPTS, params)
    assert engine.generate(PROMPTS, params) == before != expected

    weights = dict(model.state_dict())
    weights["model.norm.weight"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(3,\)"):
        engine.load_weights(weights)
    assert engine.generate(PROMPTS, params) == before
    engine.load_weights({name: weight.double() for name, weight in model.state_dict().items()})
    assert engine.generate(PROMPTS, params) == expected


def test_sleep_wake_and_close(folder, model, tokenizer):
    params = SamplingParams(temperature=0, max_tokens=6)
    for engine in (TransformersEngine(folder, tokenizer), TransformersEngine(model, tokenizer, compiled=True)):
        before = engine.generate(PROMPTS, params)
        engine.sleep()
        engine.sleep()
        with pytest.raises(RuntimeError, match=r"call wake\(\)"):
            engine.generate(PROMPTS, params)
        engine.wake()
        assert engine.generate(PROMPTS, params) == before
        engine.close()
        engine.close()


def test_layers_without_full_attention_are_refused(tokenizer):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "vocab_size": 300}
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, sliding_window=16)
    config.layer_types = ["sliding_attention"]
    with pytest.raises(ValueError, match=r"sliding_attention.*use the vllm engine"):
        TransformersEngine(MistralForCausalLM(config), tokenizer)


def test_progress_is_shown_when_asked_for(model, tokenizer, capsys):
    TransformersEngine(model, tokenizer, progress=True).generate(PROMPTS, SamplingParams(max_tokens=3))
    captured = capsys.readouterr()
    assert "generating" in captured.err
    assert captured.out == ""
    TransformersEngine(model, tokenizer).generate(PROMPTS, SamplingParams(max_tokens=3))
    assert capsys.readouterr().err == ""


def test_make_engine_shares_a_policy_that_fits(folder, model, tokenizer):
    shared = make_engine("transformers", folder, tokenizer, "cpu", policy=model, dtype=torch.float32)
    own = make_engine("transformers", folder, tokenizer, "cpu", policy=model, dtype=torch.bfloat16)
    params = SamplingParams(temperature=0, max_tokens=4)
    before = own.generate(PROMPTS, params), shared.generate(PROMPTS, params)
    with torch.no_grad():
        model.model.embed_tokens.weight.neg_()
    assert own.generate(PROMPTS, params) == before[0]
    assert shared.generate(PROMPTS, params) != before[1]


@pytest.mark.parametrize(("device", "asked", "compiled"), [
    ("cpu", None, False), ("cuda", None, True), ("cuda", False, False), ("cpu", True, True),
])  # fmt: skip
def test_generation_is_compiled_on_a_gpu_unless_told_otherwise(folder, tokenizer, monkeypatch, device, asked, compiled):
    made = []

    def record(*_, **options):
        made.append(options["compiled"])
        return TransformersEngine(folder, tokenizer)

    monkeypatch.setattr("cs336_alignment.rollouts.engines.TransformersEngine", record)
    make_engine("transformers", folder, tokenizer, device, compiled=asked)
    assert made == [compiled]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_cuda_graphs_change_nothing(folder, tokenizer, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # torch.compile traces tensors without types
    model = load_model(folder, "cuda")
    plain, graphs = (TransformersEngine(model, tokenizer, compiled=compiled) for compiled in (False, True))
    for params in (
        SamplingParams(temperature=0, max_tokens=60),
        SamplingParams(n=9, max_tokens=60, stop=("e",), seed=0),
    ):
        expected = plain.generate(PROMPTS, params)
        for _ in range(2):  # recorded, then replayed
            for one, other in zip(flat(graphs.generate(PROMPTS, params)), flat(expected), strict=True):
                assert one.token_ids == other.token_ids
                assert one.log_probs == pytest.approx(other.log_probs, abs=1e-4)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)  # in place, as an optimizer does: graphs see it
    params = SamplingParams(temperature=0, max_tokens=20)
    assert [one.token_ids for one in flat(graphs.generate(PROMPTS, params))] == [
        other.token_ids for other in flat(plain.generate(PROMPTS, params))
    ]
