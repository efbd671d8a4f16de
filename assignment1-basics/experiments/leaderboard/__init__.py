"""leaderboard: a ladder of changes to the course's model, and the model options that only the ladder needs.

ladder   the changes, and the command that tries them
config   options that were tried and dropped: soft cap, value embeddings, growth of batch and context
model    the model and the training run with these options
"""
