"""A model hub on this machine, for as much as is asked of it: two commits of `owner/net`, and what may go wrong."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
ROOT = Path(__file__).parents[1]


@dataclass
class Repository:
    """What the server has: files by commit, the revisions that name commits, and what goes wrong."""

    files: dict[str, dict[str, bytes]]
    revisions: dict[str, str]
    error: tuple[int, str] | None = None  # status and X-Error-Code for everything
    cut: str | None = None  # the file whose transfer breaks off half-way
    cut_always: bool = True
    lie: bool = False  # promise another content than is sent
    portal: bool = False  # answer everything with a login page
    requests: list[str] = field(default_factory=list)


class Handler(BaseHTTPRequestHandler):
    repository: Repository

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, *, body: bool) -> None:
        repository = self.repository
        repository.requests.append(f"{self.command} {self.path}")
        if not self.path.startswith("/owner/"):  # huggingface_hub asks for more than files now and then
            return self.refuse(404, "")
        owner, name, resolve, revision, file = self.path.lstrip("/").split("/", 4)
        if repository.portal:
            self.send_response(200)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if repository.error:
            return self.refuse(*repository.error)
        if (owner, name, resolve) != ("owner", "net", "resolve"):
            return self.refuse(404, "RepoNotFound")
        commit = repository.revisions.get(revision, revision)
        if commit not in repository.files:
            return self.refuse(404, "RevisionNotFound")
        content = repository.files[commit].get(file)
        if content is None:
            return self.refuse(404, "EntryNotFound", commit)
        self.send(file, content, commit, body)
        return None

    def refuse(self, status: int, code: str, commit: str | None = None) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def send(self, file: str, content: bytes, commit: str, body: bool) -> None:
        large = file.endswith((".safetensors", ".bin"))
        digest = hashlib.sha256(content) if large else hashlib.sha1(content)
        etag = digest.hexdigest()
        if large and self.repository.lie:
            etag = "0" * 64
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        if large:
            self.send_header("X-Linked-ETag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if not body:
            return
        if self.repository.cut == file:
            self.wfile.write(content[start : len(content) // 2])
            self.close_connection = True
            if not self.repository.cut_always:
                self.repository.cut = None
        else:
            self.wfile.write(content[start:])


@contextmanager
def serve(repository: Repository) -> Iterator[str]:
    handler = type("RepositoryHandler", (Handler,), {"repository": repository})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def repository(**files: bytes) -> Repository:
    contents = {"config.json": b"{}", "model.safetensors": b"new weights" * 1000}
    contents |= {name.replace("__", "."): content for name, content in files.items()}
    old = {"pytorch_model.bin": b"old weights"}
    return Repository({COMMIT: contents, OLD_COMMIT: old}, {"main": COMMIT, "v1": OLD_COMMIT})


def environment(endpoint: str, cache: Path, **more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_") and "proxy" not in key.lower()}
    return kept | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache.parent / "home"),
        "HF_HUB_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        **more,
    }
