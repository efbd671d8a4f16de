"""The programs, end to end: from a text to a model that continues it, and one sentence for every mistake."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro
from experiments import __main__ as experiments_main

from cs336_basics import cli
from cs336_basics.demo import DemoConfig, run_demo
from cs336_basics.load_run import load_tokenizer
from cs336_basics.model_config import ModelConfig
from cs336_basics.presets import MODELS, TRAIN

ROOT = Path(__file__).parent.parent
COMMANDS = ["train-bpe", "tokenize", "train", "generate", "accounting", "demo"]
SHAPE = ["--vocab-size", "300", "--context-length", "16", "--d-model", "16", "--num-layers", "1", "--num-heads", "2"]
SHORT = [
    "--steps",
    "6",
    "--batch-size",
    "2",
    "--eval-every",
    "3",
    "--checkpoint-every",
    "3",
    "--device",
    "cpu",
    "--precision",
    "float32",
    "--no-compile",
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(f"The {n} cats sat on {n + 1} mats.\n" for n in range(400)), encoding="utf-8")
    return path


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("cs336-basics: ")
    return message


def test_from_text_to_samples(text, tmp_path, capsys, monkeypatch):
    run("train-bpe", text, "-o", tmp_path / "data", "--vocab-size", 300)
    tokenizer = load_tokenizer(tmp_path / "data")
    for name in ("train", "valid"):
        run("tokenize", text, "-o", tmp_path / "data" / f"{name}.npy", "--tokenizer", tmp_path / "data")
    tokens = np.load(tmp_path / "data" / "train.npy")
    assert tokens.tolist() == tokenizer.encode(text.read_text(encoding="utf-8"))

    files = ["--train-data", tmp_path / "data" / "train.npy", "--valid-data", tmp_path / "data" / "valid.npy"]
    run("train", "tinystories-17m", "--run", tmp_path / "run", *files, *SHAPE, *SHORT)
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert "validation loss" in capsys.readouterr().out

    run("generate", "--run", tmp_path / "run", "--prompt", "The cat", "--max-new-tokens", 5, "--device", "cpu")
    first = capsys.readouterr().out
    assert first.startswith("The cat")
    run("generate", "--run", tmp_path / "run", "--prompt", "The cat", "", "--max-new-tokens", 5, "--device", "cpu")
    assert capsys.readouterr().out.startswith("--- 1\nThe cat")

    typed = iter(["The", "\udcff", "", "never read"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    options = ["--prompt", "A cat", "--interactive", "--max-new-tokens", 3, "--device", "cpu"]
    run("generate", "--run", tmp_path / "run", *options)
    out = capsys.readouterr().out
    assert out.startswith("A cat")
    assert "\nThe" in out
    assert next(typed) == "never read"

    other = tmp_path / "other"
    run("train-bpe", text, "-o", other, "--vocab-size", 280)
    message = fails(capsys, "generate", "--run", tmp_path / "run", "--tokenizer", other, "--device", "cpu")
    assert "the tokenizer has 280 tokens, but the model 300" in message


def test_special_tokens_of_ones_own(text, tmp_path, capsys):
    text.write_text(text.read_text(encoding="utf-8").replace("<|endoftext|>", "<eos>"), encoding="utf-8")
    own = ["--special-tokens", "<eos>"]
    run("train-bpe", text, "-o", tmp_path / "data", "--vocab-size", 300, *own)
    run("tokenize", text, "-o", tmp_path / "data" / "t.npy", "--tokenizer", tmp_path / "data", *own)
    files = ["--train-data", tmp_path / "data" / "t.npy", "--valid-data", tmp_path / "data" / "t.npy"]
    run("train", "tinystories-17m", "--run", tmp_path / "run", *files, *SHAPE, *SHORT)
    run("generate", "--run", tmp_path / "run", "--max-new-tokens", 5, "--device", "cpu", *own)
    assert "written" in capsys.readouterr().out


def test_mistakes_are_one_sentence(text, tmp_path, capsys):
    assert "there is no text" in fails(capsys, "train-bpe", tmp_path / "absent.txt", "-o", tmp_path)
    assert "vocab_size is 3" in fails(capsys, "train-bpe", text, "-o", tmp_path, "--vocab-size", 3)
    assert "has no vocab.json" in fails(capsys, "tokenize", text, "-o", tmp_path / "a.npy", "--tokenizer", tmp_path)
    assert "must end in .npy" in fails(capsys, "tokenize", text, "-o", tmp_path / "a.bin", "--tokenizer", tmp_path)
    assert "there is no token file" in fails(
        capsys, "train", "owt", "--run", tmp_path / "r", "--train-data", tmp_path / "x"
    )
    assert "is not a run folder" in fails(capsys, "generate", "--run", tmp_path / "nowhere")
    assert "batch_size is 0" in fails(capsys, "accounting", "gpt2-xl", "--batch-size", 0)
    (tmp_path / "bad.txt").write_bytes(b"good" * 10 + b"\xff")
    assert "byte 0xff at offset 40" in fails(capsys, "train-bpe", tmp_path / "bad.txt", "-o", tmp_path)


@pytest.mark.parametrize("command", [*COMMANDS, *(f"train {preset}" for preset in TRAIN)])
def test_help_explains_every_field(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.replace("│", " ").splitlines()
    options = [line.split() for line in lines if line.strip().startswith("--")]
    assert command == "train" or options
    text = " ".join(" ".join(lines).split())
    for words in options:
        rest = text.split(words[0], 1)[1]
        assert any(letter.islower() for letter in rest.split("(default")[0].split("(required")[0]), words[0]


#: Packages that take seconds to import, or that no command needs for its help.
HEAVY = ["torch", "transformers", "sympy", "numpy", "matplotlib", "huggingface_hub", "tiktoken", "tokenizers"]
SHOW_HELP = """
import importlib, sys
for program, commands in zip(["cs336_basics.__main__", "experiments.__main__", "cs336_basics.download"], sys.argv[1:]):
    main = importlib.import_module(program).main
    for command in ["", *commands.split(",")]:
        sys.argv = [program, *command.split(), "--help"]
        try:
            main()
        except SystemExit as ended:
            assert ended.code == 0
