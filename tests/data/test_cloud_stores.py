"""Corpora in a bucket and in a repository give the bytes of local files, through the stores' own packages.

A server here answers the few calls of Google's storage API and of the Hugging Face Hub that reading files takes.
"""

import hashlib
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.data.shards.corpus import contents, write_files, write_serial

BUCKET, DOWNLOADS = "/storage/v1/b/bucket/o", "/download/storage/v1/b/bucket/o/"
REPOSITORY, FILES = "/api/datasets/me/corpus", "/datasets/me/corpus/resolve/main/"
STORES = {
    "gcsfs": ("gs://bucket/train", "STORAGE_EMULATOR_HOST", "etag"),
    "huggingface_hub": ("hf://datasets/me/corpus/train", "HF_ENDPOINT", "blob_id"),
}


class Store(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: dict[str, bytes]

    def do_GET(self):
        url = urlsplit(self.path)
        path, words = unquote(url.path), parse_qs(url.query)
        for start_of_path in (DOWNLOADS, FILES):
            if path.startswith(start_of_path):
                return self.send_part(self.files[path.removeprefix(start_of_path)])
        if path == BUCKET:
            prefix = words.get("prefix", [""])[0]
            return self.send_json({"items": [self.in_bucket(name) for name in self.files if name.startswith(prefix)]})
        if path.removeprefix(f"{BUCKET}/") in self.files:
            return self.send_json(self.in_bucket(path.removeprefix(f"{BUCKET}/")))
        if path.startswith(f"{REPOSITORY}/tree/main"):
            folder = path.removeprefix(f"{REPOSITORY}/tree/main").strip("/")
            tree = [{"type": "directory", "oid": "0" * 40, "path": "train"}]
            return self.send_json([self.in_repository(name) for name in self.files] if folder else tree)
        if path == REPOSITORY:
            return self.send_json({"id": "me/corpus", "sha": "0" * 40, "siblings": []})
        return self.send_json({"error": {"code": 404, "message": "Not Found"}}, code=404)

    def in_bucket(self, name):
        content = self.files[name]
        link = f"http://{self.headers['Host']}{DOWNLOADS}{name.replace('/', '%2F')}?alt=media"
        digest = hashlib.sha1(content).hexdigest()
        return {"name": name, "bucket": "bucket", "size": str(len(content)), "etag": digest, "mediaLink": link}

    def in_repository(self, name):
        content = self.files[name]
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send_json(self, value, code=200):
        self.send(json.dumps(value).encode(), code, {"Content-Type": "application/json"})

    def send_part(self, content):
        first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1]
        where = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        self.send(part, 206, {"Content-Range": where, "ETag": '"any"', "X-Repo-Commit": "0" * 40})

    def send(self, content, code, headers):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """The server without files, which its class has."""
    Store.files = {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Store) as found:
        Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()


@pytest.mark.parametrize("package", STORES)
def test_a_store_gives_the_bytes_of_local_files(tmp_path, server, package):
    pytest.importorskip(package)
    url, variable, version = STORES[package]
    files = write_files(tmp_path)
    serial = write_serial(files, tmp_path / "serial")
    Store.files = {f"train/{file.name}": file.read_bytes() for file in files}
    environment = {**os.environ, variable: server, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    environment.pop("HF_HUB_OFFLINE", None)  # other tests set it

    def preprocess(*words):
        command = [sys.executable, "-m", "megadiff", "preprocess_data", *map(str, words)]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        return ended.returncode, ended.stdout, ended.stderr

    common = ["--tokenizer", "byte", "--append-eod", "--input", url]
    code, out, err = preprocess(*common, "--output-prefix", tmp_path / "p")
    assert (code, f"{url}/{files[0].name}: " in out) == (0, True), err
    assert contents(tmp_path / "p") == serial
    code, _, err = preprocess(*common, "--shards", tmp_path / "s", "--unit-mb", "0.01")
    assert code == 0, err
    inputs = json.loads((tmp_path / "s" / "plan.json").read_text())["inputs"]
    assert [file["path"] for file in inputs] == [f"{url}/{file.name}" for file in files]
    assert all(file["version"].startswith(f"{version} ") for file in inputs)
    code, _, err = preprocess("--merge", tmp_path / "s", "--output-prefix", tmp_path / "m")
    assert code == 0, err
    assert contents(tmp_path / "m") == serial
    code, _, err = preprocess(*common[:-1], f"{url}/none.jsonl", "--output-prefix", tmp_path / "n")
    assert (code, err.splitlines()[-1]) == (2, f"error: {url}/none.jsonl: no such file; check the path after --input")
