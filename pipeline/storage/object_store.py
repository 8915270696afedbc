"""A prefix of an object store, through fsspec."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import tenacity
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs

from pipeline.storage.base import Names, Storage, is_unauthorised
from schemas.errors import OutputError, OutputFull, OutputNotWritable, printable

MAX_PUT_BYTES = 5 << 30
"""The most that one PUT of S3 and its relatives takes."""

# The stores whose fsspec class hands `mode="create"` to the server, which decides; others look, then write.
_CREATE_ONLY_PROTOCOLS = {"s3", "s3a", "gs", "gcs"}


class ObjectStore(Storage):
    """Objects are written by one PUT each, with a condition where the store takes one; requests are repeated."""

    def __init__(
        self,
        url: str,
        filesystem: AbstractFileSystem,
        root: str,
        options: Mapping[str, Any],
        *,
        attempts: int,
        first_wait: float,
    ) -> None:
        super().__init__(url, root, options)
        self._filesystem = filesystem
        self._process = os.getpid()
        self._attempts = attempts
        self._first_wait = first_wait
        protocols = {filesystem.protocol} if isinstance(filesystem.protocol, str) else set(filesystem.protocol)
        self._is_s3 = "s3" in protocols
        self._may_fence = bool(_CREATE_ONLY_PROTOCOLS & protocols)
        self._fenced: bool | None = None

    @property
    def _fs(self) -> AbstractFileSystem:
        # Connections do not survive a fork, as of the workers of a DataLoader: there each process makes its own.
        if self._process != os.getpid():
            self._filesystem, _ = url_to_fs(self._given_url, **self._options)
            self._process = os.getpid()
        return self._filesystem

    @property
    def fenced(self) -> bool:
        # Asked once with a probe, because some stores take the condition and ignore it.
        if self._fenced is None:
            self._fenced = self._may_fence and self._probe_create_only()
        return self._fenced

    def read_bytes(self, name: str) -> bytes:
        return bytes(self._request("read", name, lambda: self._fs.cat_file(self._path(name))))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        path = self._path(name)
        return bytes(self._request("read", name, lambda: self._fs.cat_file(path, start=start, end=start + length)))

    def exists(self, name: str) -> bool:
        return self._info(name) is not None

    def size(self, name: str) -> int:
        return int(self._existing_info(name)["size"])

    def modified(self, name: str) -> float:
        self._existing_info(name)
        return float(self._request("look for", name, lambda: self._fs.modified(self._path(name))).timestamp())

    def _files(self, folder: str, recursive: bool) -> Names:
        return [name for name in self._listed(folder, recursive) if not name.endswith("/")]

    def _entries(self) -> Names:
        return self._listed("", recursive=False)

    def publish(self, name: str, data: bytes, *, on_step: Callable[[str], None] | None = None) -> None:
        self._check_put_size(name, data)
        if on_step:
            on_step("after_temp")
        self._request("write", name, lambda: self._put(name, data))

    def create_only(self, name: str, data: bytes, *, on_temporary: Callable[[], None] | None = None) -> bool:
        self._check_put_size(name, data)
        if on_temporary:
            on_temporary()
        if not self.fenced:
            if self.exists(name):
                return False
            self._request("write", name, lambda: self._put(name, data))
            return self._holds(name, data)
        try:
            self._request("write", name, lambda: self._put(name, data, mode="create"))
        except FileExistsError:
            # A PUT that timed out may have succeeded, and its repetition (s3fs repeats too) then says "exists".
            return self._holds(name, data)
        return True

    def read_with_token(self, name: str) -> tuple[bytes, str, float] | None:
        try:
            # Content and tag come from two requests; they belong together when the tag is the same on both sides.
            for _ in range(10):
                token, modified = self._token(name), self.modified(name)
                data = self.read_bytes(name)
                if self._token(name) == token:
                    return data, token, modified
        except FileNotFoundError:
            return None
        raise OutputError(f"{self.printable(name)}: it changes faster than it can be read. Who else is writing there?")

    def write_if_token(self, name: str, data: bytes, token: str) -> bool:
        self._check_put_size(name, data)
        try:
            self._request("write", name, lambda: self._put_if_match(name, data, token))
        except (FileNotFoundError, FileExistsError):
            # The reply to a PUT that succeeded may have been lost: then the refusal is our own doing.
            return self._holds(name, data)
        return True

    def delete(self, name: str) -> bool:
        if not self.exists(name):
            return False
        try:
            self._request("delete", name, lambda: self._fs.rm_file(self._path(name)))
        except FileNotFoundError:
            return False
        return True

    def _check_put_size(self, name: str, data: bytes) -> None:
        if len(data) > MAX_PUT_BYTES:
            raise OutputError(
                f"{self.printable(name)}: {len(data):,} bytes do not fit one PUT of at most {MAX_PUT_BYTES:,}. "
                "Use smaller shards, or write to a local disk and copy."
            )

    def _put(self, name: str, data: bytes, **conditions: Any) -> None:
        # s3fs splits uploads from twice this size on; a single PUT leaves no orphaned parts behind when we are killed.
        single = {"chunksize": MAX_PUT_BYTES} if self._is_s3 else {}
        self._fs.pipe_file(self._path(name), data, **single, **conditions)

    def _put_if_match(self, name: str, data: bytes, token: str) -> None:
        if not self._is_s3:
            if self._token(name) != token:
                raise FileExistsError(name)
            self._put(name, data)
            return
        bucket, key, _ = self._fs.split_path(self._path(name))
        try:
            self._fs.call_s3("put_object", Bucket=bucket, Key=key, Body=data, IfMatch=token)
        except OSError as error:
            if _is_failed_condition(error):
                raise FileExistsError(name) from error
            raise

    def _probe_create_only(self) -> bool:
        name = f".probe-{secrets.token_hex(8)}"
        try:
            self._request("write", name, lambda: self._put(name, b"first", mode="create"))
            try:
                self._request("write", name, lambda: self._put(name, b"second", mode="create"))
            except FileExistsError:
                return True
            return False
        except (OutputNotWritable, OutputFull):
            raise
        except (OutputError, FileExistsError):
            return False
        finally:
            with contextlib.suppress(OutputError):
                self.delete(name)

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self.read_bytes(name) == data
        except FileNotFoundError:
            return False

    def _token(self, name: str) -> str:
        info = self._existing_info(name)
        for field in ("ETag", "etag", "generation", "md5Hash"):
            if info.get(field):
                return str(info[field])
        return hashlib.sha256(self.read_bytes(name)).hexdigest()

    def _info(self, name: str) -> dict[str, Any] | None:
        try:
            info: dict[str, Any] = self._request("look for", name, lambda: self._fs.info(self._path(name)))
        except FileNotFoundError:
            return None
        return info if info.get("type") != "directory" else None

    def _existing_info(self, name: str) -> dict[str, Any]:
        info = self._info(name)
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", self.printable(name))
        return info

    def _listed(self, folder: str, recursive: bool) -> Names:
        """Names in `folder`, relative to it; those of folders end in a slash."""
        path = self._path(folder)
        prefix = str(self._fs._strip_protocol(path)).rstrip("/") + "/"

        def names() -> Names:
            self._fs.invalidate_cache()
            entries = self._fs.find(path, detail=True).values() if recursive else self._fs.ls(path, detail=True)
            # An object whose name ends in a slash is a folder that somebody made with a console.
            names = [
                entry["name"].rstrip("/") + ("/" if entry["type"] == "directory" or entry["name"].endswith("/") else "")
                for entry in entries
                if entry["type"] in ("file", "directory")
            ]
            # Where nothing below it is listed, the folder itself is.
            return [name[len(prefix) :] for name in names if name.startswith(prefix) and name != prefix]

        try:
            return list(self._request("list", folder, names))
        except FileNotFoundError:
            return []

    def _request(self, verb: str, name: str, request: Callable[[], Any]) -> Any:
        """Call `request`, which may be repeated safely, until it succeeds, is refused, or has failed too often."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=tenacity.wait_random_exponential(multiplier=self._first_wait, max=20),
            reraise=True,
        )
        with self._naming_errors(verb, name):
            return retrying(request)

    def _is_answer(self, error: OSError) -> bool:
        # A store says "exists" to a condition, and "not found" when the bucket is missing.
        return isinstance(error, FileExistsError) or "bucket" not in str(error).lower()


def _may_pass(error: BaseException) -> bool:
    lasting = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, TypeError, ValueError)
    return isinstance(error, Exception) and not isinstance(error, lasting) and not is_unauthorised(error)


def _is_failed_condition(error: OSError) -> bool:
    return isinstance(error, FileExistsError) or (
        error.errno == errno.EINVAL and "condition" in printable(str(error)).lower()
    )
