"""`make attack`: hostile and damaged material, the same cases at every run; `make test` has a sample.

ATTACK_SEED=7 make attack  draws others where a kind has dice.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import attack_data
import attack_files
import attack_manifests
import attack_models
import attack_weights
import pytest
from attack import SAMPLED, Case, Sandbox, run
from attack_files import KINDS
from conftest import command_server
from read_sites import read_sites

from mvit_export.benchmarks.devices.benchmark_model import check_binary
from mvit_export.benchmarks.tuning.recipe_search import read_record
from mvit_export.cli.text import one_line
from mvit_export.errors import MvitExportError
from mvit_export.models.hub import check_digest
from mvit_export.readers.onnx import read_ort

pytestmark = pytest.mark.slow

# Reads that no command comes by without a device, a hub or minutes of work: what is given the path there.
DIRECT: dict[str, Callable[[Path], object]] = {
    "benchmarks/devices/benchmark_model.py:check_binary": lambda path: check_binary(path, "arm64-v8a"),
    "benchmarks/tuning/recipe_search.py:read_record": lambda path: read_record(path, {}),
    "mvit_export/models/hub.py:check_digest": lambda path: check_digest(path.rename(path.with_name("0" * 64))),
    "mvit_export/readers/onnx.py:read_ort": read_ort,
}
OWN = {  # reads of what this process has just written into a folder of its own
    "benchmarks/tuning/form_search.py:settle_record": "the record of a candidate in the staging folder",
    "mvit_export/artifact.py:hash_files": "the files of an export before the folder gets its name",
}
MODULES = (attack_manifests, attack_files, attack_models, attack_data, attack_weights)
CASES: tuple[Case, ...] = tuple(case for module in MODULES for case in module.cases())


def marked() -> list[object]:
    """Every case; all but a few of each kind are left to `make attack`."""
    met: Counter[str] = Counter()
    parameters = []
    for case in CASES:
        marks = [pytest.mark.attack] if met[case.kind] % SAMPLED else []
        met[case.kind] += 1
        parameters.append(pytest.param(case, id=case.id.encode("unicode_escape").decode(), marks=marks))
    return parameters


@pytest.mark.parametrize("case", marked())
def test_held(
    case: Case, tiny_artifact: Callable[..., Path], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("kind", case.kind)
    (tmp_path / "case").mkdir()
    result = run(case, Sandbox(tmp_path / "case", tiny_artifact), command_server())
    record_property("ended", result.crashed)
    shutil.rmtree(tmp_path / "case", ignore_errors=True)
    assert not result.faults, str(result)


def test_every_read_is_attacked() -> None:
    """A new way to read a file needs a case that comes by it, or a line in DIRECT or OWN."""
    tied = {name for case in CASES for name in case.reads}
    assert tied | DIRECT.keys() | OWN.keys() == read_sites()


@pytest.mark.parametrize("kind", ["fifo", "zero", "folder", "loop", "socket", "huge"])
@pytest.mark.parametrize("site", DIRECT)
def test_held_by_the_function_itself(site: str, kind: str, tmp_path: Path) -> None:
    KINDS[kind](tmp_path / "odd")
    try:
        assert DIRECT[site](tmp_path / "odd") is None
    except (MvitExportError, OSError) as error:
        assert one_line(error).isprintable()


def test_cases_have_names_of_their_own() -> None:
    assert [name for name, count in Counter(case.id for case in CASES).items() if count > 1] == []
