"""The hub client against a small server on loopback that speaks the Hub's protocol, faults included.

huggingface_hub reads HF_ENDPOINT when it is imported, so every download runs in a process of its own.
"""

from __future__ import annotations

import hashlib
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import randomize
from hub_server import COMMIT, OLD_COMMIT, environment, repository, serve

from mvit_export.data.preprocessing import DEFAULT_PREPROCESSING
from mvit_export.families.mobilevit.network import create_mobilevit
from mvit_export.models.own_files import save_weights

pytestmark = pytest.mark.slow

pytest.importorskip("huggingface_hub", reason="the hub client needs huggingface_hub")
FETCH = """
import sys
from mvit_export.errors import MvitExportError
from mvit_export.models.hub import fetch_model
try:
    snapshot = fetch_model(sys.argv[1], *sys.argv[2:])
except MvitExportError as error:
    print(type(error).__name__, error)
else:
    print("OK", snapshot.commit, snapshot.folder)
"""


def fetch(endpoint: str, cache: Path, *arguments: str, **more: str) -> str:
    """One line: "OK COMMIT FOLDER", or the error's class and message. Nothing may come on stderr."""
    command = [sys.executable, "-c", FETCH, *(arguments or ("owner/net",))]
    done = subprocess.run(command, env=environment(endpoint, cache, **more), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout
    assert not done.stderr, done.stderr
    return done.stdout.strip()


def folder_of(line: str, commit: str = COMMIT) -> Path:
    status, found, folder = line.split(" ", 2)
    assert (status, found) == ("OK", commit)
    return Path(folder)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_download_and_optional_files(cache: Path) -> None:
    content = repository(preprocessor_config__json=b'{"size": 288}')
    with serve(content) as endpoint:
        folder = folder_of(fetch(endpoint, cache))
        assert names(folder) == {"config.json", "preprocessor_config.json", "model.safetensors"}
        assert (folder / "model.safetensors").read_bytes() == content.files[COMMIT]["model.safetensors"]
        assert not any("pytorch_model" in request for request in content.requests)
        # A push in between cannot mix two commits: what follows the first file is asked for by its commit.
        assert f"GET /owner/net/resolve/{COMMIT}/model.safetensors" in content.requests
    with serve(repository()) as endpoint:
        assert names(folder_of(fetch(endpoint, cache.parent / "two"))) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("revision", ["v1", OLD_COMMIT])
def test_revision_and_bin_file(revision: str, cache: Path) -> None:
    with serve(repository()) as endpoint:
        folder = folder_of(fetch(endpoint, cache, "owner/net", revision), OLD_COMMIT)
    assert names(folder) == {"pytorch_model.bin"}
    assert (folder / "pytorch_model.bin").read_bytes() == b"old weights"


def test_cache_serves_when_the_server_is_gone(cache: Path) -> None:
    content = repository()
    with serve(content) as endpoint:
        first = fetch(endpoint, cache)
    assert fetch(endpoint, cache) == first  # refused connection
    assert fetch(endpoint, cache, HF_HUB_OFFLINE="1") == first
    with serve(content) as endpoint:
        content.requests.clear()
        assert fetch(endpoint, cache) == first
        assert not any(request.startswith("GET /owner/") for request in content.requests)


def test_silent_server_with_a_cache(cache: Path) -> None:
    with serve(repository()) as endpoint:
        first = fetch(endpoint, cache)
    with silent() as endpoint:
        assert fetch(endpoint, cache) == first


@pytest.mark.parametrize(
    ("arguments", "fault", "expected"),
    [
        (("owner/none",), {}, "HubError no repository owner/none on {endpoint}, or it is private: check the name"),
        (("owner/net", "v9"), {}, "HubError owner/net on {endpoint} has no revision 'v9': give a branch, tag or"),
        (("owner/net",), {"error": (403, "GatedRepo")}, "HubError owner/net is gated on {endpoint}: accept its terms"),
        (("owner/net",), {"error": (503, "")}, "HubError {endpoint} cannot be reached for owner/net (Server error"),
        (("a/b/c",), {}, "HubError 'a/b/c' is not a repository name, expected OWNER/NAME[@REVISION]"),
        (("owner/net",), {"portal": True}, "cannot be reached for owner/net (what answers there is not a model hub)"),
        (("owner/net",), {"lie": True}, "is damaged: its sha256 is "),
    ],
)
def test_refusals(arguments: tuple[str, ...], fault: dict, expected: str, cache: Path) -> None:
    content = repository()
    for name, value in fault.items():
        setattr(content, name, value)
    with serve(content) as endpoint:
        assert expected.format(endpoint=endpoint) in fetch(endpoint, cache, *arguments)


def test_repository_without_usable_weights(cache: Path) -> None:
    content = repository()
    del content.files[COMMIT]["model.safetensors"]
    with serve(content) as endpoint:
        expected = "HubError owner/net@main has no weights, expected model.safetensors or pytorch_model.bin:"
        assert fetch(endpoint, cache).startswith(expected)
        content.files[COMMIT]["model.safetensors.index.json"] = b"{}"
        assert "model.safetensors.index.json has no weight_map" in fetch(endpoint, cache)


def test_shards_are_fetched_with_their_index(cache: Path) -> None:
    content = repository()
    del content.files[COMMIT]["model.safetensors"]
    parts = [f"model-0000{index}-of-00002.safetensors" for index in (1, 2)]
    where = {"weight_map": {"a": parts[0], "b": parts[1]}}
    content.files[COMMIT] |= {"model.safetensors.index.json": json.dumps(where).encode(), parts[0]: b"one"}
    with serve(content) as endpoint:
        message = f"HubError owner/net@main has no {parts[1]}, which model.safetensors.index.json names"
        assert fetch(endpoint, cache.parent / "other").startswith(message)
        content.files[COMMIT][parts[1]] = b"two"
        line = fetch(endpoint, cache)
        assert names(folder_of(line)) == {"config.json", "model.safetensors.index.json", *parts}
    assert fetch(endpoint, cache) == line  # from the cache
    (folder_of(line) / parts[1]).unlink()
    assert "cannot be reached" in fetch(endpoint, cache)


def test_broken_transfer_is_an_error_and_leaves_no_file(cache: Path) -> None:
    content = repository()
    content.cut = "model.safetensors"
    with serve(content) as endpoint:
        line = fetch(endpoint, cache)
        assert line.startswith("HubError the download of owner/net broke off at model.safetensors (")
        assert not list(cache.rglob("snapshots/*/model.safetensors"))
        assert fetch(endpoint, cache, HF_HUB_OFFLINE="1").startswith("HubError owner/net@main is not in the cache")
        content.cut = None
        folder = folder_of(fetch(endpoint, cache))
    assert (folder / "model.safetensors").read_bytes() == content.files[COMMIT]["model.safetensors"]


def test_transfer_that_breaks_once_is_completed(cache: Path) -> None:
    content = repository()
    content.cut, content.cut_always = "model.safetensors", False
    with serve(content) as endpoint:
        folder = folder_of(fetch(endpoint, cache))
    assert (folder / "model.safetensors").read_bytes() == content.files[COMMIT]["model.safetensors"]


@contextmanager
def silent() -> Iterator[str]:
    """A server that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def refusing() -> Iterator[str]:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    yield f"http://127.0.0.1:{port}"


@contextmanager
def dripping() -> Iterator[str]:
    """A server that sends a byte of an endless header now and then: no read ever times out."""
    stop = threading.Event()

    def drip(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nX-Slow: ")
            while not stop.wait(0.2):
                connection.sendall(b"x")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=drip, args=(server,), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            stop.set()


@pytest.mark.parametrize("server", [refusing, silent, dripping])
def test_unreachable_hub_is_an_error_in_time_and_writes_nothing(server, cache: Path) -> None:
    with server() as endpoint:
        start = time.monotonic()
        line = fetch(endpoint, cache)
        seconds = time.monotonic() - start
    assert line.startswith(f"HubError {endpoint} cannot be reached for owner/net (")
    assert line.endswith("check the connection or HF_ENDPOINT, or give a local file")
    assert seconds < 10, seconds
    assert not list(cache.parent.iterdir())  # neither the cache nor HF_HOME


def test_missing_package(cache: Path) -> None:
    block = "import sys; sys.modules['huggingface_hub'] = None\n"
    command = [sys.executable, "-c", block + FETCH, "owner/net"]
    done = subprocess.run(command, env=environment("http://127.0.0.1:1", cache), capture_output=True, text=True)
    expected = "huggingface_hub is not installed, needed to download weights: pip install 'mvit-export[hub]'"
    assert done.stdout.strip() == f"MissingDependencyError {expected}"


def test_load_weights_from_the_hub(cache: Path) -> None:
    """The whole way, as `--weights hf:ID@REVISION` goes it."""
    model = randomize(create_mobilevit("xxs", num_classes=2))
    cache.parent.mkdir(exist_ok=True)
    file = cache.parent / "w.safetensors"
    save_weights(model, file, preprocessing=DEFAULT_PREPROCESSING)
    script = (
        "import json, sys; from mvit_export.families.mobilevit.weights import load_weights;"
        "w = load_weights(sys.argv[1]);"
        "print(json.dumps([w.source, w.revision, w.sha256, w.variant, w.state['classifier.bias'].tolist()]))"
    )
    content = repository(model__safetensors=file.read_bytes())
    with serve(content) as endpoint:
        command = [sys.executable, "-c", script, "hf:owner/net@main"]
        done = subprocess.run(command, env=environment(endpoint, cache), capture_output=True, text=True)
    source, revision, digest, variant, bias = json.loads(done.stdout)
    assert (source, revision, variant) == ("hf:owner/net@main", COMMIT, "xxs")
    assert digest == hashlib.sha256(file.read_bytes()).hexdigest()
    assert torch.allclose(torch.tensor(bias), model.classifier.bias)
