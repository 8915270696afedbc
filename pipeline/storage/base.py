"""What every storage of an output promises, and what its refusals are called.

Nothing that a reader can see is ever half-written.  On a local disk bytes go to a temporary file beside their name and
are renamed (or linked, where the name must be new); in an object store they are one PUT.  `fsspec`'s
`with fs.open(name, "wb")` is not used: an exception inside it completes the upload of half a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pipeline.credentials import printable_error, printable_url
from schemas.errors import OutputError, OutputFull, OutputNotWritable, printable

TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{16}\.tmp")
"""Names of files that are not yet, or never were, published."""

Names = list[str]
"""Inside of the classes `list` is a method."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
                 errno.ELOOP, errno.ENOENT, errno.EINVAL}  # fmt: skip


class Storage(ABC):
    """The folder of one output; names are relative to it, with forward slashes.

    Every method raises OutputNotWritable, OutputFull or their parent OutputError when the storage refuses; a read of
    what is not there raises FileNotFoundError.
    """

    is_local = False

    def __init__(self, url: str, root: str, options: Mapping[str, Any]) -> None:
        self.url = printable_url(url)
        self._given_url = url
        self._root = root
        self._options = options

    @property
    @abstractmethod
    def fenced(self) -> bool:
        """Whether of two writers of one new name exactly one is told that it won."""

    def printable(self, name: str) -> str:
        """Return the URL of `name` for a message."""
        return f"{self.url.rstrip('/')}/{printable(name)}"

    def url_of(self, name: str) -> str:
        """Return the URL under which fsspec opens `name`; it may hold credentials, so it is not for messages."""
        first, chain, rest = self._given_url.partition("::")
        return f"{first.rstrip('/')}/{name}{chain}{rest}"

    def local_path(self, name: str) -> Path:
        """Return the path of `name` on a local disk."""
        raise AssertionError("an object store has no paths")

    @abstractmethod
    def read_bytes(self, name: str) -> bytes:
        """Return the content of `name`.  Raises FileNotFoundError."""

    @abstractmethod
    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes of `name` from byte `start`; fewer at its end.  Raises FileNotFoundError."""

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file `name`."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Bytes of `name`.  Raises FileNotFoundError."""

    @abstractmethod
    def modified(self, name: str) -> float:
        """Seconds since the epoch, by the storage's own clock, at which `name` was last written.

        Raises FileNotFoundError."""

    def list(self, folder: str = "", *, recursive: bool = False) -> Names:
        """Return the names of the files in `folder`, relative to `folder` and sorted; temporaries are left out.

        A folder that is not there is empty."""
        return sorted(name for name in self._files(folder, recursive) if not _is_temporary(name))

    def entries(self) -> Names:
        """Return what lies directly in the output, sorted; folders end in a slash, temporaries are left out."""
        return sorted(name for name in self._entries() if not _is_temporary(name))

    @abstractmethod
    def _files(self, folder: str, recursive: bool) -> Names: ...

    @abstractmethod
    def _entries(self) -> Names: ...

    @abstractmethod
    def publish(self, name: str, data: bytes, *, on_step: Callable[[str], None] | None = None) -> None:
        """Write `data` under `name` in one atomic step, replacing what is there.

        `on_step` is called with "after_temp" when the bytes are safe but nothing is visible under `name` yet."""

    @abstractmethod
    def create_only(self, name: str, data: bytes, *, on_temporary: Callable[[], None] | None = None) -> bool:
        """Write `data` under `name` unless that name is taken; return whether this call won it.

        `on_temporary` is called when the bytes are safe but nothing is visible under `name` yet.  Where `fenced` is
        False the store cannot decide, and the answer comes from looking before and after."""

    @abstractmethod
    def read_with_token(self, name: str) -> tuple[bytes, str, float] | None:
        """Return content, token for `write_if_token`, and time of modification in seconds; None where nothing is."""

    @abstractmethod
    def write_if_token(self, name: str, data: bytes, token: str) -> bool:
        """Replace `name` by `data` if it still is what `token` was read from; return whether it was replaced.

        One comparison and swap: If-Match on S3, a lock on the folder on a local disk.  Other stores compare, then
        write."""

    @abstractmethod
    def delete(self, name: str) -> bool:
        """Remove `name`; return whether it was there."""

    def sweep_temporaries(self, older_than: float) -> int:
        """Remove temporaries last written before `older_than` (seconds since the epoch); return how many.

        Object stores have none: what was not completed was never there."""
        return 0

    def _path(self, name: str) -> str:
        parts = name.split("/") if name else []
        assert not any(part in ("", ".", "..") for part in parts), f"not a relative name: {name!r}"
        return "/".join([self._root.rstrip("/"), *parts])

    @contextlib.contextmanager
    def _naming_errors(self, verb: str, name: str) -> Iterator[None]:
        """Raise a refusal as the OutputError that tells a person what to do; an answer to a question stays as it is."""
        try:
            yield
        except (OutputError, AssertionError):
            raise
        except NotADirectoryError as error:
            # What lies below a file is not there.
            if verb in ("read", "look for"):
                raise FileNotFoundError(error.errno, error.strerror, name) from error
            raise self._error(verb, name, error) from error
        except (FileNotFoundError, FileExistsError) as error:
            if verb in ("read", "look for", "list", "delete") or self._is_answer(error):
                raise
            raise self._error(verb, name, error) from error
        except Exception as error:
            if self.is_local and not isinstance(error, OSError):
                raise  # not the disk's doing, but that of an `on_step`
            raise self._error(verb, name, error) from error

    def _is_answer(self, error: OSError) -> bool:
        """Whether "exists" or "not found", said to a write, answers its condition."""
        return False

    def _error(self, verb: str, name: str, error: Exception) -> OutputError:
        number = error.errno if isinstance(error, OSError) else None
        where = self.printable(name) if name else self.url
        reason = os.strerror(number) if self.is_local and number else printable_error(error, self._options)
        what = f"{where}: cannot {verb} it ({reason.rstrip('.')})."
        if number in _FULL:
            return OutputFull(f"{what} Make room, or raise the quota or file-size limit, then run the command again.")
        if isinstance(error, PermissionError) or is_unauthorised(error) or (self.is_local and number in _NOT_WRITABLE):
            return OutputNotWritable(f"{what} Check the path, its permissions and your credentials.")
        if isinstance(error, FileNotFoundError):
            return OutputNotWritable(f"{what} Create the bucket or container first.")
        return OutputError(f"{what} Check the storage, then run the command again: what is committed is kept.")


def is_unauthorised(error: BaseException) -> bool:
    """Whether an S3 client found no credentials."""
    # botocore is not imported for its exceptions: it is there only where S3 is used.
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")


def _is_temporary(name: str) -> bool:
    return TEMPORARY.fullmatch(name.rpartition("/")[2]) is not None
