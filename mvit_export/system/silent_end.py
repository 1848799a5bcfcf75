"""os._exit by somebody else's code, such as a network's, must not end this program as if all were well."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_silent_end() -> Iterator[None]:
    """os._exit raises SystemExit in this process; processes that are forked from it keep theirs."""
    end, own = os._exit, os.getpid()

    def raise_exit(code: int) -> None:
        if os.getpid() != own:
            end(code)
        raise SystemExit(f"os._exit({code})")

    os._exit = raise_exit  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = end


def end_with(result: int) -> None:
    """From now on this process ends with `result`, though a handler of atexit calls os._exit itself."""
    end, own = os._exit, os.getpid()
    os._exit = lambda code: end(result if os.getpid() == own else code)  # type: ignore[assignment]
