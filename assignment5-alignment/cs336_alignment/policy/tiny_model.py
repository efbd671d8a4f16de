"""A tiny random model with a byte-level tokenizer, for tests and demonstrations without a download."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from cs336_alignment.policy.loading import save_model

#: Tags of the R1-Zero format. The tiny models read and write each as one token.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PAD, END_OF_TEXT = "<pad>", "<|endoftext|>"  # END_OF_TEXT is Qwen2's: transformers adds it to a tokenizer without it
TINY_HEAD_SIZE = 32  # the smallest that vLLM's CPU kernels support


def make_tiny_model(
    folder: Path,
    seed: int = 0,
    *,
    hidden_size: int = 64,
    layers: int = 2,
    context_length: int = 512,
    tie_word_embeddings: bool = True,
    initializer_range: float = 0.02,
) -> Path:
    """Write a small random Qwen2 model with a byte-level tokenizer.

    With hidden size 128 and 4 layers it has 0.8 M parameters.

    Args:
        hidden_size: a multiple of 32, the size of its attention heads.
        initializer_range: standard deviation of the random weights. About 0.2 makes predictions decisive.

    Returns:
        The folder.

    Raises:
        ValueError: hidden_size is not a multiple of 32.
    """
    if hidden_size < TINY_HEAD_SIZE or hidden_size % TINY_HEAD_SIZE:
        raise ValueError(f"hidden_size is {hidden_size}, but must be a multiple of {TINY_HEAD_SIZE}")
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=round(hidden_size * 8 / 3 / TINY_HEAD_SIZE)
        * TINY_HEAD_SIZE,  # as many weights as with 4 times …
        num_hidden_layers=layers,  # … the hidden size without a gate (Shazeer 2020)
        num_attention_heads=hidden_size // TINY_HEAD_SIZE,
        num_key_value_heads=hidden_size // TINY_HEAD_SIZE,
        max_position_embeddings=context_length,
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    save_model(model, tokenizer, folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer of 262 tokens: padding, end of text, the 256 bytes, and the four `TAGS`.

    Decoding returns any text unchanged, and each ASCII character is one token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each byte
    vocab = {token: number for number, token in enumerate([PAD, END_OF_TEXT, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # They are not special tokens, which decoding leaves out: the tags mark the answer.
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END_OF_TEXT)
