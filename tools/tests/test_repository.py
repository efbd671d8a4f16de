"""The Makefile, the locks and the files that two packages share."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LOCKS = sorted([ROOT / "requirements.lock", *ROOT.glob("*/requirements*.lock")])


def make(*arguments: str) -> str:
    command = ["make", "--no-print-directory", *arguments]  # these tests may run under make themselves
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def test_help_lists_every_target():
    phony = re.search(r"^\.PHONY: (.+)$", make("--print-data-base", "--dry-run", "help"), re.MULTILINE)
    assert phony
    listed = [line.split()[0] for line in make("help").partition("\n\n")[0].splitlines()]
    assert sorted(listed) == sorted(phony[1].split())
    assert len(set(listed)) == len(listed)


def test_help_explains_every_variable():
    variables = set(re.findall(r"^([A-Z]+) \?=", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert variables == set(re.findall(r"^([A-Z]+) ", make("help").partition("\n\nvariables\n")[2], re.MULTILINE))


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: str(lock.relative_to(ROOT)))
def test_locks_hold_exact_versions_with_hashes_and_no_addresses(lock):
    text = lock.read_text()
    requirements = [line for line in text.splitlines() if re.match(r"[a-z]", line)]
    assert len(requirements) > 5
    assert all(re.match(r"[a-z0-9._-]+==\S+ .*\\$", line) for line in requirements)
    assert text.count("--hash=sha256:") >= len(requirements)
    assert "://" not in text


@pytest.mark.parametrize("settings", [ROOT / "pyproject.toml", *ROOT.glob("assignment*/pyproject.toml")], ids=str)
def test_nothing_is_compiled_when_it_is_installed(settings):
    assert tomllib.loads(settings.read_text())["tool"]["uv"]["no-build"] is True


@pytest.mark.parametrize("name", ["machine.py", "command.py", "run_folder.py"])
def test_two_packages_have_the_same_copy(name):
    basics, alignment = (list(ROOT.glob(f"{package}*/cs336_*/**/{name}")) for package in ("assignment1", "assignment5"))
    assert basics[0].read_bytes() == alignment[0].read_bytes()
