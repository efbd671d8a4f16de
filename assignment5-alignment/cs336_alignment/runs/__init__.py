"""Parts that all training runs share: options, resuming, checkpoints, metrics, and the order of the data."""
