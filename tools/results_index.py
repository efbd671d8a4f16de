"""Write `results/README.md` of every package: the documents that cite each file, and the command that wrote it.

    python tools/results_index.py

A citation is given by its section, so an index stays valid when lines of a document move. A test fails if an index is
out of date, or if there is a file that no document cites.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(results.parent for results in ROOT.glob("assignment*/results"))
#: Documents of a package whose citations count.
DOCUMENTS = ("README.md", "LOG.md", "writeup/main.typ", "writeup/figures.py", "experiments/figures.py", "../README.md")
#: How a section of a document begins, by the document's suffix.
HEADINGS = {".md": r"^##+ (.+)$", ".typ": r'^(?:=+ |#problem\(")([^"\n]+)'}
#: Beginnings of paths that a document completes by computation, as in "profiles/" + size: a citation of all such files.
FAMILIES = ("profiles/", "memory_2.7B_")
HEAD = """# Results

Each file records what was measured, with which command, on which device, and with which versions and commit. This list
is written by `python tools/results_index.py` at the root of the repository. Commands are spelled as they were then.

| file | cited in | command |
|---|---|---|
"""


def files(package: Path) -> list[Path]:
    """Return a package's files of results, relative to `results/`."""
    results = package / "results"
    return sorted(path.relative_to(results) for path in results.rglob("*") if path.suffix in (".json", ".png"))


def citations(package: Path, file: Path) -> list[str]:
    """Return the documents that cite a file, each with its sections.

    A file is cited by its name, or in code by its stem in quotes; a picture there only as one.
    """
    stem, name = re.escape(file.stem), re.escape(file.name)
    quoted = rf'picture\("{stem}"' if file.suffix == ".png" else rf'(?<!problem\()(?<!: )"{stem}"'
    families = [re.escape(f'"{family}" +') for family in FAMILIES if family in f"{file.parent}/{file.name}"]
    pattern = re.compile("|".join([rf"(?<![\w.]){name}\b", quoted, *families]))
    found = []
    for document in DOCUMENTS:
        if not (package / document).is_file():
            continue
        sections = [title for title, text in sections_of(package / document) if pattern.search(text)]
        if sections:
            where = f"[{document}](../{document})"
            found.append(f"{where}: {', '.join(filter(None, sections))}" if any(sections) else where)
    return found


def sections_of(document: Path) -> Iterator[tuple[str, str]]:
    """Yield the titles and texts of a document's sections; what comes before the first has no title."""
    text = document.read_text(encoding="utf-8")
    headings = list(re.finditer(HEADINGS.get(document.suffix, r"(?!)"), text, re.MULTILINE))
    starts = [0, *(heading.start() for heading in headings)]
    titles = ["", *(heading[1].replace("`", "") for heading in headings)]
    for title, start, end in zip(titles, starts, [*starts[1:], len(text)]):
        yield title, text[start:end]


def command(package: Path, file: Path) -> str:
    """Return the command that a file records, or "". A picture's is that of the measurement it is named after."""
    measured = [path for path in (package / "results" / file.parent).glob("*.json") if file.stem.startswith(path.stem)]
    if not measured:
        return ""
    source = max(measured, key=lambda path: len(path.stem))
    return json.loads(source.read_text(encoding="utf-8")).get("command", "")


def index(package: Path) -> str:
    """Return the text of a package's index. More than eight files of a folder that are cited alike share a row.

    Raises:
        ValueError: no document cites one of the files.
    """
    alike: dict[tuple[Path, tuple[str, ...]], list[Path]] = defaultdict(list)
    for file in files(package):
        cited = citations(package, file)
        if not cited:
            raise ValueError(f"no document cites results/{file}; cite it in README.md or LOG.md, or delete it")
        alike[file.parent, tuple(cited)].append(file)
    rows = []
    for (folder, documents), group in alike.items():
        names = ", ".join(f"[{file}]({file})" for file in group)
        if len(group) > 8:
            names = f"[{folder}/]({folder}) ({len(group)} files)"
        commands = dict.fromkeys(command(package, file) for file in group)
        rows.append(f"| {names} | {'; '.join(documents)} | {' '.join(f'`{each}`' for each in commands if each)} |\n")
    return HEAD + "".join(rows)


def main() -> None:
    """Write the indexes of all packages."""
    for package in PACKAGES:
        path = package / "results" / "README.md"
        path.write_text(index(package), encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
