"""What computed the tokens (device, type of numbers, versions): in words, and held to one kind where that is asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from schemas.errors import ArithmeticDiffers


def describe_arithmetic(value: Mapping[str, Any]) -> str:
    """Return what an arithmetic of the ledger is, in a few words."""
    words = [str(value[name]) for name in ("device", "dtype") if name in value]
    words += [f"{name} {value[name]}" for name in ("torch", "cuda") if value.get(name)]
    if value.get("batches"):
        words.append("batches of " + ", ".join(f"{rows} x {frames}" for rows, frames in value["batches"]))
    return ", ".join(words) or "not recorded"


class OneArithmetic:
    """Holds every shard to the arithmetic of the first; `known` is that of shards that are committed, by id."""

    def __init__(self, known: Mapping[str, Mapping[str, Any]]) -> None:
        self._known = dict(known)

    def check(self, identifier: str, value: Mapping[str, Any], *, worker: str, dataset: str) -> None:
        """Raises ArithmeticDiffers when a worker computes in another arithmetic than the dataset's."""
        if not self._known:
            self._known[identifier] = value
        if identifier not in self._known:
            there = "; or ".join(map(describe_arithmetic, self._known.values()))
            raise ArithmeticDiffers(
                f"{dataset}: worker {worker} computes in another arithmetic ({describe_arithmetic(value)}) than made "
                f"the tokens that are there ({there}). Go on where that is the same, or repeat the `bsq tokenize` "
                "command with --no-strict-arithmetic."
            )
