"""The indexes of results are up to date, and every file of results is cited."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from results_index import PACKAGES, ROOT, files, index


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_the_index_is_up_to_date(package):
    stored = (package / "results" / "README.md").read_text(encoding="utf-8")
    assert stored == index(package), "run `python tools/results_index.py`"


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_base_names_are_unique(package):
    """Documents name a file without its folder."""
    names = [path.name for path in files(package) if path.parent.name != "profiles"]
    assert names
    assert len(names) == len(set(names))


def test_the_documents_of_assignment_5_link_to_every_file():
    package = ROOT / "assignment5-alignment"
    documents = "".join((package / name).read_text(encoding="utf-8") for name in ("README.md", "LOG.md"))
    assert [str(path) for path in files(package) if f"(results/{path})" not in documents] == []


def test_a_result_that_no_document_cites_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# A\n\n## Speed, measured\n\nSee [it](results/speed/cpu.json).\n")
    (tmp_path / "results" / "speed").mkdir(parents=True)
    (tmp_path / "results" / "speed" / "cpu.json").write_text('{"command": "run --all"}')
    row = "| [speed/cpu.json](speed/cpu.json) | [README.md](../README.md): Speed, measured | `run --all` |\n"
    assert index(tmp_path).endswith(row)
    (tmp_path / "results" / "speed" / "gpu.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no document cites results/speed/gpu\.json; cite it"):
        index(tmp_path)
