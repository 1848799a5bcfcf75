"""What a manifest names is followed only if this user has named it himself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished

from mvit_export.system import trust

pytestmark = pytest.mark.slow

FACTORY = """
from pathlib import Path
from torch import nn

Path("{canary}").touch()

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2)

    def forward(self, x):
        return self.conv(x).mean((2, 3))

def net():
    import torch
    torch.manual_seed(0)
    return Net()
"""
Cli = Callable[..., Finished]


@pytest.fixture
def exported(cli: Cli, tmp_path: Path) -> Path:
    """Exported from mine.py; the canary that its code leaves is gone again."""
    (tmp_path / "mine.py").write_text(FACTORY.format(canary=tmp_path / "canary"))
    options = ("--to", "onnx", "--model", f"{tmp_path / 'mine.py'}:net", "--image-size", "32", "--out", tmp_path)
    done = cli(*options)
    assert done.code == 0, done.err
    (tmp_path / "canary").unlink()
    return tmp_path / "net/onnx-fp32"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    import numpy as np

    path = tmp_path / "pictures.npz"
    np.savez(path, images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.arange(2))
    return path


def name_code(artifact: Path, source: str) -> None:
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["model"]["source"] = source
    (artifact / "manifest.json").write_text(json.dumps(manifest))


def commands(artifact: Path, pictures: Path, out: Path) -> dict[str, tuple[str | Path, ...]]:
    return {
        "verify": ("verify", artifact),
        "locate": ("verify", artifact, "--locate"),
        "eval": ("eval", artifact, "--data", pictures),
        "like": ("export", "--to", "onnx", "--like", artifact, "--out", out),
        "bench": ("bench", artifact, "--runtime", "pytorch", "--budget", "0.2"),
        "tune": ("tune", artifact, "--data", pictures, "--calibration", pictures, "--out", out),
    }


@pytest.mark.parametrize("command", ["verify", "locate", "eval", "like", "bench", "tune"])
@pytest.mark.parametrize("how", ["theirs", "changed"])
def test_code_is_not_run(command: str, how: str, cli: Cli, exported: Path, pictures: Path, tmp_path: Path) -> None:
    """Code beside an artifact from elsewhere, even a copy of the user's own; his own file that was edited since."""
    if how == "theirs":
        shutil.copy(tmp_path / "mine.py", exported / "theirs.py")
        name_code(exported, f"{exported / 'theirs.py'}:net")
    else:
        with (tmp_path / "mine.py").open("a") as file:
            file.write("# edited\n")
    done = cli(*commands(exported, pictures, tmp_path / "out")[command])
    assert not (tmp_path / "canary").exists()
    assert done.code in (2, 3), done.err
    assert "Python code that you have not exported, or that has changed since; --trust-code" in done.out + done.err


def test_own_code_is_run_and_other_code_if_asked(cli: Cli, exported: Path, tmp_path: Path) -> None:
    assert cli("verify", exported).code == 0
    assert (tmp_path / "canary").exists()
    (tmp_path / "canary").unlink()
    shutil.copy(tmp_path / "mine.py", exported / "theirs.py")
    name_code(exported, f"{exported / 'theirs.py'}:net")
    assert cli("verify", exported, "--against", "golden").code == 0
    assert not (tmp_path / "canary").exists()
    assert cli("verify", exported, "--trust-code").code == 0
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("source", ["hf:someone/model", "/etc/hostname"])
def test_weights_are_not_fetched_or_read(source: str, cli: Cli, exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    manifest["weights"]["source"] = source
    (exported / "manifest.json").write_text(json.dumps(manifest))
    done = cli("verify", exported, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert f"names the weights {source}, which you have not exported; pass --weights {source}" in done.err


def test_a_disk_that_keeps_nothing_is_no_hindrance(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FACTORY.format(canary=tmp_path / "canary"))
    (tmp_path / "state").write_text("a file")
    options = ("--to", "onnx", "--model", f"{tmp_path / 'mine.py'}:net", "--image-size", "32", "--out", tmp_path)
    done = cli(*options, env={"XDG_STATE_HOME": str(tmp_path / "state")})
    assert done.code == 0, done.err


def test_an_entry_that_is_damaged_trusts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(trust, "_REMEMBERED", set())
    trust.remember([("a.py", "12")])
    monkeypatch.setattr(trust, "_REMEMBERED", set())
    assert trust.is_trusted("a.py", "12")
    assert not trust.is_trusted("a.py", "13")
    assert not trust.is_trusted("b.py", "12")
    for damage in ("", "[]", "{", '{"name": "a.py"}'):
        trust.place("a.py").write_text(damage)
        assert not trust.is_trusted("a.py", "12")
