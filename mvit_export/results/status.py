"""How a check ended, and the status of several together."""

from __future__ import annotations

from collections.abc import Iterable

PASS, FAIL, NOT_RUN = "pass", "fail", "not-run"
MEASURED = "measured"  # of a figure that is not a verdict


def worst_status(statuses: Iterable[str]) -> str:
    """FAIL outweighs NOT-RUN, which outweighs the rest, a PASS. No status at all is NOT-RUN."""
    found = set(statuses)
    return FAIL if FAIL in found else NOT_RUN if NOT_RUN in found or not found else PASS
