"""Downloading public data sets: `python -m cs336_alignment.datasets.download math`.

Data sets that the Hugging Face hub has as JSON, CSV or an archive are downloaded as files. If it has only Parquet, the
rows are read from the hub's viewer, as JSON, and written as JSON lines, so that no Parquet reader is needed.
"""

import json
import shutil
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlencode
from urllib.request import urlopen

import tyro
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from tyro.conf import Positional

from cs336_alignment.datasets.examples import load_examples
from cs336_alignment.datasets.overlap import find_overlap
from cs336_alignment.datasets.preferences import HH_SUBSETS, load_preferences

_VIEWER = "https://datasets-server.huggingface.co/rows"
_ROWS_AT_ONCE = 100  # maximum of the viewer
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Files:
    """Files of a data set on the hub."""

    repository: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Rows:
    """Rows of a data set on the hub: those of all parts, in one file for each split."""

    repository: str
    parts: tuple[str, ...]
    splits: tuple[str, ...]


_MATH_SUBJECTS = (
    "algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory", "prealgebra",
    "precalculus",
)  # fmt: skip

Name = Literal["math", "gsm8k", "svamp", "mmlu", "hh", "alpaca-eval", "simple-safety-tests"]
SOURCES: dict[Name, Files | Rows] = {
    "math": Rows("EleutherAI/hendrycks_math", _MATH_SUBJECTS, ("train", "test")),
    "gsm8k": Rows("openai/gsm8k", ("main",), ("train", "test")),
    "svamp": Rows("ChilleD/SVAMP", ("default",), ("train", "test")),
    "mmlu": Files("cais/mmlu", ("data.tar",)),
    "hh": Files(
        "Anthropic/hh-rlhf",
        tuple(f"{subset}/{split}.jsonl.gz" for subset in HH_SUBSETS for split in ("train", "test")),
    ),
    "alpaca-eval": Files("tatsu-lab/alpaca_eval", ("alpaca_eval.json",)),
    "simple-safety-tests": Rows("Bertievidgen/SimpleSafetyTests", ("default",), ("test",)),
}


@dataclass(frozen=True)
class Options:
    """Download a public data set for evaluation or training."""

    name: Positional[Name]
    """Name of the data set."""
    folder: Path | None = None
    """Folder to write to. Default: data/NAME."""


def download(name: Name, folder: Path) -> list[Path]:
    """Download a data set into `folder`. Files that are there already are left alone.

    Returns:
        The files, or the folder of an archive's files, as the loaders of this package expect them.

    Raises:
        ConnectionError: the hub cannot be reached, or lacks something. Running it again downloads the rest.
        tarfile.TarError: an archive is damaged.
    """
    source = SOURCES[name]
    if isinstance(source, Rows):
        paths = [_fetch_rows(source, split, folder / f"{split}.jsonl") for split in source.splits]
        if name == "math":
            _leave_out_shared(*paths)
        return paths
    return [_fetch_file(source.repository, file, folder) for file in source.names]


def _fetch_file(repository: str, file: str, folder: Path) -> Path:
    path = folder / file
    unpacked = folder / "csv"
    if path.suffix == ".tar" and unpacked.exists():
        return unpacked
    if not path.exists():
        try:
            path = Path(hf_hub_download(repository, file, repo_type="dataset", local_dir=folder))
        except (OSError, HfHubHTTPError) as error:
            raise _unreachable(f"{file} of {repository}", error) from error
    if path.suffix == ".tar":
        unfinished = folder / "csv.tmp"
        shutil.rmtree(unfinished, ignore_errors=True)
        _unpack(path, unfinished)
        unfinished.replace(unpacked)
        path.unlink()
        return unpacked
    return path


def _unpack(path: Path, folder: Path) -> None:
    """Write the files of an archive under `folder`. (`extractall` is safe only from Python 3.11.4 on.)"""
    with tarfile.open(path) as archive:
        for member in archive:
            target = (folder / member.name).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise tarfile.TarError(f"{path} is refused, because its entry {member.name} lies outside the folder")
            if content := archive.extractfile(member) if member.isfile() else None:
                target.parent.mkdir(parents=True, exist_ok=True)
                with content, open(target, "wb") as file:
                    shutil.copyfileobj(content, file)


def _fetch_rows(source: Rows, split: str, path: Path) -> Path:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".tmp")
        with open(unfinished, "w", encoding="utf-8") as file:
            for part in source.parts:
                for row in _view(source.repository, part, split):
                    file.write(json.dumps(row) + "\n")
        unfinished.replace(path)
    return path


def _view(repository: str, part: str, split: str) -> Iterator[dict[str, Any]]:
    """Yield all rows of a split of a part, page by page."""
    what = f"{part}/{split} of {repository}"
    offset, total = 0, 1
    while offset < total:
        query = {"dataset": repository, "config": part, "split": split, "offset": offset, "length": _ROWS_AT_ONCE}
        try:
            if constants.HF_HUB_OFFLINE:
                raise ConnectionError("HF_HUB_OFFLINE is set")
            with urlopen(f"{_VIEWER}?{urlencode(query)}", timeout=_TIMEOUT_S) as response:
                page = json.load(response)
            total = page["num_rows_total"]
            rows = page["rows"]
            if not rows or any(row["truncated_cells"] for row in rows):
                raise ValueError(f"rows {offset} to {offset + _ROWS_AT_ONCE} are incomplete")
        except (OSError, ValueError, KeyError) as error:
            raise _unreachable(what, error) from error
        yield from (row["row"] for row in rows)
        offset += len(rows)


def _leave_out_shared(train: Path, test: Path) -> None:
    """Remove the few problems from MATH's training file that are also in its test file."""
    shared = set(find_overlap(load_examples(train, "math"), load_examples(test, "math")))
    if shared:
        lines = train.read_text(encoding="utf-8").splitlines(keepends=True)
        unfinished = train.with_name(train.name + ".tmp")
        unfinished.write_text(
            "".join(line for index, line in enumerate(lines) if index not in shared), encoding="utf-8"
        )
        unfinished.replace(train)
        print(f"{train}: left out {len(shared)} problems that are also in {test.name}")


def _unreachable(what: str, error: Exception) -> ConnectionError:
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return ConnectionError(f"cannot fetch {what} ({reason}); run the same command again to continue")


def _summary(name: str, path: Path) -> str:
    if name == "hh":
        pairs, left_out = load_preferences(path)
        return f"{len(pairs):,} pairs of one turn; {left_out.total():,} others are left out when the file is read"
    return f"{len(load_examples(path)):,} examples"


def main() -> None:
    """Download a data set and print what is in it."""
    options = tyro.cli(Options, prog="python -m cs336_alignment.datasets.download")
    try:
        for path in download(options.name, options.folder or Path("data") / options.name):
            print(f"{path}: {_summary(options.name, path)}")
    except (ConnectionError, ValueError, tarfile.TarError) as error:
        raise SystemExit(f"cs336-alignment: {error}") from None


if __name__ == "__main__":
    main()
