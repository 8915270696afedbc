"""Shows work whose share done is known, with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from jobs.display import describe_seconds
from jobs.screen import LINE_EVERY_SECONDS, Screen

LEAST_SHARE = 0.01
"""Until then the time left would be a guess."""


class ShareBar(Screen):
    """A bar; without a terminal, work of less than ten seconds shows nothing."""

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, first_line_after=LINE_EVERY_SECONDS, clock=clock)
        self._begun = clock()

    def show(self, share: float, words: str) -> None:
        """Show that `share`, 0 to 1, is done."""
        line = f"{share:.0%}: {words}"
        if LEAST_SHARE <= share < 1:
            line += f", {describe_seconds((self._clock() - self._begun) * (1 - share) / share)} left"
        self.draw(share, [line])
