"""A directory appears whole or not at all: errors, kills, races, full disks."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from staging_child import FILES, fill, generation, write

from mvit_export.errors import ArtifactError
from mvit_export.system import staging
from mvit_export.system.staging import staged_directory

CHILD = Path(__file__).with_name("staging_child.py")


def start(*args: str | Path) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, str(CHILD), *map(str, args)], stdin=pipe, stdout=pipe, stderr=pipe, text=True
    )


def tell(process: subprocess.Popen[str], text: str = "go\n") -> tuple[int, str]:
    """Send a line, wait for the end; (exit code, stderr)."""
    try:
        _, err = process.communicate(text, timeout=30)
    finally:
        process.kill()  # nothing to it where it has ended
    return process.returncode, err


def fail_inside(place: Path, error: BaseException, *, overwrite: bool = False) -> None:
    with staged_directory(place, overwrite=overwrite) as folder:
        fill(folder, "new")
        raise error


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Whole or not at all


def test_directory_appears_only_after_the_block(tmp_path: Path) -> None:
    place = tmp_path / "out" / "xxs" / "onnx-fp32"
    with staged_directory(place, overwrite=False) as folder:
        assert folder.parent == place.parent, "a rename is atomic only within one file system"
        assert folder.name.startswith(".")
        assert list(folder.iterdir()) == []
        fill(folder, "new")
        assert not place.exists()
    assert generation(place) == "new"
    assert names(place.parent) == ["onnx-fp32"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    place = tmp_path / "a" / "b" / "c"
    with pytest.raises(error):
        fail_inside(place, error())
    assert list(tmp_path.iterdir()) == [], "folders that the run made are taken away again"


def test_error_keeps_folders_that_were_there(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match="oops"):
        fail_inside(tmp_path / "a" / "b" / "c", ValueError("oops"))
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == []


def test_error_keeps_the_old_directory(tmp_path: Path) -> None:
    place = tmp_path / "x"
    write(place, "old")
    with pytest.raises(ValueError, match="oops"):
        fail_inside(place, ValueError("oops"), overwrite=True)
    assert generation(place) == "old"
    assert names(tmp_path) == ["x"]


def test_relative_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("x"), "one")
    write(Path("x"), "two")
    assert generation(Path("x")) == "two"
    assert names(tmp_path) == ["x"]


# Overwriting


def test_existing_is_refused_before_any_work(tmp_path: Path) -> None:
    place = tmp_path / "x"
    write(place, "old")
    with pytest.raises(ArtifactError) as error, staged_directory(place, overwrite=False):
        pytest.fail("the block must not run")
    assert str(error.value) == f"{place} exists; pass --overwrite to replace it, or another --out"
    assert generation(place) == "old"


def test_place_taken_during_the_run_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "x"

    def run() -> None:
        with staged_directory(place, overwrite=False) as folder:
            fill(folder, "new")
            fill(place, "theirs")

    with pytest.raises(ArtifactError, match="exists; pass --overwrite"):
        run()
    assert generation(place) == "theirs"
    assert names(tmp_path) == ["x"]


def make_folder(place: Path) -> None:
    place.mkdir()
    (place / "thesis.tex").write_text("years")


def make_empty_folder(place: Path) -> None:
    place.mkdir()


def make_file(place: Path) -> None:
    place.write_text("years")


def make_link(place: Path) -> None:
    write(place.with_name("elsewhere"), "old")
    place.symlink_to("elsewhere")


def make_dangling_link(place: Path) -> None:
    place.symlink_to("nowhere")


@pytest.mark.parametrize("make", [make_folder, make_empty_folder, make_file, make_link, make_dangling_link])
def test_only_artifacts_are_overwritten(tmp_path: Path, make: Callable[[Path], None]) -> None:
    place = tmp_path / "x"
    make(place)
    before = sorted(map(str, tmp_path.rglob("*")))
    with pytest.raises(ArtifactError) as error, staged_directory(place, overwrite=True):
        pytest.fail("the block must not run")
    assert str(error.value) == f"{place} exists and is not an artifact directory; move it away, or pass another --out"
    assert sorted(map(str, tmp_path.rglob("*"))) == before


def test_overwrite_replaces_everything(tmp_path: Path) -> None:
    place = tmp_path / "x"
    write(place, "old")
    (place / "parity.json").write_text("of the old model")
    write(place, "new")
    assert generation(place) == "new", "a file of the old directory would be taken for the new one's"
    assert names(tmp_path) == ["x"]


@pytest.mark.slow
def test_readers_never_miss_or_mix_during_overwrites(tmp_path: Path) -> None:
    place = tmp_path / "x"
    write(place, "first")
    seen: set[str] = set()
    faults: list[str] = []
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            try:
                seen.add((place / "manifest.json").read_text())
            except OSError as error:
                faults.append(f"by path: {error}")
            folder = os.open(place, os.O_RDONLY)  # one directory; the writer may delete it while it is read
            try:
                tags = {read_below(folder, name) for name in FILES} - {None}
            finally:
                os.close(folder)
            if len(tags) > 1:
                faults.append(f"mixed: {tags}")

    def read_below(folder: int, name: str) -> str | None:
        try:
            with open(os.open(name, os.O_RDONLY, dir_fd=folder)) as file:
                return file.read()
        except FileNotFoundError:
            return None

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for number in range(150):
            write(place, f"generation {number}")
    finally:
        done.set()
        reader.join()
    assert faults == []
    assert len(seen) > 10, "the reader was too slow to prove anything"
    assert all(tag == "first" or tag.startswith("generation") for tag in seen)


# Kills


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["new", "overwrite", "renames"])
def test_kill_at_every_line(tmp_path: Path, mode: str) -> None:
    """A run that dies at any line leaves old or new, whole; the next run, of another target, clears what it left."""
    done = subprocess.run(
        [sys.executable, str(CHILD), "crash", str(tmp_path / "out"), mode], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    deaths = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(deaths) > 50
    old = "absent" if mode == "new" else "old"
    # Two renames cannot be atomic: a kill between them hides the old directory until the next run.
    hidden = [death for death in deaths if mode == "renames" and death["seen"] == "absent"]
    assert len(hidden) <= 1
    assert all(death["after"] == "old" for death in hidden)
    assert {death["seen"] for death in deaths if death not in hidden} == {old, "new"}
    for death in deaths:
        assert death in hidden or death["after"] == death["seen"]
        assert death["left"] == ["tflite-fp32"] if death["after"] == "absent" else ["onnx-fp32", "tflite-fp32"]


@pytest.mark.slow
def test_kill_at_random_moments(tmp_path: Path) -> None:
    place = tmp_path / "out" / "x"
    chance = random.Random(0)
    for _ in range(25):
        process = start("loop", place)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.communicate()
        assert not generation(place).startswith("BROKEN"), generation(place)
    write(place, "last")
    assert generation(place) == "last"
    assert names(place.parent) == ["x"]


def test_hidden_old_directory_comes_back_before_the_next_run_looks(tmp_path: Path) -> None:
    """After a kill between two renames the place is free in name only: the old artifact still counts as existing."""
    place = tmp_path / "x"
    write(tmp_path / ".x.mvit-export.partial.old", "old")
    write(tmp_path / ".x.mvit-export.partial", "new")
    with pytest.raises(ArtifactError, match="exists; pass --overwrite"), staged_directory(place, overwrite=False):
        pytest.fail("the block must not run")
    assert generation(place) == "old"
    assert names(tmp_path) == ["x"]


# Other runs


@pytest.mark.slow
def test_second_run_into_the_same_place_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "x"
    write(place, "old")
    first = start("hold", place, "first")
    assert first.stdout is not None
    first.stdout.readline()
    with pytest.raises(ArtifactError) as error, staged_directory(place, overwrite=True):
        pytest.fail("the block must not run")
    assert str(error.value) == f"another run is writing {place}; wait for it, or pass another --out"
    assert generation(place) == "old"
    assert tell(first) == (0, "")
    assert generation(place) == "first"
    assert names(tmp_path) == ["x"]


@pytest.mark.slow
def test_of_many_runs_at_once_one_wins(tmp_path: Path) -> None:
    place = tmp_path / "out" / "x"
    for number in range(3):
        runs = {f"{number}-{i}": start("race", place, f"{number}-{i}") for i in range(6)}
        for run in runs.values():
            assert run.stdout is not None
            run.stdout.readline()
        for run in runs.values():  # all are past their imports: let them go together
            assert run.stdin is not None
            run.stdin.write("go\n")
            run.stdin.flush()
        ends = {tag: tell(run, "") for tag, run in runs.items()}
        winners = [tag for tag, (code, _) in ends.items() if code == 0]
        assert winners == [generation(place)], ends
        for code, err in ends.values():
            expected = (
                f"another run is writing {place}; wait for it, or pass another --out\n",
                f"{place} exists; pass --overwrite to replace it, or another --out\n",
            )
            assert code == 0 or err in expected
        assert names(place.parent) == ["x"]
        shutil.rmtree(place.parent)


def test_leftovers_of_other_targets_are_swept_but_not_living_runs(tmp_path: Path) -> None:
    living = start("hold", tmp_path / "living", "living")
    assert living.stdout is not None
    living.stdout.readline()
    fill(tmp_path / ".dead.mvit-export.partial", "dead")
    write(tmp_path / "x", "new")
    assert names(tmp_path) == [".living.mvit-export.partial", "x"]
    assert tell(living) == (0, "")
    assert generation(tmp_path / "living") == "living"
    assert names(tmp_path) == ["living", "x"]


def test_leftover_of_a_run_that_dies_just_now_is_not_built_upon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies after the sweep and before the claim."""
    monkeypatch.setattr(staging, "_sweep", lambda parent: fill(tmp_path / ".x.mvit-export.partial" / "deep", "dead"))
    write(tmp_path / "x", "new")
    assert generation(tmp_path / "x") == "new"


