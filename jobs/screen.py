"""Where work shows how far it is: a bar drawn again in place on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

LINE_EVERY_SECONDS = 10.0
BAR_WIDTH = 30


class Screen:
    """Shows on stderr unless told otherwise; use as a context manager.

    Whoever watches may go (`2>&1 | head`, a terminal that is closed): the work goes on unseen."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        silent: bool = False,
        first_line_after: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`first_line_after`: seconds until the first line where there is no terminal."""
        self._stream = stream or sys.stderr
        self._silent = silent
        self._clock = clock
        self._next_line = clock() + first_line_after
        self._live: Any = None
        if not silent and self._stream.isatty() and os.environ.get("TERM") != "dumb":
            from rich.live import Live

            # Drawn by `draw` alone: no thread.  Standard output is left alone, it carries results.
            self._live = Live(
                "starting ...",
                console=_console(self._stream),
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
            )

    def tell(self, line: str) -> None:
        """Show something that happened."""
        stamped = f"{time.strftime('%H:%M:%S')} {line}"
        if self._live is not None:
            self._unless_gone(lambda: self._live.console.print(stamped, markup=False))
        elif not self._silent:
            self._unless_gone(lambda: self._write(stamped))

    def draw(self, share: float, sentences: Sequence[str], *, alarming: str = "", last: bool = False) -> None:
        """Show that `share` of the work, 0 to 1, is done, and what `sentences` say of it.

        The sentence that is `alarming` is red on a terminal; the `last` line of the work is never left out."""
        if self._live is not None:
            self._unless_gone(lambda: self._live.update(_drawn(share, sentences, alarming), refresh=True))
        elif last or self._clock() >= self._next_line:
            self._next_line = self._clock() + LINE_EVERY_SECONDS
            self.tell("; ".join(sentences))

    def _write(self, line: str) -> None:
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def _unless_gone(self, write: Callable[[], object]) -> None:
        try:
            write()
        except (OSError, ValueError):
            self._live, self._silent = None, True

    def __enter__(self) -> Self:
        if self._live is not None:
            self._unless_gone(lambda: self._live.start(refresh=True))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._unless_gone(lambda: self._live.stop())


def _console(stream: TextIO) -> Console:
    from rich.console import Console

    class Unwatched(Console):
        """Rich would end the process when a pipe is closed."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Unwatched(file=stream, highlight=False)


def _drawn(share: float, sentences: Sequence[str], alarming: str) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    first, *others = [
        Text(sentence, style="red" if sentence == alarming else "", no_wrap=True, overflow="ellipsis")
        for sentence in sentences
    ]
    top = Table.grid(padding=(0, 2))
    top.add_row(ProgressBar(total=1.0, completed=share, width=BAR_WIDTH), first)
    return Group(top, *others)
