"""A case of an attack, the folder that it happens in, and the one judge of how commands hold.

A case is hostile or damaged material and the command that is given it. Whatever the material is, a command must say in
one line that it cannot use it, or use it if there is no harm in it; it must not run, write, hang, grow or take over a
terminal. `judge` is where that is written down.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import os
import random
import shutil
import stat
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from command_server import CommandServer, Limits, Outcome

SEED = int(os.environ.get("ATTACK_SEED", "0"))
SECONDS, MEGABYTES = 60.0, 4000.0  # of one command
ADDRESS_SPACE = 6000.0  # MB on top of the imports: a command that would take the machine's memory ends before
REFUSED = frozenset({2})
HARMLESS = frozenset({0, 1, 2, 3})  # for material that a command may also take as it is
# A runtime's own parser may end the process, which nobody can catch; then it is said (docs/security.md).
CRASHED = frozenset({-6, -8, -11})
RECORDS = ("parity", "latency", "accuracy")  # what commands write beside a model
SAMPLED = 150  # of so many cases of a kind, one is part of `make test`


@dataclass
class Sandbox:
    """A folder of a case's own. `files` is for material, `out` for what a command is told to write."""

    root: Path
    originals: Callable[..., Path]  # (format, precision) -> an artifact that must not be changed

    def __post_init__(self) -> None:
        for name in ("work", "tmp", "home", "canary", "files"):
            (self.root / name).mkdir()

    @property
    def files(self) -> Path:
        return self.root / "files"

    @property
    def canary(self) -> Path:
        """What must stay empty: code that ran would leave a file there."""
        return self.root / "canary"

    @property
    def out(self) -> Path:
        return self.root / "out"

    def artifact(self, fmt: str = "onnx", precision: str = "fp32", *, name: str = "") -> Path:
        """A copy without records."""
        records = shutil.ignore_patterns(*(f"{kind}*.json" for kind in RECORDS))
        place = self.root / "model" / (name or f"{fmt}-{precision}")
        return Path(shutil.copytree(self.originals(fmt, precision), place, ignore=records))


Arguments = Sequence[str | Path]


@dataclass(frozen=True)
class Case:
    """`make` lays the material out and returns the command's arguments; `codes` are the exit codes that may follow.

    `reads` names functions that read what was replaced: the case counts only if the command came by them.
    """

    kind: str
    name: str
    make: Callable[[Sandbox], Arguments]
    codes: frozenset[int] = REFUSED
    reads: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"

    @property
    def as_json(self) -> bool:
        """Half of the cases ask for the document."""
        return zlib.crc32(self.id.encode()) % 2 == 0


def rng(*names: object) -> random.Random:
    """Numbers that are the same in every run with one ATTACK_SEED."""
    return random.Random(f"{SEED} {names}")


@dataclass(frozen=True)
class Result:
    arguments: tuple[str, ...]
    outcome: Outcome
    faults: tuple[str, ...]

    @property
    def crashed(self) -> bool:
        return self.outcome.code in CRASHED

    def __str__(self) -> str:
        done = self.outcome
        text = [
            f"mvit-export {' '.join(self.arguments)!r}",
            f"exit code {done.code}, {done.seconds:.1f} s",
            *self.faults,
        ]
        return "\n".join([*text, f"stdout: {done.out[-1500:]!r}", f"stderr: {done.err[-3000:]!r}"])


