"""The command line: help for everything, runs from end to end, and one sentence for every mistake."""

import json
import re
import subprocess
import sys

import pytest

from cs336_alignment import cli
from cs336_alignment.policy import fetch, tiny_model
from cs336_alignment.programs.configs.evaluate import BENCHMARKS
from cs336_alignment.run_folder import read_metrics
from cs336_alignment.runs.checkpoint import latest_checkpoint
from tests.tiny_task import TinyTask, write_rows

ON_CPU = ["--precision", "float32", "--engine", "transformers", "--engine-device", "cpu"]


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return TinyTask.make(tmp_path_factory.mktemp("task"))


@pytest.fixture
def training(task, tmp_path):
    """Options of all training programs, on the CPU."""
    return ["--run", tmp_path / "run", "--model", task.folder / "model", "--device", "cpu", "--precision", "float32"]


@pytest.fixture
def asking(task):
    """Options of the rollouts of a tiny model."""
    return [
        "--prompt", task.folder / "sum.prompt", "--stop", "</answer>", "--max-tokens", 8, "--grading-workers", 1,
        "--engine", "transformers", "--eval-data", task.folder / "test.jsonl", "--eval-examples", 4,
    ]  # fmt: skip


def run(*arguments):
    cli.main([str(argument) for argument in arguments])


def fails(capsys, *arguments):
    """Run a command that must fail, and return its message, which must be one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cs336-alignment {arguments[0]}: ")
    return line


def refused(capsys, *arguments):
    """Return the message for invalid options, which is in a box that points to the help."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    message = " ".join(re.sub("[│|]", " ", capsys.readouterr().err).split())
    assert f"cs336-alignment {arguments[0]}" in message
    assert "Traceback" not in message
    return message


def shown_help(capsys, *arguments):
    with pytest.raises(SystemExit) as caught:
        run(*arguments, "--help")
    assert caught.value.code == 0
    return capsys.readouterr().out


