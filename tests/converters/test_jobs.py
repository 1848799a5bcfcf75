"""Targets side by side: how many, in which order, and what is left when one fails, is ended or is lost."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS

from mvit_export.converters import jobs as jobs_module
from mvit_export.converters.jobs import Crew, Work, choose_jobs, do_in_turn, order_of
from mvit_export.errors import ConversionError, MvitExportError, PartialExportError, UsageError
from mvit_export.families.table import family_of
from mvit_export.formats.targets import plan_targets
from mvit_export.models.loaded import count_parameters
from mvit_export.system import machine, processes
from mvit_export.system.processes import portable
from mvit_export.system.staging import no_empty_folders, staged_directory

pytestmark = pytest.mark.slow

GIB = 2**30

# What the machine grants


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 33554432 kB\n"}  # 32 GiB
V2 = {"proc/self/cgroup": "0::/box/job\n"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/docker/ab\n4:memory:/docker/ab\n0::/\n"}
CPU = "sys/fs/cgroup/cpu"
MEMORY = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({**V2, "sys/fs/cgroup/box/job/cpu.max": "max 100000"}, 8),
        ({**V2, "sys/fs/cgroup/box/job/cpu.max": "350000 100000"}, 3),
        ({**V2, "sys/fs/cgroup/box/cpu.max": "200000 100000", "sys/fs/cgroup/box/job/cpu.max": "max 100000"}, 2),
        ({**V2, "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),  # a container sees its own group as the root
        ({**V1, f"{CPU}/docker/ab/cpu.cfs_quota_us": "-1", f"{CPU}/docker/ab/cpu.cfs_period_us": "100000"}, 8),
        ({**V1, f"{CPU}/docker/ab/cpu.cfs_quota_us": "400000", f"{CPU}/docker/ab/cpu.cfs_period_us": "100000"}, 4),
        ({**V1, f"{CPU}/cpu.cfs_quota_us": "200000", f"{CPU}/cpu.cfs_period_us": "100000"}, 2),
    ],
)
def test_cores_are_those_of_the_container(
    files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert machine.usable_cores(write_tree(tmp_path, files)) == cores


@pytest.mark.parametrize(
    ("files", "gib"),
    [
        ({}, 32),
        ({**V2, "sys/fs/cgroup/box/job/memory.max": "max", "sys/fs/cgroup/box/job/memory.current": "0"}, 32),
        (
            {
                **V2, "sys/fs/cgroup/box/memory.max": str(4 * GIB), "sys/fs/cgroup/box/memory.current": str(3 * GIB),
                "sys/fs/cgroup/box/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            2,
        ),
        (
            {
                **V1, f"{MEMORY}/memory.limit_in_bytes": str(4 * GIB), f"{MEMORY}/memory.usage_in_bytes": str(3 * GIB),
                f"{MEMORY}/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}\n",
            },
            2,
        ),
        ({**V2, "sys/fs/cgroup/memory.max": str(GIB), "sys/fs/cgroup/memory.current": str(2 * GIB)}, 0),
    ],
)  # fmt: skip
def test_memory_is_that_of_the_container(files: dict[str, str], gib: int, tmp_path: Path) -> None:
    assert machine.available_memory(write_tree(tmp_path, MEMINFO | files)) == gib * GIB


def test_this_machine_grants_something() -> None:
    assert 1 <= machine.usable_cores() <= (os.cpu_count() or 1)
    assert machine.available_memory() > 0


# How many processes


@pytest.fixture(scope="module")
def xxs() -> Any:
    from mvit_export import load_model

    return load_model("xxs", image_size=64)


@pytest.mark.parametrize(
    ("cores", "memory", "to", "jobs"),
    [(8, 32, "all", 3), (2, 32, "all", 2), (1, 32, "all", 1), (8, 3, "all", 2), (8, 0, "all", 1), (8, 32, "onnx", 1)],
)
def test_jobs_follow_cores_and_memory(
    xxs: Any, cores: int, memory: int, to: str, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs_module, "usable_cores", lambda: cores)
    monkeypatch.setattr(jobs_module, "available_memory", lambda: memory * GIB)
    assert choose_jobs(None, xxs, plan_targets(to)) == jobs


def test_jobs_that_are_asked_for_are_had(xxs: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "available_memory", lambda: 0)
    assert choose_jobs(2, xxs, plan_targets("all")) == 2
    assert choose_jobs(64, xxs, plan_targets("all")) == 3
    with pytest.raises(UsageError, match="--jobs is 0, expected at least 1"):
        choose_jobs(0, xxs, plan_targets("all"))


def test_a_model_from_a_file_stays_in_its_process(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs_module, "usable_cores", lambda: 8)
    assert choose_jobs(None, tiny_model, plan_targets("all")) == 1
    assert choose_jobs(1, tiny_model, plan_targets("all")) == 1
    with pytest.raises(UsageError, match="--jobs 2: a model from a Python file stays in the process that ran it"):
        choose_jobs(2, tiny_model, plan_targets("all"))


def test_the_longest_is_begun_first() -> None:
    targets = plan_targets("all", precision=["fp32", "fp16"])
    names = [targets[index].name for index in order_of(targets)]
    assert names == ["tflite-fp32", "tflite-fp16", "coreml-fp32", "coreml-fp16", "onnx-fp32", "onnx-fp16"]


# The processes, with small tasks


@dataclass(frozen=True)
class Write:
    """Sleep, then write a file and tell of this process."""

    file: Path
    seconds: float = 0.0

    def __call__(self) -> dict[str, Any]:
        time.sleep(self.seconds)
        self.file.write_text("whole")
        return {"pid": os.getpid(), "parent": os.getppid(), "environment": dict(os.environ)}


@dataclass(frozen=True)
class Refuse:
    error: BaseException
    after: Path | None = None  # a file to wait for

    def __call__(self) -> None:
        while self.after and not self.after.exists():
            time.sleep(0.01)
        raise self.error


@dataclass(frozen=True)
class Crash:
    def __call__(self) -> None:
        os._exit(9)


@dataclass(frozen=True)
class Unpicklable:
    call: Callable[[], Any]

    def __call__(self) -> Any:
        return self.call()


@dataclass(frozen=True)
class Hold:
    """Never lets another thread of Python run, as C++ may."""

    def __call__(self) -> None:
        import ctypes

        ctypes.PyDLL(None).sleep(600)


@dataclass(frozen=True)
class Scribble:
    """Write without end, also where the folder was taken away."""

    file: Path

    def __call__(self) -> None:
        while True:
            with contextlib.suppress(FileNotFoundError):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                self.file.write_text("half")


def artifact(place: Path, task: Callable[[Path], Any], after: Callable[[], None] = lambda: None) -> Work[Any]:
    with staged_directory(place, overwrite=False) as staging:
        answer = yield task(staging / "file")
    after()
    return answer


def crew_of(count: int) -> Crew:
    return Crew([()] * count)


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def children() -> set[int]:
    """Processes below this one that are crews'; multiprocessing's own tracker stays."""
    found = set()
    for task in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        for pid in task.read_text().split():
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.add(int(pid))
    return found


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def test_results_come_in_the_order_of_the_works(tmp_path: Path) -> None:
    waits, finished = (0.0, 0.5, 0.0, 0.0), []
    works = [
        artifact(
            tmp_path / f"out/{index}",
            lambda file, index=index: Write(file, waits[index]),  # type: ignore[misc]
            lambda index=index: finished.append(index),  # type: ignore[misc]
        )
        for index in range(4)
    ]
    with crew_of(2) as crew:
        results = crew.do(works, [1, 3, 2, 0])
        assert not crew.processes, "a process without work ends and gives its memory back"
    assert finished == [3, 2, 0, 1]
    assert [result["parent"] for result in results] == [os.getpid()] * 4
    assert results[1]["pid"] != results[0]["pid"] == results[2]["pid"] == results[3]["pid"]
    assert tree(tmp_path / "out") == ["0", "0/file", "1", "1/file", "2", "2/file", "3", "3/file"]


def test_a_work_may_end_before_its_first_task(tmp_path: Path) -> None:
    """As one does that finds its own fault while it is prepared."""

    def early(answer: str) -> Work[Any]:
        yield from ()
        return answer

    def works() -> list[Work[Any]]:
        return [early("first"), artifact(tmp_path / "out", Write), early("last")]

    with crew_of(2) as crew:
        first, made, last = crew.do(works(), [0, 2, 1])
    assert (first, last, made["parent"]) == ("first", "last", os.getpid())
    shutil.rmtree(tmp_path / "out")
    first, made, last = do_in_turn(works())
    assert (first, last, made["pid"]) == ("first", "last", os.getpid())


def test_processes_share_the_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "usable_cores", lambda: 6)
    with crew_of(2) as crew:
        (result,) = crew.do([artifact(tmp_path / "a", Write)], [0])
        assert result["environment"]["TMPDIR"] == crew.scratch.name
        assert Path(crew.scratch.name).is_dir()
    assert result["environment"]["OMP_NUM_THREADS"] == result["environment"]["MKL_NUM_THREADS"] == "3"
    assert not Path(crew.scratch.name).exists(), "what a killed converter left goes too"


def fail_beside(out: Path, failing: Callable[[Path], Any]) -> Sequence[Work[Any]]:
    """One work that is done soon, one that takes long, one that fails after the first is done."""
    return [
        artifact(out / "quick", Write),
        artifact(out / "slow", lambda file: Write(file, 600)),
        artifact(out / "failing", failing),
    ]


@linux_only
@pytest.mark.parametrize(
    ("failing", "kind", "message"),
    [
        (lambda _: Refuse(ConversionError("no such operator")), ConversionError, "^no such operator$"),
        (lambda _: Refuse(KeyError("x")), RuntimeError, "^KeyError: 'x'$"),
        (lambda _: Refuse(SystemExit(0)), RuntimeError, "^SystemExit: 0$"),
        (lambda _: Crash(), ConversionError, r"a process was lost \(exit code 9\)"),
        (lambda _: Unpicklable(lambda: 1), ConversionError, "cannot be handed to another process"),
    ],
)
def test_an_error_ends_the_others_and_leaves_what_is_finished(
    failing: Callable[[Path], Any], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    begun = time.monotonic()
    with pytest.raises(kind, match=message) as caught, crew_of(2) as crew, no_empty_folders(out):
        crew.do(fail_beside(out, failing), [1, 0, 2])
    assert type(caught.value) is kind
    assert time.monotonic() - begun < 60
    assert tree(out) == ["quick", "quick/file"]
    assert children() == set()


def test_the_traceback_of_a_process_is_shown(tmp_path: Path) -> None:
    with pytest.raises(ConversionError) as caught, crew_of(2) as crew:
        crew.do([artifact(tmp_path / "a", lambda _: Refuse(ConversionError("no such operator")))], [0])
    text = "".join(traceback.format_exception(caught.value))
    assert "raise self.error" in text, "the line of the other process"


def test_nothing_is_left_where_nothing_was_finished(tmp_path: Path) -> None:
    """Whichever of the works made the folder that both are in."""
    out = tmp_path / "out" / "model"

    def fail_here() -> Work[None]:
        with staged_directory(out / "a", overwrite=False):
            yield Write(tmp_path / "file")
            raise ConversionError("the disk is full")

    with pytest.raises(ConversionError, match="the disk is full"), crew_of(2) as crew, no_empty_folders(out):
        crew.do([fail_here(), artifact(out / "b", lambda file: Write(file, 600))], [0, 1])
    assert not (tmp_path / "out").exists()


def test_a_process_that_still_writes_is_ended_before_its_folder_goes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    begun = out / ".a.mvit-export.partial" / "file"
    works = [artifact(out / "a", Scribble), artifact(out / "b", lambda _: Refuse(UsageError("no"), begun))]
    with pytest.raises(UsageError, match=r"^no$"), crew_of(2) as crew, no_empty_folders(out):
        crew.do(works, [0, 1])
    assert tree(tmp_path) == []


def test_in_turn_an_error_leaves_the_same(tmp_path: Path) -> None:
    out = tmp_path / "out"
    works = [
        artifact(out / "a", Write),
        artifact(out / "b", lambda _: Refuse(UsageError("no"))),
        artifact(out / "c", Write),
    ]
    with pytest.raises(UsageError, match=r"^no$"):
        do_in_turn(works)
    assert tree(out) == ["a", "a/file"]


RUN = """
import sys, time
from pathlib import Path
from mvit_export.system import processes
from test_jobs import Hold, Write, artifact, crew_of
processes.leave_after = lambda sentinel: time.sleep(600)  # a thread that never gets its turn, as on a busy machine
if __name__ == "__main__":
    out = Path(sys.argv[1])
    with crew_of(2) as crew:
        crew.do([artifact(out / "a", lambda file: Hold()), artifact(out / "b", lambda file: Write(file, 600))], [0, 1])
