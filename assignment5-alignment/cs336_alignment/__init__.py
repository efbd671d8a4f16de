"""Teaching a language model to reason: evaluation, SFT, expert iteration, GRPO and DPO."""
