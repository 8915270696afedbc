"""Shows work whose share done is known: a bar with the time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

from jobs.display import BAR_WIDTH, LINE_EVERY_SECONDS, describe_seconds

LEAST_SHARE = 0.01
"""Until then the time left would be a guess."""


class ShareBar:
    """Draws on stderr unless told otherwise; use as a context manager."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._begun = time.monotonic()
        self._last = self._begun
        self._live: Any = None
        if self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.console import Console
            from rich.live import Live

            console = Console(file=self._stream, highlight=False)
            self._live = Live(
                "starting ...", console=console, auto_refresh=False, transient=True, redirect_stdout=False
            )

    def show(self, share: float, words: str) -> None:
        """Show that `share`, 0 to 1, is done."""
        now = time.monotonic()
        if self._live is None and now - self._last < LINE_EVERY_SECONDS:
            return
        self._last = now
        left = (now - self._begun) * (1 - share) / share if share >= LEAST_SHARE else None
        words += f", {describe_seconds(left)} left" if left is not None and share < 1 else ""
        if self._live is None:
            self.tell(f"{share:.0%}: {words}")
            return
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=1.0, completed=share, width=BAR_WIDTH)
        table.add_row(bar, Text(words, no_wrap=True, overflow="ellipsis"))
        self._draw(table)

    def tell(self, line: str) -> None:
        """Show something that happened."""
        stamped = f"{time.strftime('%H:%M:%S')} {line}"
        try:
            if self._live is not None:
                self._live.console.print(stamped, markup=False)
            else:
                self._stream.write(f"{stamped}\n")
                self._stream.flush()
        except (OSError, ValueError):
            return  # nobody watches any more; the work goes on

    def _draw(self, what: object) -> None:
        try:
            self._live.update(what, refresh=True)
        except (OSError, ValueError):
            return

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