def test_parent_that_a_failing_run_takes_away_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The failing run had made the parent, so it removes it where it is empty."""
    monkeypatch.setattr(staging, "_sweep", lambda parent: parent.rmdir())
    write(tmp_path / "out" / "x", "new")
    assert generation(tmp_path / "out" / "x") == "new"


def test_old_directory_of_a_living_run_is_not_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where two names cannot be exchanged, another run may come by between the renames."""
    monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    rename = Path.rename
    visits = []

    def rename_with_visit(self: Path, target: Path) -> Path:
        result = rename(self, target)
        if self.name in ("x", ".x.mvit-export.partial") and not visits.count(self.name):
            visits.append(self.name)
            monkeypatch.setattr(Path, "rename", rename)
            write(tmp_path / f"visitor-{len(visits)}", "visitor")
            monkeypatch.setattr(Path, "rename", rename_with_visit)
        return result

    write(tmp_path / "x", "old")
    monkeypatch.setattr(Path, "rename", rename_with_visit)
    write(tmp_path / "x", "new")
    assert visits == ["x", ".x.mvit-export.partial"]
    assert generation(tmp_path / "x") == "new"
    assert names(tmp_path) == ["visitor-1", "visitor-2", "x"]


def test_what_looks_like_a_leftover_but_is_none_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".download.mvit-export.partial").write_text("a file of the user's")
    (tmp_path / ".link.mvit-export.partial").symlink_to(tmp_path.parent)
    os.mkfifo(tmp_path / ".pipe.mvit-export.partial")  # opening one waits for a writer
    assert tell(start("write", tmp_path / "x", "new")) == (0, "")
    assert names(tmp_path) == [
        ".download.mvit-export.partial",
        ".link.mvit-export.partial",
        ".pipe.mvit-export.partial",
        "x",
    ]


