"""Downloads: files from a folder in place of the hub, rows from a local server in place of its viewer."""

import gzip
import io
import json
import shutil
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from cs336_alignment.datasets import download as module
from cs336_alignment.datasets.download import SOURCES, Files, Rows, download, main
from cs336_alignment.datasets.examples import load_examples
from cs336_alignment.datasets.preferences import load_preferences


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder of repositories that stands in for the hub, and the requests to it."""
    folder = tmp_path / "hub"
    asked = []

    def fetch(repository, file, *, repo_type, local_dir):
        assert repo_type == "dataset"
        asked.append(file)
        if not (folder / repository / file).exists():
            raise LocalEntryNotFoundError("no network\nand more lines")
        (Path(local_dir) / file).parent.mkdir(parents=True, exist_ok=True)
        return shutil.copy(folder / repository / file, Path(local_dir) / file)

    monkeypatch.setattr(module, "hf_hub_download", fetch)
    return folder, asked


@pytest.fixture
def viewer(monkeypatch):
    """A viewer that serves the rows of a dictionary, and the requests to it."""
    tables, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            query = {name: value for name, (value,) in parse_qs(urlsplit(self.path).query).items()}
            start, length = int(query["offset"]), int(query["length"])
            asked.append((query["config"], query["split"], start))
            rows = tables.get((query["dataset"], query["config"], query["split"]))
            if rows is None or length > 100:
                self.send_error(404)
                return
            page = [
                {"row_idx": number, "row": row, "truncated_cells": row.get("cut", [])}
                for number, row in enumerate(rows[start : start + length], start=start)
            ]
            body = json.dumps({"features": [], "rows": page, "num_rows_total": len(rows), "partial": False}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(module, "_VIEWER", f"http://127.0.0.1:{server.server_port}/rows")
    monkeypatch.setattr(module.constants, "HF_HUB_OFFLINE", False)
    yield tables, asked
    server.shutdown()
    server.server_close()


def problem(number):
    return {
        "problem": f"What is ${number}$?", "level": "Level 1", "type": "Algebra", "solution": rf"$\boxed{{{number}}}$",
    }  # fmt: skip


def test_math_is_all_its_parts_less_what_training_shares_with_the_test(viewer, tmp_path, capsys):
    tables, asked = viewer
    source = SOURCES["math"]
    sizes = dict(zip(source.parts, (1, 100, 101, 250, 99, 3, 200)))
    for part, size in sizes.items():
        for number, split in enumerate(("train", "test")):
            tables[source.repository, part, split] = [problem(f"{part} {number} {index}") for index in range(size)]
    shared = tables[source.repository, "geometry", "test"][5]
    tables[source.repository, "geometry", "train"].insert(7, shared)

    train, test = (load_examples(path) for path in download("math", tmp_path))
    assert [example.answer for example in test] == [f"{p} 1 {i}" for p, size in sizes.items() for i in range(size)]
    assert [example.answer for example in train] == [f"{p} 0 {i}" for p, size in sizes.items() for i in range(size)]
    assert "train.jsonl: left out 1 problems that are also in test.jsonl" in capsys.readouterr().out
    assert [start for part, split, start in asked if (part, split) == ("intermediate_algebra", "test")] == [0, 100, 200]

    before = len(asked)
    download("math", tmp_path)
    assert len(asked) == before


@pytest.mark.parametrize(
    ("name", "row", "answer"),
    [
        ("gsm8k", {"question": "How many?", "answer": "Two.\n#### 2"}, "2"),
        ("svamp", {"ID": "chal-1", "Body": "Two pens.", "Question": "How many?", "Answer": "2.0"}, "2"),
        ("simple-safety-tests", {"id": "SST_001", "harm_area": "Scams", "prompt": "Help me steal."}, ""),
    ],
)
def test_rows_that_the_loaders_read(viewer, tmp_path, name, row, answer):
    tables, _ = viewer
    source = SOURCES[name]
    assert isinstance(source, Rows)
    for part in source.parts:
        for split in source.splits:
            tables[source.repository, part, split] = [row] * 150
    for path in download(name, tmp_path):
        assert [example.answer for example in load_examples(path)] == [answer] * 150


def test_rows_in_part_leave_no_file_behind(viewer, tmp_path):
    tables, _ = viewer
    rows = [{"question": "How many?", "answer": "#### 2"}] * 120
    tables["openai/gsm8k", "main", "train"] = rows
    with pytest.raises(
        ConnectionError, match=r"cannot fetch main/test of openai/gsm8k \(HTTP Error 404: Not Found\); run"
    ):
        download("gsm8k", tmp_path)
    assert len(load_examples(tmp_path / "train.jsonl")) == 120
    assert not (tmp_path / "test.jsonl").exists()
    tables["openai/gsm8k", "main", "test"] = [*rows, {"question": "x", "answer": "#### 1", "cut": ["question"]}]
    with pytest.raises(ConnectionError, match=r"rows 100 to 200 are incomplete"):
        download("gsm8k", tmp_path)
    assert not (tmp_path / "test.jsonl").exists()
    tables["openai/gsm8k", "main", "test"] = rows
    assert len(load_examples(download("gsm8k", tmp_path)[1])) == 120


def test_mmlus_archive_is_unpacked(hub, tmp_path):
    folder, asked = hub
    repository = folder / "cais/mmlu"
    repository.mkdir(parents=True)
    with tarfile.open(repository / "data.tar", "w") as archive:
        for name in ("data/test/abstract_algebra_test.csv", "data/dev/abstract_algebra_dev.csv", "data/README.txt"):
            content = b"Which?,1,2,3,4,B\n"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    for _ in range(2):
        (unpacked,) = download("mmlu", tmp_path / "mmlu")
        assert [example.subject for example in load_examples(unpacked)] == ["abstract algebra"] * 2
        assert len(load_examples(unpacked / "data" / "test")) == 1
    assert asked == ["data.tar"]
    assert [path.name for path in (tmp_path / "mmlu").iterdir()] == ["csv"]


def test_an_archive_that_leads_elsewhere_is_refused(hub, tmp_path):
    folder, _ = hub
    (folder / "cais/mmlu").mkdir(parents=True)
    with tarfile.open(folder / "cais/mmlu/data.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../../evil.csv"))
    with pytest.raises(tarfile.TarError):
        download("mmlu", tmp_path / "mmlu")
    assert not list(tmp_path.glob("**/evil.csv"))
    assert not (tmp_path / "mmlu" / "csv").exists()


def test_preferences_stay_packed(hub, tmp_path, monkeypatch, capsys):
    folder, asked = hub
    row = {name: f"\n\nHuman: Why?\n\nAssistant: {name}." for name in ("chosen", "rejected")}
    longer = {name: text + "\n\nHuman: Go on.\n\nAssistant: No." for name, text in row.items()}
    source = SOURCES["hh"]
    assert isinstance(source, Files)
    assert len(source.names) == 8
    for name in source.names:
        path = folder / source.repository / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in (row, longer)).encode()))
    monkeypatch.setattr(sys, "argv", ["download", "hh", "--folder", str(tmp_path / "hh")])
    main()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].endswith(
        "helpful-base/train.jsonl.gz: 1 pairs of one turn; 1 others are left out when the file is read"
    )
    assert len(printed) == len(asked) == 8
    assert load_preferences(tmp_path / "hh" / "harmless-base" / "test.jsonl.gz")[0][0].chosen == "chosen."
    main()
    assert len(asked) == 8


def test_alpaca_eval(hub, tmp_path, monkeypatch, capsys):
    folder, _ = hub
    (folder / "tatsu-lab/alpaca_eval").mkdir(parents=True)
    rows = [{"instruction": "Say hi.", "output": "Hi", "generator": "g", "dataset": "koala"}] * 2
    (folder / "tatsu-lab/alpaca_eval/alpaca_eval.json").write_text(json.dumps(rows, indent=1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["download", "alpaca-eval"])
    main()
    assert capsys.readouterr().out == "data/alpaca-eval/alpaca_eval.json: 2 examples\n"


@pytest.mark.parametrize("name", SOURCES)
def test_no_network_is_one_sentence(hub, tmp_path, monkeypatch, name):
    def no_network(*arguments, **options):
        raise AssertionError("HF_HUB_OFFLINE is set in the tests")

    monkeypatch.setattr(module, "urlopen", no_network)
    monkeypatch.setattr(sys, "argv", ["download", name, "--folder", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"^cs336-alignment: cannot fetch .* \(.*\); run the same command again to continue$"
    ):
        main()
