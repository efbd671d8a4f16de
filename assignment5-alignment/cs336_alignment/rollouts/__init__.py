"""Rollouts: engines that generate responses, the rewards that grade them, and evaluation during training."""