"""


def test_help_imports_nothing_heavy():
    commands = ",".join([*COMMANDS, *(f"train {preset}" for preset in TRAIN)])
    program = SHOW_HELP + f"assert not (found := [name for name in {HEAVY} if name in sys.modules]), found"
    arguments = [commands, ",".join(experiments_main.COMMANDS), ""]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "--vocab-size" in done.stdout
    assert "--out" in done.stdout


def test_presets_are_the_courses():
    _, base = TRAIN["tinystories-17m"]
    assert base.steps * base.batch_size * base.model.context_length == 327_680_000
    assert (base.model.vocab_size, base.model.d_model, base.model.ffn_width) == (10_000, 512, 1344)
    _, small = TRAIN["tinystories-40m-tokens"]
    assert small.steps * small.batch_size * small.model.context_length == 40_960_000
    assert MODELS["gpt2-xl"] == ModelConfig(50_257, 1024, 1600, 48, 25, 6400)


@pytest.mark.parametrize("name", ["gpt2-xl", "tinystories-17m"])
def test_accounting_prints_its_tables(name, capsys):
    run("accounting", name, "--context-length", 2048)
    out = capsys.readouterr().out
    assert "language-model head" in out
    assert "largest batch in 80 GB" in out


def test_it_runs_as_a_module_without_wandb():
    program = "import sys, runpy; sys.modules['wandb'] = None; sys.argv = ['cs336-basics', 'accounting', 'gpt2-small']"
    program += "; runpy.run_module('cs336_basics', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "190,460,160" in result.stdout  # parameters


def tiny_demo(tmp_path, **changes):
    options = {"run_dir": tmp_path / "demo", "steps": 4, "batch_size": 2, "model": ModelConfig(300, 16, 16, 1, 2)}
    return DemoConfig(**{**options, **changes})


def test_demo_on_the_standard_library_and_again(tmp_path, capsys):
    run_demo(tiny_demo(tmp_path))
    out = capsys.readouterr().out
    assert "modules of your Python's standard library" in out
    assert out.count("sample ") == 3
    assert {"loss.png", "metrics.jsonl", "config.json", "checkpoints", "data"} <= {
        p.name for p in (tmp_path / "demo").iterdir()
    }
    run_demo(tiny_demo(tmp_path))
    again = capsys.readouterr()
    assert "has its corpus and tokenizer already" in again.out.replace("\n", "")
    assert "is complete" in again.err


def test_demo_on_a_text(text, tmp_path, capsys):
    run_demo(tiny_demo(tmp_path, data=text, prompt="The "))
    assert f"characters of {text}" in capsys.readouterr().out.replace("\n", "")
    tokenizer = load_tokenizer(tmp_path / "demo" / "data")
    decoded = "".join(
        tokenizer.decode(np.load(tmp_path / "demo" / "data" / f"{n}.npy").tolist()) for n in ("train", "valid")
    )
    assert decoded.removesuffix("<|endoftext|>") == text.read_text(encoding="utf-8")
    text.write_text(text.read_text(encoding="utf-8") * 2, encoding="utf-8")
    with pytest.raises(ValueError, match="holds a demo of another text"):
        run_demo(tiny_demo(tmp_path, data=text))


def test_demo_says_what_is_wrong_with_a_text(tmp_path, capsys):
    assert "there is no text" in fails(capsys, "demo", "--data", tmp_path / "absent.txt", "--run", tmp_path / "d")
    for where in (100, -1):  # a document that ends too early or too late for the text to be split there
        lines = [f"line {number} of a long text\n" for number in range(1000)]
        lines.insert(where if where > 0 else len(lines), "<|endoftext|>")
        (tmp_path / "one.txt").write_text("".join(lines))
        run_demo(tiny_demo(tmp_path, data=tmp_path / "one.txt", run_dir=tmp_path / f"one{where}"))
    (tmp_path / "short.txt").write_text("too short")
    assert "is too short" in fails(capsys, "demo", "--data", tmp_path / "short.txt", "--run", tmp_path / "d")


def test_train_options_follow_the_preset():
    (command,) = [tyro.cli(cli.Command, args=["train", "owt", "--d-model", "256"], config=(tyro.conf.OmitArgPrefixes,))]
    assert command.config.model.vocab_size == 32_000
    assert (command.config.model.d_model, command.config.model.ffn_width) == (256, 704)


def test_options_keep_their_older_names():
    words = ["train", "owt", "--run", "a", "--eval-windows", "3", "--optimizer", "muon"]
    (command,) = [tyro.cli(cli.Command, args=words, config=(tyro.conf.OmitArgPrefixes,))]
    config = command.config
    assert (str(config.run_dir), config.eval_sequences, config.optimizer.name) == ("a", 3, "muon")
