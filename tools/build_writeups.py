"""Build the write-ups with Typst. Their date is that of the last commit of what goes into them.

The figures are drawn before, by `python -m experiments figures` and `python -m writeup.figures`; `make writeups`
does all of it.
"""

import argparse
import datetime
import subprocess
from pathlib import Path

import typst

ROOT = Path(__file__).resolve().parent.parent
#: The PDF -> the package that it is about.
WRITEUPS = {"writeup1.pdf": "assignment1-basics", "writeup2.pdf": "assignment2-systems"}


def main() -> None:
    """Build them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, help="folder of the PDFs; default: the repository")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for name, package in WRITEUPS.items():
        date = commit_date(ROOT / package)
        pdf = typst.compile(
            ROOT / package / "writeup" / "main.typ",
            root=ROOT,
            ignore_system_fonts=True,  # Typst brings its own, the same everywhere
            timestamp=int(date.timestamp()),
            sys_inputs={"date": f"{date:%d %B %Y}"},
        )
        (out / name).write_bytes(pdf)
        print(f"written: {out / name}")


def commit_date(package: Path) -> datetime.datetime:
    """When the write-up's sources last changed; without git, 1980."""
    figures = [*package.glob("*/figures.py"), ROOT / "assignment1-basics" / "cs336_basics" / "plots.py"]
    sources = [package / "writeup", package / "results", ROOT / "tools" / "writeup", *figures]
    try:
        command = ["git", "log", "-1", "--format=%ct", "--", *map(str, sources)]
        stamp = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        stamp = ""
    return datetime.datetime.fromtimestamp(int(stamp or 315_532_800), datetime.UTC)


if __name__ == "__main__":
    main()
