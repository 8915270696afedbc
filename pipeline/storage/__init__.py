"""The folder of one output, on a local disk or in an object store: atomic, create-only, compare-and-swap."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipeline.credentials import printable_error, printable_url
from pipeline.storage.base import Storage
from pipeline.storage.local_folder import LocalFolder
from pipeline.storage.object_store import ObjectStore
from schemas.errors import SpecError

__all__ = ["Storage", "open_storage"]


def open_storage(
    url: str, storage_options: Mapping[str, Any] | None = None, *, attempts: int = 5, first_wait: float = 0.2
) -> Storage:
    """Return the folder `url`, of a local disk or of any store that fsspec knows.

    `attempts` and `first_wait` (seconds, doubled each time) bound the repeats of a failing remote request.

    Raises SpecError when no storage is known under this URL."""
    # What another process wrote must be seen at once, so nothing is taken from a cached listing.
    options = {**({} if "::" in url else {"use_listings_cache": False}), **(storage_options or {})}
    try:
        filesystem, root = url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        reason = printable_error(error, options).rstrip(".")
        remedy = " Give a path, or a URL such as s3:// or gs://." if "not known" in reason else ""
        raise SpecError(f"{printable_url(url)}: {reason}.{remedy}") from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalFolder(url, root)
    return ObjectStore(url, filesystem, root, options, attempts=attempts, first_wait=first_wait)
