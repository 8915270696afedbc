"""Whoever names the wrong folder is told which one may be meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.existing_job import existing_job
from pipeline.storage import open_storage
from schemas.errors import BsqError, SpecError


def complaint(url: str, **options: object) -> str:
    with pytest.raises(SpecError) as caught:
        existing_job(open_storage(url, options))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{url}: ")


def test_a_dataset_is_found(write_dataset):
    dataset = write_dataset()
    assert existing_job(dataset.storage) == dataset.job


def test_a_dataset_right_above_or_below_is_named(write_dataset, tmp_path):
    url = write_dataset().url
    (tmp_path / "other").mkdir()
    expected = f"there is no dataset here (no job.json). Did you mean {url!r}?"
    assert complaint(str(tmp_path)) == expected
    assert complaint(f"{url}/tokens") == expected


def test_without_one_near_the_folder_is_asked_for(tmp_path):
    expected = "there is no dataset here (no job.json). Name the folder given as --out."
    assert complaint(str(tmp_path)) == expected
    assert complaint(str(tmp_path / "nothing" / "deep")) == expected


def test_a_file_is_no_folder(write_dataset):
    url = f"{write_dataset().url}/job.json"
    assert complaint(url) == "this is a file. Name a dataset's folder; `bsq inspect` describes single files."


def test_in_an_object_store_it_is_looked_for_below(write_dataset, object_store):
    write_dataset(url=f"{object_store.url}/corpus/tokens", storage_options=object_store.storage_options)
    said = complaint(f"{object_store.url}/corpus", **object_store.storage_options)
    assert said.endswith("Did you mean 's3://bucket/corpus/tokens'?")


def test_a_damaged_job_is_no_missing_one(tmp_path):
    Path(tmp_path, "job.json").write_text("{")
    with pytest.raises(BsqError, match=r"job\.json"):
        existing_job(open_storage(str(tmp_path)))
