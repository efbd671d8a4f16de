"""Training steps and the training command, on one device or many.

choices            everything that an option names: models, attentions, optimizers, losses, containers, strategies
options            the options of `train` and `consolidate`
step               one training step of a model of the assignment, on one device or on one of several ranks
containers         the ways in which several ranks train one model in such a step
torch_attention    plain attention, and PyTorch's fused kernels to compare with
blocks             the blocks of a model, and compiling them one by one
checkpointing      gradient checkpointing
strategies         Assignment 1's training loop on several ranks
train              the commands `train` and `consolidate`
"""
