"""What a failed request for a shard means: whether it may pass, and which ShardError it is."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from pipeline.credentials import printable_error
from pipeline.queues import Stopped
from schemas.errors import ShardError, ShardForbidden, ShardNotFound, ShardUnreadable, SourceChanged


def _cause(error: BaseException) -> BaseException:
    """Return what is behind `error`: fsspec calls every failure to ask a web server "file not found"."""
    cause = error.__cause__
    if not isinstance(error, FileNotFoundError) or cause is None:
        return error
    is_of_the_net = type(cause).__module__.startswith("aiohttp") or isinstance(cause, ConnectionError | TimeoutError)
    return cause if is_of_the_net else error


def _status(error: BaseException) -> int:
    status = getattr(error, "status", 0)
    return status if isinstance(status, int) else 0


def _is_unauthorised(error: BaseException) -> bool:
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")


def _names_nothing(error: BaseException) -> bool:
    """Whether no file can have the name: it is too long, or a link that leads to itself."""
    return isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP)


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    error = _cause(error)
    lasting = (
        FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, NotImplementedError, ImportError,
        TypeError, ValueError, MemoryError, ShardError, Stopped,
    )  # fmt: skip
    if (
        not isinstance(error, Exception)
        or isinstance(error, lasting)
        or _is_unauthorised(error)
        or _names_nothing(error)
    ):
        return False
    if type(error).__name__ == "FileExpired":
        return False
    return not (400 <= _status(error) < 500 and _status(error) not in (408, 425, 429))


def shard_error(error: BaseException, url: str, options: Mapping[str, Any], *, position: int = 0) -> ShardError:
    """Say in one line what `error` means for the shard, without what `options` keep secret."""
    error = _cause(error)
    reason = printable_error(error, options).rstrip(".")
    is_absent = isinstance(error, FileNotFoundError | NotADirectoryError) or _names_nothing(error)
    if is_absent or _status(error) in (404, 410):
        return ShardNotFound(f"{url}: there is no such shard. Check the URL and that the shard was not moved.")
    if isinstance(error, PermissionError) or _is_unauthorised(error) or _status(error) in (401, 403):
        return ShardForbidden(f"{url}: storage does not let us read it ({reason}). Check permissions and credentials.")
    if type(error).__name__ == "FileExpired":
        return SourceChanged(
            f"{url}: the object changed while it was read. Let its writer finish, then run the job again."
        )
    if isinstance(error, OSError) and error.errno == errno.EMFILE:
        return ShardUnreadable(f"{url}: too many open files. Raise the limit with `ulimit -n`.")
    where = f" at byte {position:,}" if position else ""
    return ShardUnreadable(f"{url}: storage keeps failing{where} ({reason}). Check the storage and the network.")
