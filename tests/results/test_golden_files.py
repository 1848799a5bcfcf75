"""Files of an earlier version are read and written again byte for byte: same keys, same order, same types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvit_export.artifact import write_json
from mvit_export.results.accuracy import AccuracyReport
from mvit_export.results.latency import LatencyReport

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.mark.parametrize(("name", "record"), [("latency.json", LatencyReport), ("accuracy.json", AccuracyReport)])
def test_records_give_the_same_bytes(tmp_path: Path, name: str, record: type[LatencyReport | AccuracyReport]) -> None:
    stored = (GOLDEN / name).read_bytes()
    write_json(tmp_path / name, record.from_json(json.loads(stored)).to_json())
    assert (tmp_path / name).read_bytes() == stored
