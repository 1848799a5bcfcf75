"""What a conversion does to Python's search for garbage, and that it is undone."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import pytest

from mvit_export.system.processes import no_collection


@pytest.fixture(autouse=True)
def unfrozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.enable()
    gc.freeze()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_search_is_as_it_was_afterwards(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    with contextlib.suppress(KeyError), no_collection():
        assert not gc.isenabled() and gc.get_freeze_count() > 0
        raise KeyError("an error in a conversion")
    assert (gc.isenabled(), gc.get_freeze_count()) == (enabled, 0)


def test_what_a_caller_froze_stays_frozen() -> None:
    gc.freeze()
    with no_collection():
        pass
    assert gc.get_freeze_count() > 0
