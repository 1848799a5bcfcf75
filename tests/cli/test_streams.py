"""Streams that are full, closed or cut off, and ends that nobody expects: one line, exit code 2, never a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Finished

from mvit_export.cli.text import harmless, json_escape

pytestmark = pytest.mark.slow

COMMAND = f"{sys.executable} -m mvit_export"
ENDS = """
import ctypes, os, sys
from torch import nn

class Own(BaseException): pass

class NoText(Exception):
    def __str__(self): raise ValueError("no text")

def python_exit(): os._exit(0)
def generator_exit(): raise GeneratorExit
def own(): raise Own("mine")
def no_text(): raise NoText
def closes():
    sys.stdout.close()
    sys.stderr.close()
    raise Own("mine")
def leave(): raise SystemExit(0)
def library_exit():
    os.write(2, b"the library's last word \\x1b[2J\\n")
    ctypes.CDLL(None).exit(0)
def killed(): os.kill(os.getpid(), 9)
"""


def shell(line: str, cwd: Path) -> Finished:
    done = subprocess.run(["bash", "-c", line], cwd=cwd, capture_output=True, text=True, timeout=120)
    return Finished(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize("arguments", ["--help", "--version", "inspect {artifact}", "inspect {artifact} --json"])
@pytest.mark.parametrize("cut", ["{command} > /dev/full", "ulimit -f 0; {command} > out"])
def test_lost_output_is_an_error(arguments: str, cut: str, tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    command = f"{COMMAND} {arguments.format(artifact=tiny_artifact('onnx'))}"
    done = shell(f"({cut.format(command=command)}) 2>&1 | cat; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert done.code == 2
    *text, last = done.out.splitlines()
    assert last.startswith("mvit-export: error: stdout cannot be written: "), done.out
    assert not text or "--json" in arguments  # then text for people goes to stderr, which is whole


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("{command} inspect {artifact} >&-", 0), ("{command} inspect {artifact} 2>&-", 0),
        ("{command} inspect {artifact} >&- 2>&-", 0), ("{command} inspect {artifact} 2>/dev/full", 0),
        ("{command} inspect nowhere 2>/dev/full", 2), ("{command} inspect nowhere >&- 2>&-", 2),
        ("{command} inspect {artifact} --json | head -c 1; exit ${{PIPESTATUS[0]}}", 0),
    ],
)  # fmt: skip
def test_what_nobody_reads_changes_no_verdict(
    line: str, code: int, tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    done = shell(line.format(command=COMMAND, artifact=tiny_artifact("onnx")), tmp_path)
    assert done.code == code
    assert "Traceback" not in done.out + done.err


def test_no_temporary_folder(tiny_artifact: Callable[..., Path], tmp_path: Path) -> None:
    nowhere = " ".join(f"{name}=/nonexistent" for name in ("TMPDIR", "TEMP", "TMP"))
    done = shell(f"{nowhere} {COMMAND} inspect {tiny_artifact('onnx')}", tmp_path)
    assert (done.code, done.err) == (0, "")


def test_a_working_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(f"cd gone; rmdir ../gone; {COMMAND} doctor --json", tmp_path)
    assert (done.code, done.err) == (2, "mvit-export: error: the working folder has been deleted; change to another\n")
    assert done.json["status"] == "error"


def test_interrupted_while_packages_are_imported(tmp_path: Path) -> None:
    code = """if True:
        import builtins, runpy
        real = builtins.__import__
        def interrupt(name, *rest, **options):
            if name == "typer":
                raise KeyboardInterrupt
            return real(name, *rest, **options)
        builtins.__import__ = interrupt
        runpy.run_module("mvit_export", run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "mvit-export: error: interrupted; nothing half-written was left\n"


@pytest.mark.parametrize(
    ("factory", "code", "message"),
    [
        ("python_exit", 2, "python_exit() raised SystemExit: os._exit(0)"),
        ("leave", 2, "leave() raised SystemExit: 0"),
        ("generator_exit", 2, "generator_exit() raised GeneratorExit: GeneratorExit"),
        ("own", 2, "own() raised Own: mine"),
        ("closes", 2, "closes() raised Own: mine"),
        ("no_text", 2, "no_text() raised NoText: NoText"),
        ("library_exit", 2, "ended from outside, or by a library; the last line that it printed: the library's last"),
        ("killed", -9, "the process was ended from outside, or by a library"),
    ],
)
def test_a_factory_that_ends_the_process(factory: str, code: int, message: str, tmp_path: Path) -> None:
    (tmp_path / "ends.py").write_text(ENDS)
    command = [*COMMAND.split(), "--to", "onnx", "--model", f"ends.py:{factory}", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    document = json.loads(done.stdout)
    assert document["status"] == "error" and message in document["error"]["message"]
    assert done.stderr == f"mvit-export: error: {document['error']['message']}\n"
    assert done.stderr[:-1].isprintable()
    assert sorted(os.listdir(tmp_path)) in (["ends.py"], ["__pycache__", "ends.py"])


LATE = """
import runpy
from mvit_export.checks import parity

class Own(BaseException): pass

def verify(*_, **__):
    import os
    {end}

parity.verify = verify
runpy.run_module("mvit_export", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("raise Own('mine')", "Own: mine"), ("raise SystemExit(0)", "SystemExit: 0"),
        ("raise GeneratorExit", "GeneratorExit: GeneratorExit"), ("os._exit(0)", "SystemExit: os._exit(0)"),
    ],
)  # fmt: skip
def test_code_that_ends_the_process_later(end: str, said: str, tmp_path: Path) -> None:
    """A network's forward runs in converters and checks too."""
    command = [sys.executable, "-c", LATE.format(end=end), "verify", "x", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, json.loads(done.stdout)["status"]) == (2, "error")
    assert done.stderr == f"mvit-export: error: a network's own code, or a library, raised {said}\n"


def test_a_handler_at_exit_changes_no_code(tmp_path: Path) -> None:
    run = "runpy.run_module('mvit_export', run_name='__main__')"
    code = f"import atexit, os, runpy; atexit.register(lambda: os._exit(0)); {run}"
    done = subprocess.run([sys.executable, "-c", code, "inspect", "nowhere"], cwd=tmp_path, check=False, timeout=60)
    assert done.returncode == 2


KILLED = """if True:
    import os
    from pathlib import Path
    from mvit_export.cli.terminal import Terminal
    from mvit_export.system.staging import scratch_directory, staged_directory
    with Terminal(), scratch_directory(Path("new/work/model")) as scratch, staged_directory(
        Path("old/model/onnx-fp32"), overwrite=False
    ) as staging:
        for folder in (scratch, staging):
            (folder / "half").write_text("written")
        os.kill(os.getpid(), 9)
"""


def test_a_killed_run_leaves_nothing(tmp_path: Path) -> None:
    """Besides what was there before it."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "mine").touch()
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (-9, "")
    assert done.stderr == "mvit-export: error: the process was ended from outside, or by a library\n"
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == ["old", "old/mine"]


def test_harmless() -> None:
    assert harmless("plain, naïve, 数字, 👩\u200d🔬") == "plain, naïve, 数字, 👩\u200d🔬"
    assert harmless("a\nb\tc\x1b[2J\x9b\u202e\udc80") == "a\\nb\\tc\\x1b[2J\\x9b\\u202e\\udc80"
    assert harmless("a\nb", keep="\n") == "a\nb"
    document = json.dumps({"a": "\x9b\u2028\U000e0001"}, ensure_ascii=False)
    assert json.loads(harmless(document, escape=json_escape)) == json.loads(document)
    assert harmless(document, escape=json_escape).isprintable()


@pytest.mark.parametrize("command", ["inspect", "verify", "report"])
def test_nothing_from_a_file_moves_the_cursor(
    command: str, cli: Callable[..., Finished], copy: Callable[..., Path], tmp_path: Path
) -> None:
    """Every string of a manifest and the folder's own name: escapes, line breaks, a CI's commands."""
    evil = "\x1b[2Jx\r\n::error::y\x9b\u202e"
    place = copy("onnx")
    manifest = json.loads((place / "manifest.json").read_text())
    for part in ("model", "weights", "tools"):
        manifest[part] = {k: v + evil if isinstance(v, str) and k != "task" else v for k, v in manifest[part].items()}
    manifest["created"] += evil
    (place / "manifest.json").write_text(json.dumps(manifest))
    place = place.rename(tmp_path / f"onnx{evil}")
    for options in ((), ("--json",)):
        extra = ("--format", "markdown") if command == "report" else options
        done = cli(command, place, *extra)
        for text in (done.out, done.err):
            assert all(line.isprintable() for line in text.split("\n")), text
            assert "\n::error::" not in text


@pytest.mark.parametrize(
    "before",
    ["import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)", "import os; os.fork = no_fork"],
    ids=["children are not waited for", "no process can be made"],
)
@pytest.mark.parametrize(("arguments", "code"), [(["inspect", "nowhere"], 2), (["report", "{artifact}"], 0)])
def test_a_watcher_that_cannot_be_changes_nothing(
    before: str, arguments: list[str], code: int, tiny_artifact: Callable[..., Path], tmp_path: Path
) -> None:
    words = [word.format(artifact=tiny_artifact("onnx")) for word in arguments]
    script = f"""if True:
        def no_fork():
            raise BlockingIOError(11, "Resource temporarily unavailable")
        {before}
        from mvit_export.__main__ import main
        import sys
        sys.argv = ["mvit-export", *{words!r}]
        main()
    """
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_nobody_waits_for_help(tmp_path: Path) -> None:
    done = shell(f"{COMMAND} --help | true; exit ${{PIPESTATUS[0]}}", tmp_path)
    assert (done.code, done.err) == (0, "")