class TestHelp:
    @pytest.mark.parametrize("command", ["", *cli.COMMANDS, "evaluate mmlu"])
    def test_it_comes_without_the_slow_imports(self, command):
        """`--help` of every command takes less than a second of CPU, because nothing heavy is imported."""
        program = f"import sys; sys.argv = {['cs336-alignment', *command.split(), '--help']}\n"
        program += "from cs336_alignment.__main__ import main\ntry: main()\n"
        program += "finally: print(sorted({'torch', 'transformers', 'sympy', 'vllm'} & sys.modules.keys()))"
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert result.stdout.splitlines()[-1] == "[]"

    def test_the_list_of_commands(self):
        command = [sys.executable, "-m", "cs336_alignment", "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        for name in cli.COMMANDS:
            assert re.search(rf"• {name} +[A-Z]", result.stdout)

    def test_it_runs_as_a_module(self):
        command = [sys.executable, "-m", "cs336_alignment", "fetch-model", "--help"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "SmolLM2" in result.stdout

    @pytest.mark.parametrize("command", [*cli.COMMANDS, *(f"evaluate {name}" for name in BENCHMARKS)])
    def test_every_option_is_explained(self, command, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "80")
        out = shown_help(capsys, *command.split())
        expected = cli.COMMANDS[command].description if command in cli.COMMANDS else ""
        _usage, *about, boxes = out.split("\n\n", maxsplit=2 + expected.count("\n\n"))
        assert max(map(len, boxes.splitlines())) <= 80
        if command in cli.COMMANDS:
            assert "\n\n".join(about) == expected
        lines = re.sub("[│|]", " ", boxes).splitlines()
        options = [line.split()[0].rstrip(",") for line in lines if line.strip().startswith("--")]
        assert options or command in ("evaluate", "fetch-model")
        text = " ".join(" ".join(lines).split())
        assert {*cli.COMMANDS.get(command, cli.COMMANDS["demo"]).common} <= {*options}
        for option in options:
            rest = text.split(option, 1)[1].split("(default")[0].split("(required")[0]
            assert re.search(r"[A-Za-z'] [a-z]", rest), option

    def test_without_a_command(self, capsys):
        for arguments in ([], ["grow"], ["--verbose"]):
            with pytest.raises(SystemExit) as caught:
                run(*arguments)
            assert caught.value.code == 2
            assert "expert-iteration" in capsys.readouterr().err


class TestDefaults:
    """The defaults are the course's."""

    def test_grpo(self):
        config = cli.load("grpo")()
        expected = {
            "n_grpo_steps": 200, "advantage_eps": 1e-6, "rollout_batch_size": 256, "group_size": 8, "min_tokens": 4,
            "epochs_per_rollout_batch": 1, "train_batch_size": 256, "loss_type": "reinforce_with_baseline",
            "use_std_normalization": True, "cliprange": 0.2,
        }  # fmt: skip
        assert {name: getattr(config, name) for name in expected} == expected
        assert (config.rollouts.temperature, config.rollouts.max_tokens) == (1.0, 1024)
        assert config.rollouts.engine.gpu_memory_utilization == 0.85
        optimizer = config.optimizer
        assert (optimizer.lr, optimizer.weight_decay, optimizer.betas) == (1e-5, 0.0, (0.9, 0.95))
        assert (optimizer.max_grad_norm, optimizer.gradient_accumulation_steps) == (1.0, 128)
        assert config.evaluation.eval_examples >= 1024

    def test_expert_iteration(self):
        config = cli.load("expert-iteration")()
        assert (config.n_ei_steps, config.min_tokens) == (5, 4)
        assert config.question_batch_size in (512, 1024, 2048)

    def test_sft(self):
        config = cli.load("sft")()
        assert (config.optimizer.max_grad_norm, config.precision) == (1.0, "bfloat16")


class TestPrograms:
    def test_sft_then_evaluate_its_checkpoint(self, task, tmp_path, training, asking, capsys):
        options = [*training, *asking, "--train-data", task.folder / "sft.jsonl", "--batch-size", 20]
        run("sft", *options, "--gradient-accumulation-steps", 2, "--lr", 0.01)
        out = capsys.readouterr().out
        checkpoint = latest_checkpoint(tmp_path / "run")
        assert f"the model: {checkpoint}\n" in out
        assert re.search(r"eval/reward +0", out)
        assert "seconds" not in out
        assert read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["eval_step"] == 2

        options = ["--model", checkpoint, "--data", task.folder / "test.jsonl", *asking[:8], *ON_CPU]
        run("evaluate", *options, "--output", tmp_path / "evaluation")
        assert re.search(r"examples +16\n", capsys.readouterr().out)
        stored = json.loads((tmp_path / "evaluation" / "metrics.json").read_text())
        assert stored["examples"] == 16
        run("evaluate", "gsm8k", *options, "--output", tmp_path / "evaluation", "--kind", "None", "--max-examples", 2)
        stored = json.loads((tmp_path / "evaluation" / "config.json").read_text())["config"]
        assert (stored["rollouts"]["reward"], stored["max_examples"]) == ("gsm8k", 2)

    def test_expert_iteration_and_grpo(self, task, tmp_path, training, asking, capsys):
        data = ["--train-data", task.folder / "train.jsonl"]
        run(
            "expert-iteration", *training, *asking, *data, "--n-ei-steps", 1, "--question-batch-size", 4,
            "--rollouts-per-question", 2, "--min-tokens", 1,
        )  # fmt: skip
        assert "eval/format_reward" in capsys.readouterr().out
        options = ["--rollout-batch-size", 4, "--group-size", 2, "--train-batch-size", 4, "--min-tokens", 1]
        grpo = [*training, *asking, *data, *options, "--n-grpo-steps", 1, "--gradient-accumulation-steps", 2]
        run("grpo", *grpo, "--run", tmp_path / "grpo", "--loss-type", "dr_grpo")
        assert f"written: {tmp_path / 'grpo'}/" in capsys.readouterr().out
        assert json.loads((tmp_path / "grpo" / "config.json").read_text())["config"]["loss_type"] == "dr_grpo"

    def test_dpo_and_instruction_tune(self, task, tmp_path, training, capsys):
        model = tiny_model.make_tiny_model(tmp_path / "model", hidden_size=32, layers=1, context_length=512)
        pairs = [{"prompt": f"{n}?", "chosen": "Yes", "rejected": "No"} for n in range(6)]
        write_rows(tmp_path / "pairs.jsonl", pairs)
        options = [*training, "--model", model, "--batch-size", 2, "--gradient-accumulation-steps", 1]
        run("dpo", *options, "--train-data", tmp_path / "pairs.jsonl", "--held-out-pairs", 2)
        assert re.search(r"eval/accuracy +\d", capsys.readouterr().out)
        for name, numbers in (("train", range(8)), ("test", range(10, 14))):
            write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{n}?", "response": "Yes"} for n in numbers])
        files = ["--train-data", tmp_path / "train.jsonl", "--eval-data", tmp_path / "test.jsonl"]
        run("instruction-tune", *options, *files, "--run", tmp_path / "tuned", "--seq-length", 256)
        assert re.search(r"eval/loss +\d\.\d", capsys.readouterr().out)

    def test_generate(self, task, capsys):
        options = ["--model", task.folder / "model", "--prompt", "None", "--max-tokens", 3, "--n", 2]
        run("generate", "1+1=", "2+2=", *options, *ON_CPU)
        assert re.findall(r"^---.*", capsys.readouterr().out, re.M) == [
            f"--- question {question}, sample {sample}" for question in (1, 2) for sample in (1, 2)
        ]

    def test_fetch_model(self, task, tmp_path, capsys, monkeypatch):
        model = task.folder / "model"
        run("fetch-model", model, "-o", tmp_path / "fetched")
        out = capsys.readouterr().out
        assert out.startswith(f"{tmp_path / 'fetched'}: ")
        assert f"--model {tmp_path / 'fetched'}\n" in out
        assert (tmp_path / "fetched" / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
        assert "use the model as it is" in fails(capsys, "fetch-model", model, "-o", model)
        assert "has no config.json" in fails(capsys, "fetch-model", tmp_path)

        fetched = []
        monkeypatch.setattr(fetch, "fetch_model", lambda *args: fetched.append(args) or model)
        run("fetch-model", "Qwen/Qwen2.5-Math-1.5B")
        run("fetch_model", "smollm")
        assert [(name, str(folder)) for name, folder in fetched] == [
            ("Qwen/Qwen2.5-Math-1.5B", "models/Qwen2.5-Math-1.5B"), ("smollm", "models/smollm")
        ]  # fmt: skip


class TestMistakes:
    def test_of_training(self, task, tmp_path, training, asking, capsys):
        data = ["--train-data", task.folder / "train.jsonl"]
        absent = [*training, "--train-data", "absent.jsonl"]
        for command in ("sft", "expert-iteration", "grpo", "dpo", "instruction-tune"):
            assert "there is no data file absent.jsonl" in fails(capsys, command, *absent)
        message = fails(capsys, "grpo", *training, *data, *asking, "--model", tmp_path / "nowhere")
        assert "nowhere is neither a folder nor a model" in message
        message = fails(capsys, "grpo", *training, *data, *asking, "--device", "cuda:99")
        assert "device 'cuda:99' cannot be used here" in message
        message = fails(capsys, "sft", *training, *asking, "--train-data", task.folder / "train.jsonl")
        assert "train.jsonl, line 1: field 'prompt' is missing; the row has question, trace, answer" in message

    def test_of_options(self, capsys):
        assert "dr_grpo" in refused(capsys, "grpo", "--loss-type", "ppo")
        assert "there is no prompt 'r2': it is neither a file nor one of" in refused(capsys, "grpo", "--prompt", "r2")
        assert "256 must be a multiple of group_size 3" in refused(capsys, "grpo", "--group-size", 3)
        assert "there is no reward 'r2'; choose one of r1_zero" in refused(capsys, "evaluate", "--reward", "r2")
        assert "beta is 0.0, but must be positive" in refused(capsys, "dpo", "--beta", 0)
        assert "temperature is -1.0" in refused(capsys, "generate", "?", "--temperature", -1)
        assert "--n-grpo-step" in refused(capsys, "grpo", "--n-grpo-step", 3)

    def test_of_evaluation_and_generation(self, task, tmp_path, asking, capsys, monkeypatch):
        model = ["--model", task.folder / "model"]
        (tmp_path / "empty").mkdir()
        message = fails(capsys, "generate", "?", *ON_CPU, "--model", tmp_path / "empty")
        assert "empty has no tokenizer.json" in message
        vllm = ["--engine", "vllm", "--engine-device", "cpu", "--data", task.folder / "test.jsonl"]
        monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
        message = fails(capsys, "evaluate", *model, *vllm, "--prompt", task.folder / "sum.prompt")
        assert "the vllm engine needs vLLM, which is not installed; run `uv sync --extra vllm" in message

    def test_of_a_hub_that_cannot_be_reached(self, tmp_path, capsys):
        message = fails(capsys, "fetch-model", "nobody/nothing", "-o", tmp_path / "fetched")
        assert "cannot fetch nobody/nothing from the Hugging Face hub" in message
