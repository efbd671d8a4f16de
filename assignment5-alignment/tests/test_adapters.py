"""The adapters have the course's signatures, and pass everything on: positions, names and defaults."""

import inspect
import json
import math

import pytest
import torch

from tests import adapters
from tests.tiny import tiny_model, tiny_tokenizer

SIGNATURES = {
    "run_tokenize_prompt_and_output": "prompt_strs, output_strs, tokenizer",
    "run_compute_group_normalized_rewards": (
        "reward_fn, rollout_responses, repeated_ground_truths, group_size, advantage_eps, normalize_by_std"
    ),
    "run_compute_entropy": "logits",
    "run_get_response_log_probs": "model, input_ids, labels, return_token_entropy",
    "run_compute_naive_policy_gradient_loss": "raw_rewards_or_advantages, policy_log_probs",
    "run_compute_grpo_clip_loss": "advantages, policy_log_probs, old_log_probs, cliprange",
    "run_compute_policy_gradient_loss": (
        "policy_log_probs, loss_type, raw_rewards=None, advantages=None, old_log_probs=None, cliprange=None"
    ),
    "run_masked_mean": "tensor, mask, dim=None",
    "run_masked_normalize": "tensor, mask, dim=None, normalize_constant=1.0",
    "run_sft_microbatch_train_step": (
        "policy_log_probs, response_mask, gradient_accumulation_steps, normalize_constant=1.0"
    ),
    "run_grpo_microbatch_train_step": (
        "policy_log_probs, response_mask, gradient_accumulation_steps, loss_type, "
        "raw_rewards=None, advantages=None, old_log_probs=None, cliprange=None"
    ),
    "get_packed_sft_dataset": "tokenizer, dataset_path, seq_length, shuffle",
    "run_iterate_batches": "dataset, batch_size, shuffle",
    "run_parse_mmlu_response": "mmlu_example, model_output",
    "run_parse_gsm8k_response": "model_output",
    "run_compute_per_instance_dpo_loss": (
        "lm, lm_ref, tokenizer, beta, prompt, response_chosen, response_rejected"
    ),
}  # fmt: skip

LOG_PROBS = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -1.5, -2.5]])
MASK = torch.tensor([[True, True, False], [False, True, True]])
ADVANTAGES = torch.tensor([[2.0], [-1.0]])
OLD = LOG_PROBS - torch.tensor([[0.0, math.log(2), 0.0], [0.0, math.log(2), -math.log(2)]])


def test_every_adapter_has_the_signature_of_the_course():
    public = {name: value for name, value in vars(adapters).items() if name.startswith(("run_", "get_packed"))}
    assert public.keys() == SIGNATURES.keys()
    for name, expected in SIGNATURES.items():
        parameters = inspect.signature(public[name]).parameters.values()
        assert ", ".join(str(p.replace(annotation=p.empty)) for p in parameters) == expected, name


def test_tokenization_and_log_probs():
    tokenizer, model = tiny_tokenizer(), tiny_model()
    batch = adapters.run_tokenize_prompt_and_output(["User: 3", "What is"], [" + 4", " the answer?"], tokenizer)
    assert batch.keys() == {"input_ids", "labels", "response_mask"}
    assert tokenizer.decode(batch["labels"][1][batch["response_mask"][1]]) == " the answer?"
    result = adapters.run_get_response_log_probs(model, batch["input_ids"], batch["labels"], True)
    logits = model(batch["input_ids"]).logits
    torch.testing.assert_close(result["token_entropy"], adapters.run_compute_entropy(logits).detach())
    expected = torch.distributions.Categorical(logits=logits).log_prob(batch["labels"])
    torch.testing.assert_close(result["log_probs"], expected)
    assert adapters.run_get_response_log_probs(model, batch["input_ids"], batch["labels"], False).keys() == {
        "log_probs"
    }


def test_group_normalized_rewards():
    def reward(response, truth):
        return {"reward": float(response == truth), "format_reward": 1.0, "answer_reward": 1.0}

    advantages, raw, metadata = adapters.run_compute_group_normalized_rewards(
        reward, ["1", "2", "3", "3"], ["1", "1", "3", "3"], 2, 1e-6, True
    )
    torch.testing.assert_close(advantages, torch.tensor([1.0, -1.0, 0.0, 0.0]) / math.sqrt(2), rtol=1e-4, atol=0)
    assert raw.tolist() == [1, 0, 1, 1]
    assert (metadata["mean"], metadata["max"], metadata["min"]) == (0.75, 1.0, 0.0)
    assert metadata["std"] == pytest.approx(0.5)


