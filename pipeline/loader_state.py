"""Where a loader is, and what must be the same when it goes on: the state that a checkpoint keeps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from schemas.errors import SpecError

STATE_VERSION = 1
MAX_STATE_BYTES = 1000
_POSITION_BYTES = 60
"""For version, epoch and step."""
_SHOWN = 5
"""Differences that a refusal names."""


@dataclass(frozen=True, slots=True)
class Position:
    """What a loader has delivered: all batches of earlier epochs, and `step` of this one."""

    epoch: int = 0
    step: int = 0
    lanes: dict[str, Any] | None = field(default=None)
    """How far each lane has been packed, as `pipeline.packing.write_cursors` writes it; None without packing."""

    def to_json_dict(self) -> dict[str, Any]:
        place: dict[str, Any] = {"epoch": self.epoch, "step": self.step}
        return place if self.lanes is None else place | {"packing": self.lanes}


def read_position(state: Mapping[str, Any], settings: Mapping[str, Any]) -> Position:
    """The position of a state that was written under `settings`.

    Raises SpecError naming every setting that differs, and for what is no state of a loader."""
    if not isinstance(state, Mapping) or "version" not in state:
        raise SpecError("this is no state of a TokenLoader; give what state_dict() returned.")
    if state["version"] != STATE_VERSION:
        raise SpecError(
            f"the state has version {state['version']}, and this bsqtok reads {STATE_VERSION}. Use the bsqtok that "
            f"wrote it."
        )
    differences = list(_differences(settings, state))
    if differences:
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise SpecError(
            f"the state belongs to another order of samples: {'; '.join(differences[:_SHOWN])}{more}. Restore these, "
            f"or begin anew without the state."
        )
    epoch, step, lanes = state.get("epoch"), state.get("step"), state.get("packing")
    if not (isinstance(epoch, int) and isinstance(step, int) and epoch >= 0 and step >= 0):
        raise SpecError(f"the state is damaged: epoch {epoch!r}, step {step!r}. Load that of another checkpoint.")
    return Position(epoch, step, lanes)


def shorten(settings: Mapping[str, Any], packing_bytes: int = 0) -> Mapping[str, Any]:
    """`settings`, the longest replaced by their hash so that a state stays under 1 kB, `packing_bytes` of it taken."""
    from hashlib import sha256

    room = MAX_STATE_BYTES - _POSITION_BYTES - packing_bytes
    sizes = {name: len(json.dumps(value)) for name, value in settings.items()}
    short = dict(settings)
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sum(len(json.dumps(value)) + len(each) + 6 for each, value in short.items()) < room:
            break
        short[name] = sha256(json.dumps(settings[name], sort_keys=True).encode()).hexdigest()[:16]
    return short


def _differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name, mine in ours.items():
        other = theirs.get(name)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            found += _differences(mine, other, f"{prefix}{name}.")
        elif mine != other:
            found.append(f"{prefix}{name} is {other!r} in the state and {mine!r} here")
    found += [f"{prefix}{name} is {theirs[name]!r} in the state" for name in theirs if prefix and name not in ours]
    return found
