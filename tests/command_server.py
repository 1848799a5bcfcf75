"""Runs commands as forks of one process that has imported what they import (see `python -X importtime`).

A fork is a process of its own, with its own arguments, folder, environment and streams; only the imports are shared.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMPORTS = (
    "torch", "coremltools", "onnx", "onnxscript", "onnxruntime", "litert_torch", "matplotlib.pyplot",
    "mvit_export.cli.main",
)  # fmt: skip
TIMEOUT = 600.0  # seconds
LARGEST_FILE = 8 * 10**9  # bytes that a limited command may write into one: nobody's disk is to be filled


@dataclass(frozen=True)
class Limits:
    """What a command may use. `reads` is a file for the names of the functions by which it comes to read files."""

    seconds: float
    megabytes: float  # of address space, on top of what the imports take
    reads: Path


@dataclass(frozen=True)
class Outcome:
    """How a command ended that had limits."""

    code: int  # negative for a signal
    out: bytes
    err: bytes
    peak_mb: float  # the largest process of it, the imports included
    seconds: float
    timed_out: bool


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
        done = self.run_limited(arguments, cwd=cwd, env=env)
        return done.code, done.out.decode(), done.err.decode()

    def run_limited(
        self, arguments: list[str], *, cwd: Path, env: dict[str, str], limits: Limits | None = None
    ) -> Outcome:
        """In a session of its own, all of which is killed at the end of its time."""
        assert self.process.stdin and self.process.stdout
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            request = {"arguments": arguments, "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}
            if limits:
                request |= {"limits": [limits.seconds, limits.megabytes], "reads": str(limits.reads)}
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], TIMEOUT)[0]:
                self.process.kill()
                raise subprocess.TimeoutExpired(arguments, TIMEOUT)
            answer = self.process.stdout.readline()
            assert answer, f"the process that forks for commands was lost (exit code {self.process.poll()})"
            return Outcome(out=out.read_bytes(), err=err.read_bytes(), **json.loads(answer))

    def close(self) -> None:
        self.process.communicate()


def serve() -> None:
    """Answer requests, a line of JSON each, with exit codes until stdin ends."""
    for name in IMPORTS:
        with contextlib.suppress(ImportError):  # the command says what is missing
            importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if pid == 0:
            # Not by way of libraries' destructors, which would wait for threads that a fork does not have.
            os._exit(do(request))
        print(json.dumps(wait(pid, request.get("limits", [float("inf")])[0])), flush=True)


def wait(pid: int, seconds: float) -> dict[str, Any]:
    """Wait for the end of a fork, and end it and what it started when its time is over."""
    start, timed_out = time.monotonic(), False
    while True:
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
        if time.monotonic() - start > seconds and not timed_out:
            timed_out = True
            os.killpg(pid, signal.SIGKILL)
        time.sleep(0.005)
    unit = 1e6 if sys.platform == "darwin" else 1e3
    return {
        "code": os.waitstatus_to_exitcode(status), "timed_out": timed_out,
        "peak_mb": usage.ru_maxrss / unit, "seconds": time.monotonic() - start,
    }  # fmt: skip


def set_limits(megabytes: float) -> None:
    if Path("/proc/self/statm").exists():  # elsewhere the address space that the imports take is not known
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + int(megabytes * 1e6),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def record_reads(place: str) -> None:
    """Write down by way of which functions this process comes to the check that stands before every read."""
    from mvit_export.system import reading

    check: Callable[..., None] = reading.check_kind
    descriptor = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def recording(*arguments: Any) -> None:
        frame: Any = sys._getframe(1)
        lines = []
        while frame:
            lines.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}\n")
            frame = frame.f_back
        os.write(descriptor, "".join(lines).encode())
        check(*arguments)

    reading.check_kind = recording


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
    if "limits" in request:
        os.setsid()  # what it starts is killed with it
        record_reads(request["reads"])
        set_limits(request["limits"][1])
    try:
        main(request["arguments"])
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 1
    except BaseException:  # as an interpreter does that ends with it
        traceback.print_exc()
        return 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ValueError):  # a user's own code has closed it
                stream.flush()


if __name__ == "__main__":
    serve()
