"""Keep memory that is freed in the process, to be used again.

Every picture takes and frees about a megabyte.  glibc gives the top of a thread's heap back to the system from 128 kB
on, and the next picture faults it in again page by page, cleared: some hundredths of its decoding."""

from __future__ import annotations

import ctypes

# From <malloc.h>.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
KEPT_BYTES = 256 << 20
"""What the top of a heap may hold before it is given back."""
MAPPED_BYTES = 32 << 20
"""Blocks from this size on, such as the frames of a large video, still go back at once."""
STEP_BYTES = 4 << 20


def keep_freed_memory() -> bool:
    """Tell the allocator of this process; False where it is not glibc's, and nothing was changed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # Naming one of the first two stops glibc from adapting the other, so both are named.
    settings = ((_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_MMAP_THRESHOLD, MAPPED_BYTES), (_M_TOP_PAD, STEP_BYTES))
    results = [mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings]
    return results == [1, 1, 1]
