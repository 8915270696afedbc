"""The frames that went into the encoder, read again from the sources, or one line on why they cannot be."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.byte_stream import RetryPolicy
from pipeline.credentials import HIDDEN
from pipeline.decode import Decoder
from pipeline.find_rows import FoundRow
from pipeline.read_sample import SamplePlace, read_samples
from pipeline.sample import ClipView
from schemas.errors import InputError, ShardForbidden, SourceChanged
from schemas.job import Job

Frames = npt.NDArray[np.uint8]
"""[T, H, W, 3]"""


def read_originals(
    rows: Sequence[FoundRow],
    job: Job,
    storage_options: Mapping[str, Any] | None = None,
    *,
    stop: threading.Event | None = None,
    retry: RetryPolicy | None = None,
    max_stream_bytes: int | None = None,
) -> Iterator[tuple[int, Frames | InputError]]:
    """Yield, by number in `rows`, the frames of each row as the job preprocessed them, or what is in the way.

    Shard by shard; each sample is decoded once, whatever rows it has.  `max_stream_bytes` bounds how far into a shard
    is read that has to be read from its beginning.  Raises Stopped once `stop` is set."""
    decoder = Decoder(job.spec.preprocess, job.spec.clips, job.spec.limits)
    of_url: dict[str, dict[tuple[int, str], list[int]]] = {}
    for number, row in enumerate(rows):
        sample = row.values["position"], row.values["key"]
        of_url.setdefault(row.source.url, {}).setdefault(sample, []).append(number)
    for url, of_sample in of_url.items():
        numbers = {numbers[0]: numbers for numbers in of_sample.values()}
        if HIDDEN in url:
            reason = f"{url}: its credentials are not stored, so it cannot be read again."
            yield from ((number, ShardForbidden(reason)) for same in numbers.values() for number in same)
            continue
        places = {first: _place(rows[first]) for first in numbers}
        read = read_samples(
            url,
            places,
            job.spec.limits,
            storage_options,
            stop=stop,
            retry=retry,
            max_stream_bytes=max_stream_bytes,
        )
        for first, media in read:
            if isinstance(media, InputError):
                yield from ((number, media) for number in numbers[first])
                continue
            left = list(numbers[first])
            key = places[first].key
            try:
                for view in decoder.views(key, media):
                    for number in [number for number in left if _is_row_of(view, rows[number])]:
                        left.remove(number)
                        yield number, view.frames_TCHW.permute(0, 2, 3, 1).contiguous().numpy()
                    if not left:
                        break
            except InputError as error:
                yield from ((number, error) for number in left)
                continue
            for number in left:
                clip = rows[number].values["clip"]
                yield number, SourceChanged(f"{url}: {key!r} has no clip {clip} any more.")


def _is_row_of(view: ClipView, row: FoundRow) -> bool:
    return (view.clip, view.view) == (row.values["clip"], row.values["view"])


def _place(row: FoundRow) -> SamplePlace:
    return SamplePlace(row.values["key"], row.values["position"], row.values["source_offset"])