def test_without_exchange_overwrite_still_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda a, b: False)
    write(tmp_path / "x", "old")
    write(tmp_path / "x", "new")
    assert generation(tmp_path / "x") == "new"
    assert names(tmp_path) == ["x"]


# Disks that refuse


def test_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "out" / "x"
    code, err = tell(start("full", place))
    assert (code, err) == (1, f"{place} cannot be written: {os.strerror(errno.EFBIG)}\n")
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_directory(tmp_path: Path) -> None:
    place = tmp_path / "x"
    write(place, "old")
    assert tell(start("full", place))[0] == 1
    assert generation(place) == "old"
    assert names(tmp_path) == ["x"]


def test_disk_that_fills_up_at_the_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    place = tmp_path / "out" / "x"
    with pytest.raises(ArtifactError) as error:
        write(place, "new")
    assert str(error.value) == f"{place} cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_everything_is_synced_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut after the rename must not show empty files under the final name."""
    place = tmp_path / "x"
    synced: list[tuple[str, bool]] = []
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), place.exists()))
        fsync(descriptor)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file was synced")
    monkeypatch.setattr(os, "fsync", record)
    write(place, "new")
    before = {path for path, appeared in synced if not appeared}
    hidden = tmp_path / ".x.mvit-export.partial"
    contents = [hidden / name for name in (*FILES, "model.mlpackage", "model.mlpackage/Data")]
    assert before == {str(path) for path in [hidden, *contents]}
    assert (str(tmp_path), True) in synced, "the rename itself"


@pytest.mark.parametrize(
    ("below", "reason"),
    [
        pytest.param("file/out/x", "Not a directory", id="below a file"),
        pytest.param(f"out/{'n' * 300}/x", "File name too long", id="long folder name"),
        pytest.param(f"{'n' * 300}/x", "File name too long", id="long folder name beside others"),
        pytest.param(f"out/{'n' * 250}", "File name too long", id="no room for the hidden name"),
    ],
)
def test_impossible_place_is_one_error_and_leaves_nothing(tmp_path: Path, below: str, reason: str) -> None:
    (tmp_path / "file").write_text("no folder")
    place = tmp_path / below
    with pytest.raises(ArtifactError) as error, staged_directory(place, overwrite=False):
        pytest.fail("the block must not run")
    assert str(error.value) == f"{place} cannot be written: {reason}"
    assert names(tmp_path) == ["file"]


def test_system_without_locks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "fcntl", None)
    with pytest.raises(ArtifactError, match="this system has no flock"):
        write(tmp_path / "out" / "x", "new")
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_parent(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(ArtifactError, match="cannot be written: Permission denied"):
            write(tmp_path / "x", "new")
    finally:
        tmp_path.chmod(0o700)
    assert names(tmp_path) == []
