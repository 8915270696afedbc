"""Plans by number, and what is said of a generation."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.dataset_files import generation_name, plan_name, serialise_plan
from pipeline.generations import Plan, list_begun, read_plans
from pipeline.storage import open_storage
from schemas.jobspec import merge_specs, parse_spec, selection_differences

PLANS = st.lists(st.dictionaries(st.integers(0, 50), st.text("ab*", min_size=1), max_size=8), max_size=4)


@settings(deadline=None)
@given(PLANS)
def test_of_several_plans_the_last_that_names_a_shard_says_its_url(plans: list[dict[int, str]]) -> None:
    tables = [
        pa.table({"shard": pa.array(plan, pa.int64()), "url": pa.array(plan.values(), pa.string())}) for plan in plans
    ]
    expected: dict[int, str] = {}
    for plan in plans:
        expected |= plan
    merged = Plan(tables)
    assert merged.shards.tolist() == sorted(expected) and len(merged) == len(expected)
    assert merged.urls() == [expected[shard] for shard in sorted(expected)]
    for shard in range(51):
        assert (shard in merged) == (shard in expected)
        assert merged.url(shard) == expected.get(shard, "")
    assert merged.shards_with("*") == sorted(shard for shard, url in expected.items() if "*" in url)
    found = merged.find([*expected.values(), "elsewhere"])
    assert set(found) == set(expected.values())
    assert all(expected[shard] == url for url, shard in found.items())


def test_a_generation_is_begun_when_its_record_exists(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path))
    storage.publish(plan_name(0), serialise_plan(["a.tar"]))
    storage.publish(plan_name(1), serialise_plan(["b.tar"], [1]))
    assert list_begun(storage) == [0]
    storage.publish(generation_name(1), b"{}")
    assert list_begun(storage) == [0, 1]
    assert read_plans(storage, [0, 1]).urls() == ["a.tar", "b.tar"]


def test_only_settings_that_are_given_win_over_the_datasets_own() -> None:
    base = parse_spec({"limits": {"max_pixels": 100, "min_side": 9}, "clips": {"fps": 4}}, source="test")
    asked = parse_spec({"limits": {"max_pixels": 64_000_000}, "carry": ["label"]}, source="test")
    merged = merge_specs(base, asked)
    assert (merged.limits.max_pixels, merged.limits.min_side, merged.clips.fps) == (64_000_000, 9, 4)
    assert merged.carry == ("label",)
    assert merge_specs(base, parse_spec({}, source="test")) == base


@pytest.mark.parametrize("field", ["max_pixels", "decode_timeout_seconds"])
def test_limits_that_differ_are_named_with_both_values(field: str) -> None:
    before = parse_spec({"limits": {field: 70}, "clips": {"fps": 4}}, source="test")
    now = parse_spec({"limits": {field: 80}, "damaged_shards": "fail"}, source="test")
    assert selection_differences(before, now) == [(f"limits.{field}", 70, 80), ("damaged_shards", "keep", "fail")]