"""


def descendants(pid: int) -> set[int]:
    found = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@contextlib.contextmanager
def running(command: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    try:
        yield process
    finally:
        kill(process.pid, *descendants(process.pid))
        process.communicate()


def kill(*pids: int, by: signal.Signals = signal.SIGKILL) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, by)


@linux_only
@pytest.mark.parametrize("while_starting", [False, True])
def test_no_process_outlives_a_killed_parent(tmp_path: Path, *, while_starting: bool) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(Path(__file__).parent), str(TESTS)))}
    with running([sys.executable, str(script), str(tmp_path / "out")], env=environment) as process:
        wait_until(lambda: len(list((tmp_path / "out").glob(".*.partial"))) == 2)
        if while_starting:  # a task waits for each in its pipe
            kill(*descendants(process.pid), by=signal.SIGSTOP)
        time.sleep(3)  # both are inside their task
        below = descendants(process.pid)
        assert len(below) >= 2
        process.kill()
        process.wait()
        try:
            kill(*below, by=signal.SIGCONT)
            wait_until(lambda: not any(alive(pid) for pid in below))
        finally:
            kill(*below)


# The export itself


def export_onnx(model: Any, out: Path, **options: Any) -> Any:
    from mvit_export import export

    return export(model, to="onnx", precision=["fp32", "fp16"], out=out, **options)


def test_both_ways_make_the_same(xxs: Any, tmp_path: Path) -> None:
    """In processes or in turn: the same graph, golden vectors, verdicts and order; every step is told."""
    steps: list[tuple[str, str]] = []
    beside = export_onnx(xxs, tmp_path / "2", jobs=2, on_step=lambda target, what: steps.append((target.name, what)))
    in_turn = export_onnx(xxs, tmp_path / "1")
    for one, other in zip(beside, in_turn, strict=True):
        assert one.parity.status == other.parity.status == "pass"
        assert json.loads((one.artifact.path / "parity.json").read_text())["status"] == "pass"
        first, second = ({f.path: f.sha256 for f in result.artifact.manifest.files} for result in (one, other))
        assert first["golden.safetensors"] == second["golden.safetensors"]
        assert one.artifact.model_bytes == other.artifact.model_bytes
    assert [result.artifact.path.name for result in beside] == ["onnx-fp32", "onnx-fp16"]
    for name in ("onnx-fp32", "onnx-fp16"):
        assert [what for target, what in steps if target == name] == ["convert", "verify", "done"]


def test_a_process_cannot_vouch_for_its_own_mistake(xxs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processes are given is damaged on the way: the golden vectors stay right and the files fail."""
    import torch

    from mvit_export import verify
    from mvit_export.converters import export as export_module

    fold = export_module.fold_batch_norms

    def damaged(network: Any, example: Any) -> Any:
        folded = fold(network, example)
        with torch.no_grad():
            folded.classifier.weight.mul_(1.5)
        return folded

    monkeypatch.setattr(export_module, "fold_batch_norms", damaged)
    results = export_onnx(xxs, tmp_path, jobs=2)
    assert [result.parity.status for result in results] == ["fail", "fail"]
    for result in results:
        (verdict,) = verify(result.artifact.path, against="golden")
        assert verdict.status == "fail"


