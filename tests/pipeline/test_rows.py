from __future__ import annotations

import itertools
import random
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.rows import Row, ShardRows, rows_to_table
from pipeline.sample import Member, Sample
from pipeline.sidecars import Sidecars
from schemas.errors import (
    CaptionNotText,
    KeyDuplicated,
    LabelNotInteger,
    MediaCorrupt,
    NonFiniteLatents,
    SampleError,
    TarTruncated,
)


def new_shard() -> ShardRows:
    return ShardRows(shard=3, attempt=1, url="")


def sample(position: int) -> Sample:
    media = Member(f"{position:03d}.jpg", "file", 10, 512 * position, b"")
    return Sample(position, f"{position:03d}", {"jpg": media}, media)


def row(shard: ShardRows, position: int, clip: int = 0, view: int = 0, **changes: Any) -> Row:
    values: dict[str, Any] = {
        "shard": shard,
        "key": f"{position:03d}",
        "position": position,
        "source_offset": 512 * position,
        "sidecars": Sidecars(caption="a", label=1, metadata="{}", warnings=[]),
        "clip": clip,
        "view": view,
        "num_frames": 1,
        "width": 20,
        "height": 10,
        "crop": (5, 0, 10, 10),
        "flipped": False,
        "start": None,
        "frame_times": None,
        "tokens": f"{position},{clip},{view}".encode(),
    }
    return Row(**(values | changes))


places = st.sets(st.tuples(st.integers(0, 20), st.integers(0, 3), st.integers(0, 2)), max_size=40)


@settings(max_examples=80, deadline=None)
@given(places=places, seed=st.integers())
def test_rows_come_out_in_source_order_whatever_order_they_were_finished_in(
    places: set[tuple[int, int, int]], seed: int
) -> None:
    shard = new_shard()
    finished = sorted(places)
    random.Random(seed).shuffle(finished)
    for place in finished:
        shard.add_rows([row(shard, *place)])
    assert [(item.position, item.clip, item.view) for item in shard.ordered_rows()] == sorted(places)


@settings(max_examples=80, deadline=None)
@given(bad=st.sets(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 2)), max_size=8), seed=st.integers())
def test_all_views_of_a_clip_are_kept_or_none(bad: set[tuple[int, int, int]], seed: int) -> None:
    shard = new_shard()
    all_places = list(itertools.product(range(5), range(3), range(3)))
    random.Random(seed).shuffle(all_places)
    for place in all_places:
        item = row(shard, *place)
        if place in bad:
            shard.fail_row(item, NonFiniteLatents("NaN or infinity came out of the encoder."))
        else:
            shard.add_rows([item])
    bad_clips = {(position, clip) for position, clip, _ in bad}
    kept = [(item.position, item.clip, item.view) for item in shard.ordered_rows()]
    assert kept == [place for place in sorted(all_places) if place[:2] not in bad_clips]
    failures = shard.ordered_failures()
    assert [(item.position, item.clip) for item in failures] == sorted(bad_clips), "one row for a clip, not for a view"
    assert {(item.stage, item.error) for item in failures} <= {("encode", "NonFiniteLatents")}


def events(shard: ShardRows) -> list[tuple[Any, ...]]:
    """Failures and warnings of some samples, and the end of the archive."""
    broken_off = MediaCorrupt("breaks off", clip=2)
    return [
        (shard.fail_sample, sample(4), KeyDuplicated("comes again")),
        (shard.fail_sample, sample(2), CaptionNotText("bytes", member="002.txt")),
        (shard.fail_sample, sample(2), LabelNotInteger("words", member="002.cls")),
        (shard.fail_sample, sample(2), CaptionNotText("bytes", member="002.caption")),
        (shard.fail_sample, sample(1), broken_off),
        (shard.fail_row, row(shard, 1, clip=0), NonFiniteLatents("NaN")),
        (shard.fail_row, row(shard, 1, clip=0, view=1), NonFiniteLatents("NaN")),
        (shard.fail_row, row(shard, 1, clip=1), NonFiniteLatents("NaN")),
        (shard.fail_archive, TarTruncated("ends early", offset=99_000)),
        (shard.fail_sample, sample(7), MediaCorrupt("damaged")),
    ]


@pytest.mark.parametrize("seed", range(20))
def test_failures_come_out_in_one_order_and_each_once(seed: int) -> None:
    shard = new_shard()
    happened = events(shard)
    random.Random(seed).shuffle(happened)
    for report, *arguments in happened:
        report(*arguments)
    found = [(item.position, item.clip, item.error, item.member) for item in shard.ordered_failures()]
    assert found == [
        (1, 0, "NonFiniteLatents", None),
        (1, 1, "NonFiniteLatents", None),
        (1, 2, "MediaCorrupt", "001.jpg"),
        (2, None, "CaptionNotText", "002.caption"),
        (2, None, "CaptionNotText", "002.txt"),
        (2, None, "LabelNotInteger", "002.cls"),
        (4, None, "KeyDuplicated", "004.jpg"),
        (7, None, "MediaCorrupt", "007.jpg"),
        (None, None, "TarTruncated", None),
    ]
    assert shard.partial


@settings(max_examples=50, deadline=None)
@given(places=places, seed=st.integers())
def test_the_table_of_a_shard_has_the_same_bytes_whatever_happened_first(
    places: set[tuple[int, int, int]], seed: int
) -> None:
    def table(order: list[tuple[int, int, int]]) -> Any:
        shard = new_shard()
        for place in order:
            shard.add_rows([row(shard, *place)])
        return rows_to_table(shard.ordered_rows(), ["caption", "label", "metadata"])

    shuffled = sorted(places)
    random.Random(seed).shuffle(shuffled)
    assert table(shuffled).equals(table(sorted(places)))


def test_only_columns_that_are_carried_are_there() -> None:
    shard = new_shard()
    shard.add_rows([row(shard, 0, start=0.5, frame_times=(0.0, 0.125), num_frames=2)])
    table = rows_to_table(shard.ordered_rows(), ["label"])
    assert "label" in table.column_names
    assert not {"caption", "metadata"} & set(table.column_names)
    assert table.to_pylist()[0] == {
        "key": "000",
        "clip": 0,
        "view": 0,
        "frames": 2,
        "tokens": b"0,0,0",
        "width": 20,
        "height": 10,
        "crop": [5, 0, 10, 10],
        "flipped": False,
        "start": 0.5,
        "frame_times": [0.0, 0.125],
        "position": 0,
        "source_offset": 0,
        "label": 1,
    }


def test_the_last_release_completes_a_shard_and_only_that() -> None:
    shard = new_shard()
    for _ in range(3):
        shard.hold()
    assert [shard.release() for _ in range(4)] == [False, False, False, True]


def test_an_error_object_may_serve_several_rows() -> None:
    shard = new_shard()
    error: SampleError = cast(SampleError, NonFiniteLatents("NaN"))
    for clip in (3, 1):
        shard.fail_row(row(shard, 0, clip=clip), error)
    assert [item.clip for item in shard.ordered_failures()] == [1, 3]