def test_losses_of_tokens():
    naive = adapters.run_compute_naive_policy_gradient_loss(ADVANTAGES, LOG_PROBS)
    assert naive.tolist() == [[2, 4, 6], [-0.5, -1.5, -2.5]]
    clip, metadata = adapters.run_compute_grpo_clip_loss(ADVANTAGES, LOG_PROBS, OLD, 0.25)
    torch.testing.assert_close(clip, torch.tensor([[-2.0, -2.5, -2.0], [1.0, 2.0, 0.75]]))
    assert metadata["clipped"].tolist() == [[False, True, False], [False, False, True]]
    for name, expected in (("no_baseline", naive), ("reinforce_with_baseline", naive), ("grpo_clip", clip)):
        ours, _ = adapters.run_compute_policy_gradient_loss(LOG_PROBS, name, ADVANTAGES, ADVANTAGES, OLD, 0.25)
        torch.testing.assert_close(ours, expected)
    with pytest.raises(ValueError, match="needs advantages, which is missing"):
        adapters.run_compute_policy_gradient_loss(LOG_PROBS, "grpo_clip", ADVANTAGES, None, OLD, 0.25)


def test_masked_reductions():
    assert adapters.run_masked_mean(LOG_PROBS, MASK).item() == -1.75
    assert adapters.run_masked_mean(LOG_PROBS, MASK, 1).tolist() == [-1.5, -2]
    assert adapters.run_masked_mean(LOG_PROBS, ~MASK & MASK, dim=0).isnan().all()
    assert adapters.run_masked_normalize(LOG_PROBS, MASK).item() == -7
    assert adapters.run_masked_normalize(LOG_PROBS, MASK, 0, 2.0).tolist() == [-0.5, -1.75, -1.25]


def test_microbatch_steps():
    log_probs = LOG_PROBS.clone().requires_grad_()
    loss, _ = adapters.run_sft_microbatch_train_step(log_probs, MASK, 2, 7.0)
    assert loss.item() == pytest.approx((3 + 4) / 7 / 2 / 2)
    torch.testing.assert_close(log_probs.grad, MASK.float() / -28)
    loss, _ = adapters.run_sft_microbatch_train_step(log_probs, MASK, 2)
    assert loss.item() == pytest.approx((3 + 4) / 2 / 2)

    log_probs = LOG_PROBS.clone().requires_grad_()
    loss, metadata = adapters.run_grpo_microbatch_train_step(
        log_probs, MASK, 4, "grpo_clip", advantages=ADVANTAGES, old_log_probs=OLD, cliprange=0.25
    )
    assert loss.item() == pytest.approx(((-2 - 2.5) / 2 + (2 + 0.75) / 2) / 2 / 4)
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]) / 2 / 2 / 4)
    assert metadata["clipped"].sum().item() == 2
    loss, _ = adapters.run_grpo_microbatch_train_step(log_probs, MASK, 1, "no_baseline", ADVANTAGES)
    assert loss.item() == pytest.approx((3 - 2) / 2)


def test_per_instance_dpo():
    model, reference, tokenizer = tiny_model(seed=1), tiny_model(seed=2), tiny_tokenizer()
    loss = adapters.run_compute_per_instance_dpo_loss(model, reference, tokenizer, 0.5, "3 + 4?", "7", "8")
    assert loss.shape == ()
    other = adapters.run_compute_per_instance_dpo_loss(model, reference, tokenizer, 0.5, "3 + 4?", "8", "7")
    # σ(x) + σ(−x) = 1
    assert math.exp(-loss.item()) + math.exp(-other.item()) == pytest.approx(1, abs=1e-5)
    assert loss.item() != pytest.approx(other.item(), abs=1e-3)


def test_packed_data_and_batches(tmp_path):
    path = tmp_path / "sft.jsonl"
    rows = [{"prompt": f"What is {number}?", "response": f"It is {number}."} for number in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<eos>"
    dataset = adapters.get_packed_sft_dataset(tokenizer, path, 32, False)
    ids = [token for index in range(len(dataset)) for token in dataset[index]["input_ids"].tolist()]
    assert ids[0] == tokenizer.bos_token_id
    assert "### Instruction:\nWhat is 0?" in tokenizer.decode(ids)
    assert dataset[0]["labels"].tolist() == ids[1:33]
    batches = adapters.run_iterate_batches(dataset, 4, False)
    sizes = [len(batch["input_ids"]) for batch in batches]
    assert len(sizes) == len(batches) == math.ceil(len(dataset) / 4)
    assert sum(sizes) == len(dataset)


def test_parsers():
    example = {"subject": "virology", "question": "How?", "options": ["a", "b", "c", "d"], "answer": "B"}
    assert adapters.run_parse_mmlu_response(example, "The correct answer is B. It is so.") == "B"
    assert adapters.run_parse_mmlu_response(example, "The correct answer is 10000 polyomaviruses.") is None
    assert adapters.run_parse_gsm8k_response("She has 3 boxes of 24, so 72 eggs.") == "72"
    assert adapters.run_parse_gsm8k_response("No number at all.") is None
