"""What shows how far work is: on terminals, in files, and where nobody looks any more."""

from __future__ import annotations

import io

import pytest

from jobs.display import JobDisplay
from jobs.screen import Screen
from jobs.share_bar import ShareBar
from jobs.train import TrainDisplay
from schemas.lease import Progress
from tokenizer.train_log import TrainReport


class Terminal(io.StringIO):
    """Takes what is written, and is closed from its write number `closed_at` on."""

    def __init__(self, *, closed_at: float = float("inf"), is_terminal: bool = True) -> None:
        super().__init__()
        self.writes, self.closed_at, self.is_terminal = 0, closed_at, is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def write(self, text: str) -> int:
        self.writes += 1
        if self.writes > self.closed_at:
            raise BrokenPipeError
        return super().write(text)


@pytest.fixture(autouse=True)
def a_known_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def test_lines_come_every_ten_seconds_and_with_each_event():
    now = [0.0]
    stream = io.StringIO()
    with Screen(stream, clock=lambda: now[0]) as screen:
        for second in range(21):
            now[0] = float(second)
            if second == 5:
                screen.tell("an event")
            screen.draw(second / 20, [f"second {second}", "and more"])
        screen.draw(1.0, ["the end"], last=True)
    lines = [line.partition(" ")[2] for line in stream.getvalue().splitlines()]
    assert lines == [
        "second 0; and more", "an event", "second 10; and more", "second 20; and more", "the end",
    ]  # fmt: skip


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_terminal_gets_a_bar_and_events_as_they_are_and_a_dumb_one_lines(monkeypatch, term):
    monkeypatch.setenv("TERM", term)
    terminal = Terminal()
    with Screen(terminal) as screen:
        screen.tell("shard 3: [odd] text")
        screen.draw(0.3, ["30 of 100", "3 failed"], alarming="3 failed")
    said = terminal.getvalue()
    assert "shard 3: [odd] text" in said and "30 of 100" in said and "3 failed" in said
    assert ("\u2501" in said) is ("\x1b[" in said) is (term == "xterm")


@pytest.mark.parametrize("is_terminal", [True, False])
@pytest.mark.parametrize("closed_at", range(12))
def test_work_goes_on_when_the_watcher_goes(is_terminal, closed_at):
    def shown(screen, number):
        if isinstance(screen, JobDisplay):
            screen.observe(Progress(shards=9, committed=number), "an event")
        elif isinstance(screen, TrainDisplay):
            screen.observe(TrainReport(number, 9, {"loss": 1.0}, line="an event"))
        else:
            screen.tell("an event")
            screen.show(number / 9, "work")

    for kind in (JobDisplay, TrainDisplay, ShareBar):
        stream = Terminal(closed_at=closed_at, is_terminal=is_terminal)
        with kind(stream) as screen:
            for number in range(9):
                shown(screen, number)
        assert is_terminal or stream.writes <= closed_at + 1, "one failure is enough to know"


def test_nothing_is_shown_where_it_is_silent():
    terminal = Terminal()
    with Screen(terminal, silent=True) as screen:
        screen.tell("an event")
        screen.draw(1.0, ["the end"], last=True)
    assert not terminal.getvalue()


def test_a_bar_tells_the_time_left_now_and_then():
    now = [0.0]
    stream = io.StringIO()
    with ShareBar(stream, clock=lambda: now[0]) as bar:
        for number in range(10):
            now[0] = 4.0 * number
            bar.show(number / 10, f"{number} images")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3 and "30%: 3 images, 28 s left" in lines[0]
