"""The write-ups: every problem answered, every measured number from a file of results, the same PDF each time."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BASICS = ROOT / "assignment1-basics"
SOURCE = (BASICS / "writeup" / "main.typ").read_text(encoding="utf-8")
PROBLEMS = [
    "unicode1",
    "unicode2",
    "train_bpe_tinystories",
    "train_bpe_expts_owt",
    "tokenizer_experiments",
    "transformer_accounting",
    "learning_rate_tuning",
    "adamwAccounting",
    "experiment_log",
    "learning_rate",
    "batch_size_experiment",
    "generate",
    "layer_norm_ablation",
    "pre_norm_ablation",
    "no_pos_emb",
    "swiglu_ablation",
    "main_experiment",
    "leaderboard",
]
#: Decimal numbers that no run measures: what the course fixes, sizes of models and corpora, roundings and calculations.
TYPED = {
    "2.00": "the course's target", "1.5": "the course's hours", "19.5": "an A100's rate",
    "22.7": "the model's parameters", "12.5": "of which in blocks",
    "2.5": "tokens of the corpus", "2.2": "GB of the course's corpus, and passes over ours", "6.6": "passes over ours",
    "1.0": "a temperature, and tokens of 4000 batches of one", "8.2": "tokens of 4000 batches of eight",
    "0.9": "a top-p", "1.3": "a temperature", "1.6": "a learning rate",
    "0.005": "the least gain that counts", "0.4": "seconds over the clock of 40",
    "0.01": "a rounding of differences that are shown", "0.03": "the same",
}  # fmt: skip


@pytest.fixture(scope="module")
def figures():
    subprocess.run([sys.executable, "-m", "experiments", "figures"], cwd=BASICS, check=True)


def test_every_problem_has_its_heading():
    assert re.findall(r'^#problem\("(\w+)"\)', SOURCE, re.MULTILINE) == sorted(
        PROBLEMS, key=lambda name: SOURCE.index(f'#problem("{name}")')
    )
    assert len({*PROBLEMS}) == len(PROBLEMS)


def test_measured_numbers_resolve():
    """Typst stops at a path that is not there; here with the name of it, and without building anything."""
    paths = re.findall(r'\bm\("(\w+)", "([^"]+)"[,)]', SOURCE)
    assert len(paths) > 40
    for file, path in paths:
        value = json.loads((BASICS / "results" / f"{file}.json").read_text(encoding="utf-8"))
        for part in path.split("/"):
            named = [row for row in value if row.get("name") == part] if isinstance(value, list) else []
            value = named[0] if named else value[int(part)] if isinstance(value, list) else value[part]
        assert isinstance(value, (int, float)), (file, path)


def test_no_measurement_is_typed_by_hand():
    prose = re.sub(r"^(#import|#let|#show).*|//.*", "", SOURCE, flags=re.MULTILINE)
    prose = re.sub(r'"[^"]*"|stroke: [\d.]+pt|times: \S+|[\d.]+(pt|cm|em|%)', "", prose)
    typed = set(re.findall(r"\d+\.\d+", prose))
    assert typed <= {*TYPED}, f"take {typed - {*TYPED}} from results/ with #m, or say in TYPED what they are"


@pytest.mark.usefixtures("figures")
def test_the_pdf_is_the_same_each_time(tmp_path):
    """Both with what `make writeups` uses, and without a change to the repository."""
    python = ROOT / ".venv" / "bin" / "python"
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        subprocess.run([python, ROOT / "tools" / "build_writeups.py", "--out", folder], check=True)
    pdf = (first / "writeup1.pdf").read_bytes()
    assert pdf.startswith(b"%PDF")
    assert pdf == (second / "writeup1.pdf").read_bytes()
    assert b"/Count 21" not in pdf  # at most 20 pages: /Count of the page tree
