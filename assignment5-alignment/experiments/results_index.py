"""The index of results: which document cites which file.

python -m experiments.results_index      writes results/README.md
"""

import re
from pathlib import Path

from experiments.results import RESULTS

DOCUMENTS = ("README.md", "LOG.md")
HEAD = """# Results

Each file records what was measured, the command, the versions, the machine and the date. This index is written by
`python -m experiments.results_index`; a test fails if it is out of date.

| file | cited in |
|---|---|
"""


def make_index(folder: Path = RESULTS) -> str:
    """Make the text of the index: a row per file, with the sections of the package's documents that link to it.

    Raises:
        ValueError: no document cites one of the files.
    """
    rows = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"):
        name = path.relative_to(folder).as_posix()
        citations = [citation for document in DOCUMENTS for citation in _citations(folder.parent / document, name)]
        if not citations:
            raise ValueError(f"no document cites results/{name}; cite it in README.md or LOG.md, or delete it")
        rows.append(f"| [{name}]({name}) | {', '.join(citations)} |\n")
    return HEAD + "".join(rows)


def _citations(document: Path, name: str) -> list[str]:
    """Return links to the sections of a document that link to a file."""
    sections = re.split(r"^## ", document.read_text(encoding="utf-8"), flags=re.MULTILINE)
    headings = [section.partition("\n")[0] for section in sections[1:] if f"(results/{name})" in section]
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return [f"[{document.name}: {heading}](../{document.name}#{anchor})" for heading, anchor in zip(headings, anchors)]


if __name__ == "__main__":
    (RESULTS / "README.md").write_text(make_index(), encoding="utf-8")
