"""Model folders: what is written is read back; missing or damaged files are reported."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cs336_alignment.policy.loading import (
    load_model,
    load_tokenizer,
    model_folder,
    resolve_device,
    save_model,
)
from cs336_alignment.policy.tiny_model import byte_tokenizer, make_tiny_model

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_keeps_everything(tmp_path, dtype, tied):
    source = make_tiny_model(tmp_path / "source", tie_word_embeddings=tied)
    model = load_model(source, "cpu", dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    save_model(model, load_tokenizer(source), tmp_path / "saved")
    again = load_model(tmp_path / "saved", "cpu", dtype)
    assert not again.training
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert load_tokenizer(tmp_path / "saved")("<think> 1").input_ids == TOKENIZER("<think> 1").input_ids


def test_saving_replaces_a_folder(copy):
    model, tokenizer = load_model(copy, "cpu"), load_tokenizer(copy)
    (copy / "of before").write_text("")
    with torch.no_grad():
        model.model.norm.weight.fill_(3)
    save_model(model, tokenizer, copy)
    assert (load_model(copy, "cpu").model.norm.weight == 3).all()
    assert not (copy / "of before").exists()
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_interrupted_saving_leaves_the_folder_as_it_was(copy, monkeypatch):
    model, tokenizer = load_model(copy, "cpu"), load_tokenizer(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full_disk(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tokenizer, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_folder_that_cannot_be_replaced_comes_back(copy, monkeypatch):
    model, tokenizer = load_model(copy, "cpu"), load_tokenizer(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    rename = Path.replace

    def fail_once_complete(path, target):
        if path.suffix == ".unfinished":
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fail_once_complete)
    with pytest.raises(PermissionError):
        save_model(model, tokenizer, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_gradient_checkpointing_changes_no_gradient(folder):
    gradients = []
    for gradient_checkpointing in (False, True):
        model = load_model(folder, "cpu", gradient_checkpointing=gradient_checkpointing).train()
        assert model.is_gradient_checkpointing == gradient_checkpointing
        model(torch.tensor([[5, 6, 7]]), use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_chosen_by_name(folder, attention):
    assert load_model(folder, "cpu", attention=attention).config._attn_implementation == attention


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_needs_its_package(folder):
    with pytest.raises(ValueError, match=r"flash-attn, which is not installed; choose sdpa"):
        load_model(folder, "cpu", attention="flash_attention_2")


def test_a_missing_pad_token_becomes_the_end_of_sequence(copy):
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    tokenizer = load_tokenizer(copy)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == TOKENIZER.eos_token_id


def test_a_tokenizer_without_an_end_is_refused(copy):
    path = copy / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"eos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config))
    (copy / "config.json").unlink()  # so that transformers does not add Qwen2's own
    with pytest.raises(ValueError, match=r"has no end-of-sequence token; name it in tokenizer_config.json"):
        load_tokenizer(copy)


def test_missing_folders_and_files(copy, tmp_path):
    for load in (load_tokenizer, lambda path: load_model(path, "cpu"), model_folder):
        with pytest.raises(FileNotFoundError, match=r"nowhere is neither a folder nor a model .* fetch-model"):
            load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nobody/nothing is neither a folder nor a model"):
        model_folder("nobody/nothing")  # tests are offline
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.json"):
        load_tokenizer(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_model(copy, "cpu")


def test_damaged_files(copy):
    (copy / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the model in .* cannot be read .*fetch or save it again"):
        load_model(copy, "cpu")
    weights.unlink()
    with pytest.raises(ValueError, match=r"the model in .* cannot be read"):
        load_model(copy, "cpu")
    for text in ("{}", '{"model_type": "unheard of"}', "{"):
        (copy / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json cannot be read .*fetch or save the model again"):
            load_model(copy, "cpu")


def test_missing_weights_are_not_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is incomplete: 1 of its weights .* such as model.norm.weight"):
        load_model(copy, "cpu")


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used here .*; choose auto or cpu"):
            resolve_device(name)