def test_a_converter_that_fails_in_a_process_is_told_as_ever(
    xxs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mvit_export.converters import export as export_module

    monkeypatch.setattr(export_module, "fold_batch_norms", lambda *_: torch.nn.Linear(3, 3))
    with pytest.raises(PartialExportError, match=r"^2 of 2 targets failed, onnx-fp32, onnx-fp16; ") as caught:
        export_onnx(xxs, tmp_path / "out", jobs=2)
    assert caught.value.results == ()
    for name, error in caught.value.failures.items():
        assert type(error) is ConversionError
        assert re.search(rf"^ONNX {name[5:]}: the converter failed: .*; -v shows more$", str(error))
        text = "".join(traceback.format_exception(error))
        assert "converters/onnx/convert.py" in text, "-v shows the converter's own lines"
    assert tree(tmp_path) == []


def test_a_target_that_fails_in_a_process_leaves_the_others(
    xxs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from mvit_export.converters import export as export_module

    choose = export_module.choose_network

    def broken_for_fp16(model: Any, folded: Any, target: Any) -> Any:
        network, form = choose(model, folded, target)
        return (torch.nn.Linear(3, 3) if target.precision == "fp16" else network), form

    monkeypatch.setattr(export_module, "choose_network", broken_for_fp16)
    steps: list[tuple[str, str]] = []
    with pytest.raises(
        PartialExportError, match=r"^1 of 2 targets failed, onnx-fp16; onnx-fp16: ONNX fp16: "
    ) as caught:
        export_onnx(xxs, tmp_path, jobs=2, on_step=lambda target, what: steps.append((target.name, what)))
    (made,) = caught.value.results
    assert made.parity.status == "pass"
    assert [place.name for place in (tmp_path / xxs.info.name).iterdir()] == ["onnx-fp32"] == [made.artifact.path.name]
    assert [what for name, what in steps if name == "onnx-fp32"] == ["convert", "verify", "done"]
    assert [what for name, what in steps if name == "onnx-fp16"] == ["convert", "failed"]


def test_a_timm_network_reaches_another_process(tmp_path: Path) -> None:
    """Beside a torchvision that does not fit torch, timm cannot simply be imported there."""
    from mvit_export import load_model

    model = load_model(model="timm:mobilenetv3_small_050", image_size=32)
    measure = functools.partial(count_parameters, model.module)
    with Crew([()], family_of(model.info.source).prepare) as crew:
        (counted,) = crew.do([artifact(tmp_path / "a", lambda _: measure)], [0])
    assert counted == model.info.params


@linux_only
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_ended_export_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    """Sent to the whole group, as a terminal does."""
    arguments = ["--to", "onnx,tflite", "--variant", "xxs", "--image-size", "64", "--jobs", "2", "--json"]
    command = [sys.executable, "-m", "mvit_export", *arguments]
    with running(command, cwd=tmp_path, start_new_session=True) as process:
        wait_until(lambda: len(list((tmp_path / "artifacts").glob("*/.*.partial"))) == 2)
        time.sleep(1)  # inside the converters
        below = descendants(process.pid)
        os.killpg(process.pid, number)
        begun = time.monotonic()
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - begun < 5
    assert process.returncode == 130
    assert err == "mvit-export: error: interrupted; nothing half-written was left\n"
    assert json.loads(out)["status"] == "error"
    wait_until(lambda: not any(alive(pid) for pid in below), seconds=5)
    assert tree(tmp_path) == []


def test_the_command_refuses_jobs_for_a_file(cli: Callable[..., Any], tmp_path: Path) -> None:
    model = f"{TESTS / 'tiny.py'}:tiny"
    done = cli("--to", "onnx", "--model", model, "--jobs", "2", cwd=tmp_path)
    assert done.code == 2
    assert "--jobs 2: a model from a Python file stays in the process that ran it" in done.err
    assert tree(tmp_path) == []


def test_errors_of_ours_are_carried_whole() -> None:
    """Every kind can be named from another process by its class alone."""
    kinds = [MvitExportError, *MvitExportError.__subclasses__()]
    for kind in kinds:
        found, message = portable(kind("what was wrong"))
        assert issubclass(kind, found)
        assert message == "what was wrong"
