"""Log-probabilities, entropies and their gradients against float64, finite differences and transformers."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutput

from cs336_alignment.tensors import log_probs
from cs336_alignment.tensors.log_probs import compute_entropy, get_response_log_probs
from tests.tiny import tiny_model

VOCAB = 300


class Given(nn.Module):
    """A model whose logits are known."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids):
        return CausalLMOutput(logits=self.logits * 1)


def random_case(shape=(2, 7, 1001), dtype=torch.float32, scale=3.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    logits = (torch.randn(shape, generator=rng) * scale).to(dtype)
    return logits, torch.randint(shape[-1], shape[:-1], generator=rng)


def naive(logits, labels, temperature=1.0):
    """Compute the same in float64, all at once."""
    log_probs = F.log_softmax(logits.double() / temperature, dim=-1)
    entropy = torch.distributions.Categorical(logits=logits.double() / temperature).entropy()
    return log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1), entropy


@pytest.mark.parametrize("shape", [(1, 1, 2), (1, 9, 5), (3, 4, 17), (2, 7, 1001), (1, 3, 50_257)])
@pytest.mark.parametrize("chunk", [1, 2100, log_probs.CHUNK_ELEMENTS])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_float32_equals_float64(shape, chunk, temperature, monkeypatch):
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", chunk)
    logits, labels = random_case(shape)
    ours = get_response_log_probs(Given(logits), labels, labels, True, temperature=temperature)
    expected, entropy = naive(logits, labels, temperature)
    assert ours["log_probs"].dtype == ours["token_entropy"].dtype == torch.float32
    torch.testing.assert_close(ours["log_probs"].double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours["token_entropy"].double(), entropy, rtol=1e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_exact_once_they_are_there(dtype):
    logits, labels = random_case(dtype=dtype)
    ours = get_response_log_probs(Given(logits), labels, labels, True)
    expected, entropy = naive(logits, labels)
    assert ours["log_probs"].dtype == ours["token_entropy"].dtype == torch.float32
    torch.testing.assert_close(ours["log_probs"].double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(ours["token_entropy"].double(), entropy, rtol=1e-6, atol=3e-6)


def test_entropy_comes_only_if_asked_for_and_without_gradient():
    logits, labels = random_case()
    assert get_response_log_probs(Given(logits), labels, labels).keys() == {"log_probs"}
    both = get_response_log_probs(Given(logits), labels, labels, return_token_entropy=True)
    assert both["log_probs"].requires_grad
    assert not both["token_entropy"].requires_grad


@pytest.mark.parametrize("chunk", [1, 40, 10_000])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_gradient_against_finite_differences(chunk, temperature, monkeypatch):
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", chunk)
    logits, labels = random_case((2, 3, 11), torch.float64)

    def function(logits):
        return log_probs._selected_log_probs(logits, labels, temperature)

    assert torch.autograd.gradcheck(function, logits.requires_grad_())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_gradient_equals_that_of_float64(dtype, tolerance, monkeypatch):
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", 3 * 1001 + 5)
    logits, labels = random_case(dtype=dtype)
    weights = torch.randn(labels.shape, generator=torch.Generator().manual_seed(3))
    model, exact = Given(logits), logits.double().requires_grad_()
    (get_response_log_probs(model, labels, labels)["log_probs"] * weights).sum().backward()
    (naive(exact, labels)[0] * weights).sum().backward()
    torch.testing.assert_close(model.logits.grad.double(), exact.grad, rtol=tolerance, atol=tolerance / 10)


class LargestFloat32(TorchDispatchMode):
    """Records the largest number of elements of a float32 tensor."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float32:
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_float32_copy_of_the_logits_is_made(monkeypatch):
    monkeypatch.setattr(log_probs, "CHUNK_ELEMENTS", 4000)
    logits, labels = random_case((2, 50, 1000), torch.bfloat16)
    model = Given(logits)
    with LargestFloat32() as ours:
        get_response_log_probs(model, labels, labels, True)["log_probs"].sum().backward()
    assert 0 < ours.elements <= 4000
    with LargestFloat32() as plain:
        F.cross_entropy(model(labels).logits.float().flatten(0, 1), labels.flatten()).backward()
    assert plain.elements == logits.numel()


def test_what_the_backward_pass_keeps():
    logits, labels = random_case((2, 50, 1000), torch.bfloat16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        log_probs._selected_log_probs(logits.requires_grad_(), labels, 1.0)
    assert sorted(tensor.numel() for tensor in kept) == [100, 100, logits.numel()]
    assert max(kept, key=torch.numel).data_ptr() == logits.data_ptr()  # no copy


def test_a_model_of_transformers_and_the_gradients_of_its_weights():
    ours, theirs = tiny_model(VOCAB, dtype=torch.float64), tiny_model(VOCAB, dtype=torch.float64)
    ids = torch.randint(VOCAB, (3, 12), generator=torch.Generator().manual_seed(5))
    result = get_response_log_probs(ours, ids[:, :-1], ids[:, 1:])["log_probs"]
    expected = -F.cross_entropy(theirs(ids[:, :-1]).logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(result.flatten(), expected, rtol=0, atol=1e-12)
    result.mean().backward()
    expected.mean().backward()
    for (name, one), other in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-14, msg=name)


def tiny_gpt2():
    """A model that looks up positions in a table, which has no negative ones."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_positions=32, n_embd=32, n_layer=2, n_head=2, initializer_range=0.2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.parametrize("make_model", [lambda: tiny_model(VOCAB), tiny_gpt2])
@pytest.mark.parametrize("padding", [1, 2, 9])
def test_padding_on_either_side_changes_nothing(make_model, padding):
    model = make_model()
    rng = torch.Generator().manual_seed(7)
    rows = [torch.randint(2, VOCAB, (length,), generator=rng) for length in (6, 10, 3)]
    alone = [get_response_log_probs(model, row[None, :-1], row[None, 1:], True) for row in rows]
    width = max(map(len, rows)) + padding
    for side in ("right", "left"):
        ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.bool)
        for index, row in enumerate(rows):
            place = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            ids[index, place], mask[index, place] = row, True
        attention = {"attention_mask": mask[:, :-1]} if side == "left" else {}
        batch = get_response_log_probs(model, ids[:, :-1], ids[:, 1:], True, **attention)
        counts = mask[:, :-1] & mask[:, 1:]
        for index, single in enumerate(alone):
            for key, values in single.items():
                torch.testing.assert_close(batch[key][index][counts[index]], values[0], rtol=0, atol=1e-5)


def test_gradients_do_not_depend_on_the_side_of_the_padding():
    rng = torch.Generator().manual_seed(8)
    ids = torch.randint(2, VOCAB, (2, 8), generator=rng)
    pad = torch.zeros(2, 3, dtype=torch.long)
    gradients = []
    for side in ("right", "left"):
        model = tiny_model(VOCAB, dtype=torch.float64)
        padded = torch.cat([ids, pad] if side == "right" else [pad, ids], dim=1)
        real = torch.cat([ids > 0, pad > 0] if side == "right" else [pad > 0, ids > 0], dim=1)
        result = get_response_log_probs(model, padded[:, :-1], padded[:, 1:], attention_mask=real[:, :-1])["log_probs"]
        (result * (real[:, :-1] & real[:, 1:])).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_impossible_tokens_and_huge_logits():
    logits = torch.tensor([[[0.0, -math.inf, 0.0], [1e4, 0.0, -1e4]]])
    result = get_response_log_probs(Given(logits), torch.tensor([[0, 0]]), torch.tensor([[2, 1]]), True)
    torch.testing.assert_close(result["log_probs"], torch.tensor([[-math.log(2), -1e4]]))
    torch.testing.assert_close(result["token_entropy"], torch.tensor([[math.log(2), 0.0]]))


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_must_be_positive(temperature):
    logits, labels = random_case((1, 2, 3))
    with pytest.raises(ValueError, match=f"temperature is {temperature}"):
        get_response_log_probs(Given(logits), labels, labels, temperature=temperature)


@pytest.mark.parametrize("shape", [(7,), (4, 5), (2, 3, 50)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
def test_entropy_equals_that_of_torch(shape, scale):
    logits = random_case(shape, torch.float64, scale)[0]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(compute_entropy(logits), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(compute_entropy(logits.float()), expected.float(), rtol=1e-5, atol=1e-5)


def test_entropy_of_known_distributions():
    torch.testing.assert_close(compute_entropy(torch.full((3, 1000), 7.0)), torch.full((3,), math.log(1000)))
    assert compute_entropy(torch.tensor([1e30, 0.0, -1e30])).item() == 0
    assert compute_entropy(torch.tensor([0.0, -math.inf])).item() == 0
    half = compute_entropy(torch.zeros(2, 50_000, dtype=torch.bfloat16))
    torch.testing.assert_close(half, torch.full((2,), math.log(50_000)))


def test_entropy_against_finite_differences():
    logits = random_case((2, 6), torch.float64)[0].requires_grad_()
    assert torch.autograd.gradcheck(compute_entropy, logits)
    logits = torch.tensor([1.0, -math.inf, 2.0], requires_grad=True)
    (gradient,) = torch.autograd.grad(compute_entropy(logits), logits)
    assert gradient.isfinite().all()
