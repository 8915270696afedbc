"""From an open shard to a published token file in one process; and back: published tokens for training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.dataset import TokenDataset
    from pipeline.loader import TokenLoader
    from pipeline.mixture import Mixture
    from pipeline.packing import Pack
    from pipeline.sequence import SequenceFormat

__all__ = ["Mixture", "Pack", "SequenceFormat", "TokenDataset", "TokenLoader"]

_HOMES = {
    "Mixture": "pipeline.mixture",
    "Pack": "pipeline.packing",
    "SequenceFormat": "pipeline.sequence",
    "TokenDataset": "pipeline.dataset",
    "TokenLoader": "pipeline.loader",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: a worker that tokenizes needs no loader, and a trainer that loads needs no decoder.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
