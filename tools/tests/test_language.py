"""One vocabulary: expressions that GLOSSARY.md rules out appear nowhere else."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
GLOSSARY = ROOT / "GLOSSARY.md"


def ruled_out(text: str) -> list[str]:
    """The expressions in the table's last column and in the paragraph on style."""
    rows = [line.removesuffix("|").rsplit("|", 1)[1] for line in text.splitlines() if re.match(r"\| .*\|", line)]
    style = text.partition("\nStyle,")[2]
    return [expression for part in [*rows[1:], style] for expression in re.findall(r"`([^`]+)`", part)]


def sources() -> list[Path]:
    """What is written by hand: code, documents and the write-ups' sources."""
    command = [
        "git",
        "ls-files",
        "--cached",
        "--others",
        "--exclude-standard",
        "*.py",
        "*.md",
        "*.typ",
        "*.toml",
        "Makefile",
    ]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    return [ROOT / name for name in listed if ROOT / name != GLOSSARY and (ROOT / name).is_file()]


def test_the_glossary_rules_something_out():
    expressions = ruled_out(GLOSSARY.read_text())
    assert {"process 0", "LayerCache", "how manieth"} <= set(expressions)
    assert not any("|" in expression for expression in expressions)


@pytest.mark.parametrize("expression", ruled_out(GLOSSARY.read_text()))
def test_no_source_uses_what_the_glossary_rules_out(expression):
    pattern = re.compile(rf"(?<![\w-]){re.escape(expression)}", re.IGNORECASE)
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in sources()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if pattern.search(line) and path != Path(__file__) and not (path.name == "LOG.md" and line.startswith("|"))
    ]
    assert not found, f"{expression!r} is ruled out by GLOSSARY.md, but is in {', '.join(found)}"
