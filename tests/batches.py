"""All that a loader's batches hold, for comparison: of one rank, or of all ranks put together again."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch

Content = dict[str, Any]


def content(batch: Mapping[str, Any]) -> Content:
    """A batch with nested lists, dtypes and shapes in the place of tensors."""
    return {
        name: (values.tolist(), values.dtype, tuple(values.shape)) if isinstance(values, torch.Tensor) else values
        for name, values in batch.items()
    }


def global_batches(shares: Sequence[Sequence[Content]]) -> list[list[Content]]:
    """The rows of each global batch in its order, from the batches of all ranks (`content` of them).

    A row has everything of the batch that is its own: no padding to the longest of a rank's share, and of `cu_seqlens`
    the bounds within the row.  With the first row comes the state, which must be the same on all ranks."""
    whole = []
    for parts in zip(*shares, strict=True):
        rows = [_rows(part) for part in parts]
        total = sum(map(len, rows))
        joined = [rows[place % len(rows)][place // len(rows)] for place in range(total)]
        assert all(part["state"] == parts[0]["state"] for part in parts)
        joined[0]["state"] = parts[0]["state"]
        whole.append(joined)
    return whole


def _rows(batch: Content) -> list[Content]:
    shared = {"state", "cu_seqlens", "max_seqlen"}
    lists = {name: values[0] if isinstance(values, tuple) else values for name, values in batch.items()}
    types = {name: values[1] for name, values in batch.items() if isinstance(values, tuple)}
    count = len(lists["ids" if "ids" in lists else "sample"])
    rows = [{name: values[row] for name, values in lists.items() if name not in shared} for row in range(count)]
    for number, row in enumerate(rows):
        if "lengths" in row:
            row |= {name: row[name][: row["lengths"]] for name in ("ids", "loss_mask")}
        if "cu_seqlens" in lists:
            first, last = number * len(row["ids"]), (number + 1) * len(row["ids"])
            row["cu_seqlens"] = [bound - first for bound in lists["cu_seqlens"] if first <= bound <= last]
        row["types"] = types
    if "cu_seqlens" in lists:
        bounds = lists["cu_seqlens"]
        assert lists["max_seqlen"] == max(b - a for a, b in itertools.pairwise(bounds))
    return rows
