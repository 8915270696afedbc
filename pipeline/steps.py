"""The named points of the commit protocol, at which a test can hold a process to kill it there.

`BSQTOK_HOLD_AT=STEP+STEP:FOLDER` makes every process that reaches one of the steps write FOLDER/STEP.PID and wait there
until that file is deleted.  Without the variable a step costs one look into an empty set.

`BSQTOK_DECODE_FAULT=FAULT:KEY,...` makes the decoder of a sample do what a broken codec does, wherever it runs:
`abort` the process, `hang`, `freeze` (hang without letting any other thread of the process run), or be `slow`."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

BEGIN_STEPS = ("before_job", "before_plan")
WORKER_STEPS = ("before_failures", "before_tokens", "after_temp", "after_publish")
DRIVER_STEPS = ("before_ledger", "in_ledger", "after_ledger", "before_manifest", "after_manifest")
STEPS = BEGIN_STEPS + WORKER_STEPS + DRIVER_STEPS
"""Of a job's first generation; around the record of a later one are before_generation and after_generation."""

_FAULTS = dict(fault.split(":", 1)[::-1] for fault in os.environ.get("BSQTOK_DECODE_FAULT", "").split(",") if fault)
_HELD, _, _FOLDER = os.environ.get("BSQTOK_HOLD_AT", "").partition(":")
_HOLD_AT = frozenset(_HELD.split("+"))


def reached(step: str) -> None:
    """Tell that the calling process stands at `step`."""
    if step not in _HOLD_AT:
        return
    marker = Path(_FOLDER) / f"{step}.{os.getpid()}"
    marker.touch()
    while marker.exists():
        time.sleep(0.01)


def decoding(key: str) -> None:
    """Tell that the calling process is about to decode the sample `key`."""
    fault = _FAULTS.get(key) if _FAULTS else None
    if fault == "abort":
        os.abort()
    if fault == "slow":
        time.sleep(1.0)
    while fault == "hang":
        time.sleep(60.0)
    while fault == "freeze":
        # Called without giving up the lock of the interpreter.
        ctypes.PyDLL(None).pause()
