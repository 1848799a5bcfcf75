"""Errors that say what the machine refuses, whatever type and words a library gives them: memory and space."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from mvit_export.errors import MvitExportError, text_of

NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# The words of libc (strerror of ENOMEM and ENOSPC), of the loader of shared libraries, of C++ and of torch.
OUT_OF_MEMORY = re.compile(
    r"cannot allocate memory|can't allocate memory|not enough memory|out of memory|bad_alloc|failed to map segment"
    r"|cannot create shared object|can't start new thread",
    re.IGNORECASE,
)
OUT_OF_SPACE = re.compile(r"No space left on device|Disk quota exceeded", re.IGNORECASE)


def find_limit(error: BaseException) -> MvitExportError | None:
    """The limit that `error`, or one that it came from, ran into, with what to do; None if it is something else."""
    for each in chain(error):
        text = " ".join(text_of(each).split())[:200]
        if concerns_memory(each):
            reason = text or type(each).__name__
            return MvitExportError(f"not enough memory ({reason}); free some, or lift the limit (ulimit -v)")
        if getattr(each, "errno", None) in NO_SPACE or OUT_OF_SPACE.search(text):
            return MvitExportError(f"not enough space on the disk ({text}); free some, or write elsewhere")
    return None


def concerns_memory(error: BaseException) -> bool:
    """By its type, number or words. Where memory has a limit, Python also loses the error itself: a SystemError."""
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return bool(OUT_OF_MEMORY.search(text_of(error))) or (isinstance(error, SystemError) and memory_is_limited())


def memory_is_limited() -> bool:
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return False
    except ImportError:  # a shared library that finds no room
        return True
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and those that it came from, the outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
