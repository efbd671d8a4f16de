"""The options of every command, as dataclasses; importing them does not import torch, so that `--help` is quick."""
