"""Tensor functions of the algorithms, which the course's tests call: tokens, log-probabilities, losses, advantages."""
