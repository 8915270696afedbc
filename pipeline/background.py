"""Runs an iterator ahead in a thread, for a bounded number of items."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Generator
from typing import TypeVar

from pipeline.queues import ByteQueue, Stopped

Item = TypeVar("Item")

_JOIN_SECONDS = 10.0


class _End:
    """The iterator is exhausted, or has failed."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def run_ahead(items: Generator[Item, None, None], depth: int) -> Generator[Item, None, None]:
    """The same items in the same order, of which up to `depth` wait ready.

    What the iterator raises is raised here, after the items before it.  Closing this ends the thread."""
    stop = threading.Event()
    ready: ByteQueue[Item | _End] = ByteQueue(depth, stop)

    def work() -> None:
        error: BaseException | None = None
        with contextlib.suppress(Stopped):
            try:
                for item in items:
                    ready.put(item, 1)
            except Stopped:
                raise
            except BaseException as caught:  # noqa: BLE001  it belongs to whoever waits
                error = caught
            finally:
                items.close()
            ready.put(_End(error), 0)

    # A daemon: an interpreter that ends while storage hangs must not wait for it.
    thread = threading.Thread(target=work, name="token-loader", daemon=True)
    thread.start()
    try:
        while True:
            item = ready.get()
            if isinstance(item, _End):
                if item.error is not None:
                    raise item.error
                return
            yield item
    finally:
        stop.set()
        thread.join(_JOIN_SECONDS)
