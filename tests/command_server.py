"""Runs commands as forks of one process that has imported what they import (see `python -X importtime`).

A fork is a process of its own, with its own arguments, folder, environment and streams; only the imports are shared.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

IMPORTS = (
    "torch", "coremltools", "onnx", "onnxscript", "onnxruntime", "litert_torch", "matplotlib.pyplot",
    "mvit_export.cli.main",
)  # fmt: skip
TIMEOUT = 600.0  # seconds


class CommandServer:
    """The parent's side. `run` waits for the end of the command."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, arguments: list[str], *, cwd: Path, env: dict[str, str]) -> tuple[int, str, str]:
        """Exit code (negative for a signal), stdout and stderr."""
        assert self.process.stdin and self.process.stdout
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            request = {"arguments": arguments, "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
                self.process.kill()
                raise subprocess.TimeoutExpired(arguments, TIMEOUT)
            answer = self.process.stdout.readline()
            assert answer, f"the process that forks for commands was lost (exit code {self.process.poll()})"
            return json.loads(answer), out.read_text("utf-8"), err.read_text("utf-8")

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    """Answer requests, a line of JSON each, with exit codes until stdin ends."""
    for name in IMPORTS:
        with contextlib.suppress(ImportError):  # the command says what is missing
            importlib.import_module(name)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            # Not by way of libraries' destructors, which would wait for threads that a fork does not have.
            os._exit(do(json.loads(line)))
        _, status = os.waitpid(pid, 0)
        print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)


def do(request: dict[str, Any]) -> int:
    """Become the command; the exit code."""
    from mvit_export.cli.main import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]  # as `python -m` has it
    sys.argv[1:] = request["arguments"]
    try:
        main(request["arguments"])
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:  # as an interpreter does that ends with it
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    serve()
