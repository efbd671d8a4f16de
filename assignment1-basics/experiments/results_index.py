"""The index of `results/`: which line of which document cites each file."""

import re
from dataclasses import dataclass
from pathlib import Path

from experiments.results import RESULTS

PACKAGE = RESULTS.parent
#: Documents of the package, whose lines are named.
DOCUMENTS = ("README.md", "LOG.md", "writeup/main.typ")
#: Documents outside the package, which is also used alone: only the file is named.
OTHER_DOCUMENTS = ("../README.md",)


@dataclass(frozen=True)
class ResultsIndex:
    """Write results/README.md: every file of results, and the lines of the documents that cite it."""

    out: Path = RESULTS
    """Folder to write README.md to."""

    def execute(self) -> None:
        """Write the index."""
        path = self.out / "README.md"
        path.write_text(index(), encoding="utf-8")
        print(f"written: {path}")


def index() -> str:
    """Return the text of the index."""
    lines = [
        "# Results",
        "",
        "Each file records the commit, the command, the versions and the device it was measured with. This index of",
        "the documents that cite them is written by `python -m experiments results-index`.",
        "",
        "| file | cited in |",
        "|---|---|",
    ]
    for path in files():
        name = path.relative_to(RESULTS).as_posix()
        lines.append(f"| [{name}]({name}) | {', '.join(citations(path)) or 'nowhere'} |")
    return "\n".join(lines) + "\n"


def files() -> list[Path]:
    """List the files of results."""
    return sorted(path for path in RESULTS.rglob("*") if path.is_file() and path.name != "README.md")


def citations(path: Path) -> list[str]:
    """List the places that cite a file: by its name, or in the write-up by its stem in quotes."""
    cites = re.compile(rf'\b{re.escape(path.name)}\b|"{re.escape(path.stem)}"')
    found = []
    for document in DOCUMENTS:
        text = (PACKAGE / document).read_text(encoding="utf-8")
        numbers = [str(number) for number, line in enumerate(text.splitlines(), start=1) if cites.search(line)]
        if numbers:
            found.append(f"[{document}](../{document}) {_shortened(numbers)}")
    for document in OTHER_DOCUMENTS:
        outside = PACKAGE / document
        if outside.exists() and cites.search(outside.read_text(encoding="utf-8")):
            found.append(f"[{document}](../{document})")
    return found


def _shortened(numbers: list[str]) -> str:
    """Name the first three lines, and how many more there are."""
    more = f" and {len(numbers) - 3} more" if len(numbers) > 3 else ""
    return f"line {', '.join(numbers[:3])}{more}"
