"""Models and tokenizers as Hugging Face folders: how they are read and written, and on which device they run.

    config.json, generation_config.json       the architecture, and which tokens end a text
    model.safetensors                         the weights
    tokenizer.json, tokenizer_config.json     the tokenizer

transformers and vLLM both read such a folder, so the checkpoint of one program can be the model of the next.
"""

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from cs336_alignment.machine import check_driver

AttentionName = Literal["sdpa", "eager", "flash_attention_2"]

#: The files of a model to download from the hub.
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; "auto" is the GPU if there is one.

    Raises:
        ValueError: there is no such device, or its NVIDIA driver is too old for this PyTorch.
    """
    if name.startswith(("auto", "cuda")):
        check_driver(torch.version.cuda)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here ({reason}); choose auto or cpu") from error
    return device


def model_folder(name_or_path: str | Path) -> Path:
    """Return the folder of a model: the one given, or that of a model on the Hugging Face hub, fetched if necessary.

    Raises:
        FileNotFoundError: there is no such folder, and the hub does not provide such a model.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=MODEL_FILES))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name_or_path} is neither a folder nor a model that the Hugging Face hub provides "
            f"({first_line(error)}); check the name, or fetch a model with `cs336-alignment fetch-model`"
        ) from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model.

    A tokenizer without a padding token pads with its end-of-sequence token. That is safe here: padding is known from
    the lengths of prompts and responses and never inferred from token ids, so a real end of sequence is still learned.

    Raises:
        FileNotFoundError: the folder is missing, or has no tokenizer.
        ValueError: the tokenizer cannot be read, or has no end-of-sequence token.
    """
    folder = model_folder(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder} has no tokenizer.json; copy the files of the model's tokenizer into it")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file makes tokenizers raise bare exceptions
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({first_line(error)}); fetch the model again"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} has no end-of-sequence token; name it in tokenizer_config.json as eos_token"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {folder} is not from the tokenizers library; save it as tokenizer.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(path: str | Path) -> PretrainedConfig:
    """Read the configuration of a model.

    Raises:
        FileNotFoundError: the folder is missing, or holds no model.
        ValueError: the configuration cannot be read.
    """
    folder = model_folder(path)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, so it does not hold a model; give another folder")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder / 'config.json'} cannot be read ({first_line(error)}); fetch or save the model again"
        ) from error


def load_model(
    path: str | Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    attention: AttentionName = "sdpa",
) -> PreTrainedModel:
    """Read a causal language model, in evaluation mode.

    Args:
        dtype: type of the weights.
        gradient_checkpointing: in training mode, keep only the inputs of the layers for the backward pass (Chen et al.
            2016).
        attention: flash_attention_2 needs the package flash-attn, a GPU and bfloat16.

    Raises:
        FileNotFoundError: the folder is missing, or lacks the model.
        ValueError: the model cannot be read, or some of its weights are missing.
    """
    folder = model_folder(path)
    load_config(folder)
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError("flash_attention_2 needs the package flash-attn, which is not installed; choose sdpa")
    try:
        with no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"the model in {folder} cannot be read ({first_line(error)}); fetch or save it again"
        ) from error
    model, report = loaded
    lacking = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lacking:  # transformers would silently use random values instead
        raise ValueError(
            f"the model in {folder} is incomplete: {len(lacking)} of its weights are missing or have another shape, "
            f"such as {lacking[0]}; fetch or save it again"
        )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model with its tokenizer. Whatever happens, the folder is then complete, or as it was before."""
    unfinished, previous = (folder.with_name(folder.name + suffix) for suffix in (".unfinished", ".previous"))
    for left_over in (unfinished, previous):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        with no_progress_bars():
            model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if folder.exists():  # renaming cannot replace a folder that is not empty
            folder.replace(previous)
        unfinished.replace(folder)
    finally:
        if previous.exists() and not folder.exists():
            previous.replace(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing progress bars for short operations."""
    shown: Any = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
