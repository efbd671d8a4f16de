"""Downloads from a local hub that breaks off once."""

import gzip
import hashlib
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

TRAIN = ("A story. " * 2_700_000).encode()  # the library writes, and so resumes, in pieces of 10 MB
FILES = {
    "roneneldan/TinyStories": {"TinyStoriesV2-GPT4-train.txt": TRAIN, "TinyStoriesV2-GPT4-valid.txt": b"Another."},
    "stanford-cs336/owt-sample": {"owt_train.txt.gz": gzip.compress(TRAIN), "owt_valid.txt.gz": gzip.compress(b"Web.")},
}


@pytest.fixture
def hub():
    """The two requests that huggingface_hub makes for a file: HEAD for its size and hash, GET with a range."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def content(self):
            repository, _, name = self.path.removeprefix("/datasets/").partition("/resolve/main/")
            return FILES.get(repository, {}).get(name)

        def answer(self, body):
            content = self.content()
            if content is None:
                self.send_error(404)
                return
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if start else 200)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(content) - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            if body:
                asked.append((self.path.rsplit("/", 1)[-1], start))
                breaks_off = content is TRAIN and len(asked) == 1
                self.wfile.write(content[start : len(content) // 2 if breaks_off else None])
                if breaks_off:
                    self.close_connection = True

        def do_HEAD(self):
            self.answer(body=False)

        def do_GET(self):
            self.answer(body=True)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def fetch(endpoint, name, folder):
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "cs336_basics.download", name, "--folder", folder]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_tinystories_resumes_where_it_broke_off(hub, tmp_path):
    endpoint, asked = hub
    for _ in range(2):  # the library may itself try again at once
        result = fetch(endpoint, "tinystories", tmp_path)
        if result.returncode == 0:
            break
        assert "run the same command again to resume" in result.stderr
    assert (tmp_path / "TinyStoriesV2-GPT4-train.txt").read_bytes() == TRAIN
    assert (tmp_path / "TinyStoriesV2-GPT4-valid.txt").read_bytes() == b"Another."
    train_requests = [start for name, start in asked if "train" in name]
    assert train_requests[0] == 0
    assert train_requests[1] > 0
    assert f"{len(TRAIN):,} bytes" in result.stdout
    assert "--vocab-size 10000" in result.stdout
    before = len(asked)
    assert fetch(endpoint, "tinystories", tmp_path).returncode == 0
    assert len(asked) == before


def test_openwebtext_is_unpacked(hub, tmp_path):
    result = fetch(hub[0], "owt", tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "owt_train.txt").read_bytes() == TRAIN
    assert (tmp_path / "owt_valid.txt").read_bytes() == b"Web."
    assert not list(tmp_path.glob("*.gz"))


def test_no_network_is_one_sentence(tmp_path):
    result = fetch("http://127.0.0.1:9", "tinystories", tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "cs336_basics.download: cannot download TinyStoriesV2-GPT4-train.txt"
    )
