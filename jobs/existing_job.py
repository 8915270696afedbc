"""The dataset that a command was pointed at, or one line that says what else may be meant."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from pipeline.credentials import printable_url
from pipeline.dataset_files import JOB_NAME, read_job
from pipeline.storage import Storage
from schemas.errors import SpecError
from schemas.job import Job

SEARCHED_FOLDERS = 50
"""Folders below the one named in which a dataset is looked for."""


def existing_job(storage: Storage) -> Job:
    """The identity of the dataset in `storage`.

    Raises SpecError when there is none, naming one right below or above; BsqError when job.json is damaged."""
    if storage.is_local and Path(storage.url_of("").removeprefix("file://").rstrip("/")).is_file():
        raise SpecError(
            f"{storage.url}: this is a file. Name a dataset's folder; `bsq inspect` describes single files."
        )
    job = read_job(storage)
    if job is not None:
        return job
    near = _dataset_near(storage)
    remedy = f"Did you mean {near!r}?" if near else "Name the folder given as --out."
    raise SpecError(f"{storage.url}: there is no dataset here (no {JOB_NAME}). {remedy}")


def _dataset_near(storage: Storage) -> str | None:
    folders = (name for name in storage.entries() if name.endswith("/"))
    for folder in islice(folders, SEARCHED_FOLDERS):
        if storage.exists(folder + JOB_NAME):
            return storage.printable(folder).rstrip("/")
    parent = storage.url_of("").rstrip("/").rpartition("/")[0]
    if storage.is_local and parent and Path(parent.removeprefix("file://"), JOB_NAME).is_file():
        return printable_url(parent)
    return None
