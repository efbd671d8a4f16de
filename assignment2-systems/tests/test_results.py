"""The index of the results is current, and every file of results is cited."""

from writeup.results_index import RESULTS, citations, files, index


def test_the_index_is_current():
    assert (RESULTS / "README.md").read_text(encoding="utf-8") == index(), "run python -m writeup.results_index"


def test_every_file_is_cited():
    assert [str(path) for path in files() if not citations(path)] == []


def test_base_names_are_unique():
    """Documents name a file without its folder."""
    names = [path.name for path in files() if path.parent.name != "profiles"]
    assert len(names) == len(set(names))
