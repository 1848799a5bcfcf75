"""The near end of a runner: asks one question at a time, and waits no longer than the answer should take."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import zipfile
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mvit_export.benchmarks.devices.base import FileRefused
from mvit_export.errors import DeviceError, RuntimeUnavailable, UsageError, printable
from mvit_export.runner import __main__ as runner

RUNNER = "runner.pyz"  # the runner's folder as one file, which Python starts by its `__main__`
START = "from runner.__main__ import main\n\nmain()\n"
START_TIMEOUT = 120.0  # seconds; an emulated Python imports numpy in 10
LARGEST_ANSWER = 256 * 2**20  # bytes of a line: every output of a model, in base 64
LONGEST_COMPLAINT = 4096  # bytes of a line on stderr; more are the next line
GRACE = 5.0  # seconds for a runner to remove its scratch folder


def pack_runner(folder: Path) -> Path:
    """Write the runner into one file, for a machine without this package."""
    file = folder / RUNNER
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("__main__.py", START)
        for source in sorted(Path(runner.__file__).parent.glob("*.py")):
            packed.write(source, f"runner/{source.name}")
    return file


class RunError(RuntimeError):
    """The runtime failed while running a model: there is no figure, and the check fails."""


class Worker:
    """A runner process that answers. Use as a context manager; `where` names the device in errors."""

    def __init__(self, process: subprocess.Popen[bytes], *, where: str) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        self.process, self.where = process, where
        self.lines: queue.Queue[bytes | None] = queue.Queue(maxsize=4)  # one is asked for
        self.complaints: deque[str] = deque(maxlen=20)
        self.readers = [
            threading.Thread(target=self._read_answers, args=(process.stdout,), daemon=True),
            threading.Thread(target=self._read_complaints, args=(process.stderr,), daemon=True),
        ]
        for reader in self.readers:
            reader.start()

    def _read_answers(self, stream: Any) -> None:
        while line := stream.readline(LARGEST_ANSWER):
            self.lines.put(line)  # one that was cut is no JSON
            if not line.endswith(b"\n"):
                break
        self.lines.put(None)

    def _read_complaints(self, stream: Any) -> None:
        while line := stream.readline(LONGEST_COMPLAINT):
            self.complaints.append(line.decode("utf-8", "replace").strip())

    def ask(self, do: str, *, timeout: float = 60.0, **request: Any) -> Any:
        """The runner's answer to one request.

        Raises RuntimeUnavailable if it cannot be done there, ArtifactError if the file is rejected, RunError if the
        runtime fails, DeviceError if no answer comes within `timeout` seconds.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}).encode("ascii") + b"\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=timeout)
        except queue.Empty as error:
            self.process.kill()
            raise DeviceError(
                f"{self.where} gave no answer to {do!r} within {timeout:.0f} s; it was stopped"
            ) from error
        except (BrokenPipeError, OSError) as error:
            raise self._lost(do) from error
        if line is None:
            raise self._lost(do)
        return self._unwrap(line, request)

    def _lost(self, do: str) -> DeviceError:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        self.readers[1].join(GRACE)
        reason = next((line for line in reversed(self.complaints) if line), "no reason given")
        code = self.process.returncode
        return DeviceError(f"{self.where} was lost at {do!r} (exit code {code}): {printable(reason, 300)}")

    def _unwrap(self, line: bytes, request: Mapping[str, Any]) -> Any:
        try:
            answer = json.loads(line)
            if "ok" in answer:
                return answer["ok"]
            kind, message = answer["error"]["kind"], answer["error"]["message"]
        except (ValueError, TypeError, KeyError) as error:  # also JSON that is not an answer, such as a number
            said = printable(line[:100].decode("latin-1"))
            raise DeviceError(f"{self.where} answered {said!r}, expected the runner's JSON") from error
        if kind == "rejected":
            raise FileRefused(request["model"], message)
        kinds = {"unavailable": RuntimeUnavailable, "misuse": UsageError}
        raise kinds.get(kind, RunError)(message)

    def run(self, array: np.ndarray, *, timeout: float = 300.0) -> dict[str, np.ndarray]:
        """Every output by name for one input array."""
        outputs = self.ask("run", input=runner.pack(array), timeout=timeout)["outputs"]
        return {name: runner.unpack(value) for name, value in outputs.items()}

    def close(self) -> None:
        """End of input ends the runner; one that does not react is killed."""
        assert self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for reader, stream in zip(self.readers, (self.process.stdout, self.process.stderr), strict=True):
            reader.join(GRACE)
            if stream is not None and not reader.is_alive():
                stream.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
