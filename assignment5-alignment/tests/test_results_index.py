"""The index of results is up to date, and every result is cited."""

import pytest
from experiments.results_index import RESULTS, make_index


def test_the_index_is_up_to_date():
    stored = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert stored == make_index(), "run `python -m experiments.results_index`"


def test_a_result_that_no_document_cites_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("# A\n\n## Speed, measured\n\nSee [it](results/speed/cpu.json).\n")
    (tmp_path / "LOG.md").write_text("# Log\n")
    (tmp_path / "results" / "speed").mkdir(parents=True)
    (tmp_path / "results" / "speed" / "cpu.json").write_text("{}")
    row = "| [speed/cpu.json](speed/cpu.json) | [README.md: Speed, measured](../README.md#speed-measured) |\n"
    assert make_index(tmp_path / "results").endswith(row)
    (tmp_path / "results" / "speed" / "gpu.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no document cites results/speed/gpu\.json; cite it"):
        make_index(tmp_path / "results")
