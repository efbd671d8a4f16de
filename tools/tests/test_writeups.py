"""The write-ups: every problem answered, every measured number from a file of results, the same PDF each time."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
#: The package of a write-up -> the problems it answers.
PROBLEMS = {
    "assignment1-basics": [
        "unicode1", "unicode2", "train_bpe_tinystories", "train_bpe_expts_owt", "tokenizer_experiments",
        "transformer_accounting", "learning_rate_tuning", "adamwAccounting", "experiment_log", "learning_rate",
        "batch_size_experiment", "generate", "layer_norm_ablation", "pre_norm_ablation", "no_pos_emb",
        "swiglu_ablation", "main_experiment", "leaderboard",
    ],
    "assignment2-systems": [
        "benchmarking_script", "nsys_profile", "mixed_precision_accumulation", "benchmarking_mixed_precision",
        "memory_profiling", "pytorch_attention", "torch_compile", "flash_forward", "flash_backward",
        "flash_benchmarking", "leaderboard", "distributed_communication_single_node", "naive_ddp",
        "naive_ddp_benchmarking", "minimal_ddp_flat_benchmarking", "ddp_overlap_individual_parameters",
        "ddp_overlap_individual_parameters_benchmarking", "ddp_overlap_bucketed", "ddp_bucketed_benchmarking",
        "communication_accounting", "optimizer_state_sharding", "optimizer_state_sharding_accounting",
        "gradient_checkpointing", "fsdp_accounting", "fsdp", "alternate_ring_all_reduce", "data_parallel_calcs",
        "fsdp_calcs", "tp_calcs", "fsdp_tp_calcs", "leaderboard_2026",
    ],
}  # fmt: skip
#: Decimal numbers that no run measures: what the course fixes, sizes of models and corpora, roundings and calculations.
TYPED = {
    "assignment1-basics": {
        "2.00": "the course's target", "1.5": "the course's hours", "19.5": "an A100's rate",
        "22.7": "the model's parameters", "12.5": "of which in blocks",
        "2.5": "tokens of the corpus", "2.2": "GB of the course's corpus, and passes over ours",
        "6.6": "passes over ours",
        "1.0": "a temperature, and tokens of 4000 batches of one", "8.2": "tokens of 4000 batches of eight",
        "0.9": "a top-p", "1.3": "a temperature", "1.6": "a learning rate",
        "0.005": "the least gain that counts", "0.4": "seconds over the clock of 40",
        "0.01": "a rounding of differences that are shown", "0.03": "the same",
    },
    "assignment2-systems": {
        "2.11": "torch", "3.6": "Triton", "0.01": "the addend", "0.03": "bfloat16's step at 4",
        "3.4": "billion parameters of the 2.7B model", "2.7": "its name", "2.1": "billion exponentials, counted",
        "2.0": "billion parameters of xl", "8.0": "GB of them in float32", "8.13": "billion parameters",
        "3.84": "the public best, in s", "8.5": "% of a run without a file", "4.6": "the course's C",
    },
}  # fmt: skip


def source(package):
    return (ROOT / package / "writeup" / "main.typ").read_text(encoding="utf-8")


def value_at(data, path):
    """What `value-at` of the template finds."""
    for part in path.split("/"):
        part = part.replace("|", "/")
        if not isinstance(data, list):
            data = data[part]
        elif "=" in part:
            wanted = dict(condition.split("=") for condition in part.split(","))
            [data] = [row for row in data if all(_shown(row.get(key)) == value for key, value in wanted.items())]
        else:
            named = [row for row in data if row.get("name") == part]
            data = named[0] if named else data[int(part)]
    return data


def _shown(value):
    return f"{value:g}" if isinstance(value, float) else str(value)


@pytest.fixture(scope="module")
def figures():
    subprocess.run([sys.executable, "-m", "experiments", "figures"], cwd=ROOT / "assignment1-basics", check=True)
    systems = ROOT / "assignment2-systems"
    subprocess.run([systems / ".venv/bin/python", "-m", "writeup.figures"], cwd=systems, check=True)


@pytest.mark.parametrize("package", PROBLEMS)
def test_every_problem_has_its_heading(package):
    headings = re.findall(r'^#problem\("(\w+)"\)', source(package), re.MULTILINE)
    assert sorted(headings) == sorted(PROBLEMS[package])


@pytest.mark.parametrize(("package", "least"), [("assignment1-basics", 40), ("assignment2-systems", 30)])
def test_measured_numbers_resolve(package, least):
    """Typst stops at a path that is not there; here with the name of it, and without building anything."""
    paths = re.findall(r'\bm\("(\w+)", "([^"]+)"[,)]', source(package))
    assert len(paths) > least
    for file, path in paths:
        [found] = (ROOT / package / "results").rglob(f"{file}.json")
        text = found.read_text(encoding="utf-8")
        for older, newer in (("fp32", "float32"), ("bf16", "bfloat16")):  # as main.typ of Assignment 2 does
            text = text.replace(f'"{older}"', f'"{newer}"')
        data = json.loads(text)
        assert isinstance(value_at(data, path), (int, float)), (file, path)


@pytest.mark.parametrize("package", PROBLEMS)
def test_no_measurement_is_typed_by_hand(package):
    prose = re.sub(r"^(#import|#let|#show).*|//.*", "", source(package), flags=re.MULTILINE)
    prose = re.sub(r'"[^"]*"|stroke: [\d.]+pt|times: \S+|[\d.]+(pt|cm|em|%)', "", prose)
    typed, known = set(re.findall(r"\d+\.\d+", prose)), {*TYPED[package]}
    assert typed <= known, f"take {typed - known} from results/ with #m, or say in TYPED what they are"


@pytest.mark.usefixtures("figures")
def test_the_pdf_is_the_same_each_time(tmp_path):
    """Both with what `make writeups` uses, and without a change to the repository."""
    python = ROOT / ".venv" / "bin" / "python"
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        subprocess.run([python, ROOT / "tools" / "build_writeups.py", "--out", folder], check=True)
    for name in ("writeup1.pdf", "writeup2.pdf"):
        pdf = (first / name).read_bytes()
        assert pdf.startswith(b"%PDF")
        assert pdf == (second / name).read_bytes()
