"""Settings of glibc's allocator for processes that decode.  Nothing happens where it is another's."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
KEPT_BYTES = 256 << 20
"""What the top of a heap may hold before it is given back."""
MAPPED_BYTES = 32 << 20
"""Blocks from this size on, such as the frames of a large video, still go back at once."""
STEP_BYTES = 4 << 20


_TUNABLES = "GLIBC_TUNABLES"
_HUGE_PAGES = "glibc.malloc.hugetlb"


@contextlib.contextmanager
def huge_pages_in_children() -> Iterator[None]:
    """Let processes that are started meanwhile ask the kernel for huge pages behind what they allocate.

    A picture passes through megabytes that are touched once; with small pages the address of each is looked up first,
    which inside a virtual machine costs some hundredths of the decoding.  glibc reads this setting only at the start
    of a process; what the user set for it stays."""
    before = os.environ.get(_TUNABLES)
    if before is not None and _HUGE_PAGES in before:
        yield
        return
    os.environ[_TUNABLES] = ":".join([*([before] if before else []), f"{_HUGE_PAGES}=1"])
    try:
        yield
    finally:
        if before is None:
            del os.environ[_TUNABLES]
        else:
            os.environ[_TUNABLES] = before


def keep_freed_memory() -> bool:
    """Keep memory that is freed in this process, to be used again; False where nothing could be set.

    Every picture takes and frees about a megabyte.  glibc gives the top of a thread's heap back to the system from
    128 kB on, and the next picture faults it in again page by page, cleared: some hundredths of its decoding."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Naming one of the first two stops glibc from adapting the other, so both are named.
    settings = ((_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_MMAP_THRESHOLD, MAPPED_BYTES), (_M_TOP_PAD, STEP_BYTES))
    results = [mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings]
    return results == [1, 1, 1]
