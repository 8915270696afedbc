"""The named points of the commit protocol, at which a test can hold a process to kill it there.

`BSQTOK_HOLD_AT=STEP:FOLDER` makes every process that reaches STEP write FOLDER/STEP.PID and wait there until that
file is deleted.  Without the variable a step costs one comparison."""

from __future__ import annotations

import os
import time
from pathlib import Path

STEPS = (
    "before_failures",
    "before_tokens",
    "after_temp",
    "after_publish",
    "before_ledger",
    "after_ledger",
    "before_manifest",
    "after_manifest",
)

_HOLD_AT, _, _FOLDER = os.environ.get("BSQTOK_HOLD_AT", "").partition(":")


def reached(step: str) -> None:
    """Tell that the calling process stands at `step`."""
    if step != _HOLD_AT:
        return
    marker = Path(_FOLDER) / f"{step}.{os.getpid()}"
    marker.touch()
    while marker.exists():
        time.sleep(0.01)