def run(case: Case, sandbox: Sandbox, server: CommandServer) -> Result:
    """Do what the case says, and judge how it went."""
    arguments = [str(word) for word in case.make(sandbox)]
    as_json = case.as_json and ("--format" not in arguments or "-o" in arguments)  # a report on stdout is a document
    arguments += ["--json"] if as_json else []
    before, reads = snapshot(sandbox.root), sandbox.root.with_name(f"{sandbox.root.name}-reads")
    own = {"TMPDIR": str(sandbox.root / "tmp"), "HOME": str(sandbox.root / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    outcome = server.run_limited(
        arguments,
        cwd=sandbox.root / "work",
        env={**os.environ, **own, **{k: v.replace("{root}", str(sandbox.root)) for k, v in case.environment.items()}},
        limits=Limits(SECONDS, ADDRESS_SPACE, reads),
    )
    faults = [*judge(outcome, case, as_json), *changes(before, snapshot(sandbox.root), outcome.code)]
    by = set(reads.read_text().split("\n")) if reads.exists() else set()
    faults += [f"did not come to {name}" for name in case.reads if not any(line.endswith(f"/{name}") for line in by)]
    reads.unlink(missing_ok=True)
    return Result(tuple(arguments), outcome, tuple(faults))


def judge(done: Outcome, case: Case, as_json: bool) -> Iterator[str]:
    """What is wrong with how a command ended."""
    out, err = done.out.decode("utf-8", "replace"), done.err.decode("utf-8", "replace")
    if done.timed_out:
        yield f"took more than {SECONDS:.0f} s"
    elif done.code not in case.codes:
        yield f"exit code {done.code}, expected one of {sorted(case.codes)}"
    if done.peak_mb > MEGABYTES:
        yield f"took {done.peak_mb:.0f} MB"
    for phrase in ("internal error", "Traceback (most recent"):
        if phrase in out + err:
            yield phrase
    for name, text in (("stdout", out), ("stderr", err)):
        lines = text.split("\n")
        if not all(character.isprintable() or character in "\t\u200d" for line in lines for character in line):
            yield f"control characters on {name}"
        if any(line.lstrip().startswith("::") for line in lines):
            yield f"a CI's command on {name}"
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("mvit-export: error: ")]
    if done.code in (0, 1, 3) and (errors or (lines and not as_json)):
        yield "text on stderr beside a verdict"
    if done.code not in (0, 1, 3) and not done.timed_out and (len(errors) != 1 or errors[0] != lines[-1]):
        yield f"{len(errors)} lines of error, expected one, the last"
    if done.code == 2 and not as_json and len(lines) > 1:
        yield "more than a line on stderr"
    if as_json and not done.timed_out:
        yield from judge_document(out, done.code, errors)


def judge_document(out: str, code: int, errors: Sequence[str]) -> Iterator[str]:
    try:
        document = json.loads(out)
    except ValueError as error:
        yield f"stdout is no JSON document: {error}"
        return
    if code not in (0, 1, 3) and (not isinstance(document, dict) or document.get("status") != "error"):
        yield "the document does not say that there was an error"
    elif code not in (0, 1, 3) and errors != [f"mvit-export: error: {document['error']['message']}"]:
        yield "the document and the line differ"


# Nothing is written elsewhere

Snapshot = Mapping[str, tuple[object, ...]]


def snapshot(root: Path) -> Snapshot:
    """What every path is: its kind, and for a file its content, for a link its target."""
    return {os.path.relpath(path, root): describe(path) for path in walk(root)}


def walk(folder: Path) -> Iterator[str]:
    for entry in os.scandir(folder):
        yield entry.path
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))


def describe(path: str) -> tuple[object, ...]:
    found = os.lstat(path)
    kind = stat.S_IFMT(found.st_mode)
    if stat.S_ISLNK(kind):
        return kind, os.readlink(path)
    if stat.S_ISREG(kind) and found.st_size < 10**7:
        return kind, hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return (kind, found.st_size, found.st_mtime_ns) if stat.S_ISREG(kind) else (kind,)


def changes(before: Snapshot, after: Snapshot, code: int) -> Iterator[str]:
    """Files that a command may not have written, changed or removed."""
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name) and not may_change(name, code):
            verb = "removed" if name not in after else "changed" if name in before else "wrote"
            yield f"{verb} {name!r}"


def may_change(name: str, code: int) -> bool:
    """Records beside a model; what was asked for, unless it failed; what is left by a process that was killed."""
    top, *rest = Path(name).parts
    if top == "model":
        return len(rest) > 1 and rest[-1].startswith(RECORDS) and rest[-1].endswith(".json")
    if top == "tmp":
        return code < 0 or rest[:1] == [f"torchinductor_{getpass.getuser()}"]  # PyTorch's own cache
    if top == "files":
        return "__pycache__" in rest  # of a user's own Python file
    return top == "out" and (code in (0, 1, 3) or not rest)
