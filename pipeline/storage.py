"""Write an output in one step per object, on a local disk or in an object store, and keep credentials out of messages.

Nothing that a reader can see is ever half-written.  On a local disk bytes go to a temporary file beside their name and
are renamed (or linked, where the name must be new); in an object store they are one PUT.  `fsspec`'s
`with fs.open(name, "wb")` is not used: an exception inside it completes the upload of half a file.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tenacity
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from schemas.errors import OutputError, OutputFull, OutputNotWritable, SpecError, printable

MAX_PUT_BYTES = 5 << 30
"""The most that one PUT of S3 and its relatives takes."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
                 errno.ELOOP, errno.ENOENT, errno.EINVAL}  # fmt: skip
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}

# The stores whose fsspec class hands `mode="create"` to the server, which decides; others look, then write.
_CREATE_ONLY_PROTOCOLS = {"s3", "s3a", "gs", "gcs"}

_Names = list[str]  # inside the class `list` is a method

_TEMPORARY = re.compile(r"\..+\.\d+\.[0-9a-f]{16}\.tmp")

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<rest>(?:(?!::[A-Za-z][\w+.\-]*://)[^\s'\"<>])*)")
_CONTAINER_SCHEMES = {"abfs", "abfss", "wasb", "wasbs", "adl"}
_OBJECT_SCHEMES = {"s3", "s3a", "gs", "gcs", "oss", "oci", "file", "local", "memory"}
_SECRET_NAME = re.compile(r"key|secret|token|sig|pass|cred|auth|sas|account", re.IGNORECASE)

HIDDEN = "***"
"""Stands for a credential in whatever is shown or written."""


def printable_url(url: str) -> str:
    """Return `url` as it may be shown or stored: without user information, signatures or tokens."""
    return _URL.sub(_hide, printable(url))


def printable_error(error: BaseException, storage_options: Mapping[str, Any] | None = None) -> str:
    """Return the first line of what `error` says, at most 300 characters, without credentials."""
    text = printable(str(error)).strip() or type(error).__name__
    for secret in sorted(_secrets(storage_options or {}), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = printable_url(text.splitlines()[0])
    return text if len(text) <= 300 else text[:297] + "..."


def _hide(match: re.Match[str]) -> str:
    scheme, rest = match["scheme"].lower(), match["rest"]
    # A secret key may hold an unquoted slash, so user information with a password runs up to the last "@".
    password = re.match(r"[^/@:?#]*:(?!\d+(?:[/?#]|$))[^?#]*@", rest)
    end = password.end() if password else re.match(r"[^/?#]*", rest).end()  # type: ignore[union-attr]
    authority, path = rest[:end], rest[end:]
    user, at, host = authority.rpartition("@")
    if at and not (scheme in _CONTAINER_SCHEMES and ":" not in user):
        authority = f"{HIDDEN}@{host}"
    path, hash_mark, fragment = path.partition("#")
    path, question, query = path.partition("?")
    if query and (scheme not in _OBJECT_SCHEMES or _SECRET_NAME.search(query)):
        query = "&".join(_hide_value(part) for part in query.split("&"))
    if hash_mark and (scheme not in _OBJECT_SCHEMES or _SECRET_NAME.search(fragment)):
        fragment = HIDDEN
    return f"{match['scheme']}://{authority}{path}{question}{query}{hash_mark}{fragment}"


def _hide_value(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    if not equals:
        return HIDDEN
    return parameter if name.lower() == "versionid" else f"{name}={HIDDEN}"


def _secrets(options: Mapping[str, Any], under_secret: bool = False) -> Iterator[str]:
    for name, value in options.items():
        secret = under_secret or bool(_SECRET_NAME.search(str(name)))
        if isinstance(value, Mapping):
            yield from _secrets(value, secret)
        elif isinstance(value, str) and secret and len(value) >= 4:
            yield value


class Storage:
    """The folder of one output, local or in an object store; names are relative to it, with forward slashes.

    Every method raises OutputNotWritable, OutputFull or their parent OutputError when the storage refuses; a read of
    what is not there raises FileNotFoundError.
    """

    def __init__(
        self, url: str, storage_options: Mapping[str, Any] | None = None, *, attempts: int = 5, first_wait: float = 0.2
    ) -> None:
        """`attempts` and `first_wait` (seconds, doubled each time) bound the repeats of a failing remote request.

        Raises SpecError when no storage is known under this URL."""
        self._options = dict(storage_options or {})
        self._attempts = attempts
        self._first_wait = first_wait
        self._fenced: bool | None = None
        # What another process wrote must be seen at once, so nothing is taken from a cached listing.
        caching = {} if "::" in url else {"use_listings_cache": False}
        self.url = printable_url(url)
        self._given_url = url
        self._filesystem_options = {**caching, **self._options}
        try:
            self._filesystem, self._root = url_to_fs(url, **self._filesystem_options)
        except (ValueError, ImportError) as error:
            raise SpecError(f"{self.url}: {printable_error(error, self._options)}") from error
        self._process = os.getpid()
        self.is_local = isinstance(self._fs, LocalFileSystem)
        if self.is_local:
            self._root = str(Path(self._root).absolute())
        protocols = (self._fs.protocol,) if isinstance(self._fs.protocol, str) else self._fs.protocol
        self._is_s3 = "s3" in protocols
        self._may_fence = bool(_CREATE_ONLY_PROTOCOLS & set(protocols))

    @property
    def _fs(self) -> AbstractFileSystem:
        # Connections do not survive a fork, as of the workers of a DataLoader: there each process makes its own.
        if self._process != os.getpid():
            self._filesystem, _ = url_to_fs(self._given_url, **self._filesystem_options)
            self._process = os.getpid()
        return self._filesystem

    @property
    def fenced(self) -> bool:
        """Whether of two writers of one new name exactly one is told that it won.

        Object stores are asked once with a probe, because some take the condition and ignore it."""
        if self._fenced is None:
            self._fenced = True if self.is_local else self._may_fence and self._probe_create_only()
        return self._fenced

    def printable(self, name: str) -> str:
        """Return the URL of `name` for a message."""
        return f"{self.url.rstrip('/')}/{printable(name)}"

    def url_of(self, name: str) -> str:
        """Return the URL under which fsspec opens `name`; it may hold credentials, so it is not for messages."""
        first, chain, rest = self._given_url.partition("::")
        return f"{first.rstrip('/')}/{name}{chain}{rest}"

    def local_path(self, name: str) -> Path:
        """Return the path of `name` on a local disk."""
        assert self.is_local, "an object store has no paths"
        return self._local(name)

    # Reading

    def read_bytes(self, name: str) -> bytes:
        """Return the content of `name`.  Raises FileNotFoundError."""
        if self.is_local:
            with self._mapping_errors("read", name):
                return self._local(name).read_bytes()
        return bytes(self._remotely("read", name, lambda: self._fs.cat_file(self._path(name))))

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """Return up to `length` bytes of `name` from byte `start`; fewer at its end.  Raises FileNotFoundError."""
        if self.is_local:
            with self._mapping_errors("read", name), self._local(name).open("rb") as file:
                file.seek(start)
                return file.read(length)
        path = self._path(name)
        return bytes(self._remotely("read", name, lambda: self._fs.cat_file(path, start=start, end=start + length)))

    def exists(self, name: str) -> bool:
        """Whether there is a file `name`."""
        if self.is_local:
            with self._mapping_errors("look for", name):
                return self._local(name).is_file()
        return self._info(name) is not None

    def size(self, name: str) -> int:
        """Bytes of `name`.  Raises FileNotFoundError."""
        if self.is_local:
            with self._mapping_errors("look for", name):
                return self._local(name).stat().st_size
        return int(self._existing_info(name)["size"])

    def modified(self, name: str) -> float:
        """Seconds since the epoch, by the storage's own clock, at which `name` was last written.

        Raises FileNotFoundError."""
        if self.is_local:
            with self._mapping_errors("look for", name):
                return self._local(name).stat().st_mtime
        self._existing_info(name)
        return float(self._remotely("look for", name, lambda: self._fs.modified(self._path(name))).timestamp())

    def list(self, folder: str = "", *, recursive: bool = False) -> _Names:
        """Return the names of the files in `folder`, relative to `folder` and sorted; temporaries are left out.

        A folder that is not there is empty."""
        if self.is_local:
            with self._mapping_errors("list", folder):
                names = sorted(self._walk_local(self._local(folder), recursive))
        else:
            names = sorted(self._list_remote(folder, recursive))
        return [name for name in names if not _TEMPORARY.fullmatch(name.rpartition("/")[2])]

    def entries(self) -> _Names:
        """Return what lies directly in the output, sorted; folders end in a slash, temporaries are left out."""
        if self.is_local:
            with self._mapping_errors("list", ""):
                try:
                    found = [f"{each.name}/" if each.is_dir() else each.name for each in os.scandir(self._local(""))]
                except FileNotFoundError:
                    return []
        else:
            found = self._list_remote("", recursive=False, folders=True)
        return sorted(name for name in found if not _TEMPORARY.fullmatch(name))

    # Writing

    def publish(self, name: str, data: bytes, *, on_step: Callable[[str], None] | None = None) -> None:
        """Write `data` under `name` in one atomic step, replacing what is there.

        `on_step` is called with "after_temp" when the bytes are safe but nothing is visible under `name` yet."""
        step = on_step or (lambda _: None)
        if not self.is_local:
            self._check_put_size(name, data)
            step("after_temp")
            self._remotely("write", name, lambda: self._put(name, data))
            return
        target = self._local(name)
        with self._mapping_errors("write", name), self._temporary(target, data) as temporary:
            step("after_temp")
            temporary.replace(target)
            _sync_folder(target.parent)

    def create_only(self, name: str, data: bytes, *, on_temporary: Callable[[], None] | None = None) -> bool:
        """Write `data` under `name` unless that name is taken; return whether this call won it.

        `on_temporary` is called when the bytes are safe but nothing is visible under `name` yet.  Where `fenced` is
        False the store cannot decide, and the answer comes from looking before and after."""
        step = on_temporary or (lambda: None)
        if not self.is_local:
            step()
            return self._create_remote(name, data)
        target = self._local(name)
        with self._mapping_errors("write", name), self._temporary(target, data) as temporary:
            step()
            won = self._link(temporary, target)
            if won:
                _sync_folder(target.parent)
            return won

    def read_with_token(self, name: str) -> tuple[bytes, str, float] | None:
        """Return content, token for `write_if_token`, and time of modification in seconds; None where nothing is."""
        try:
            if self.is_local:
                with self._mapping_errors("read", name), self._local(name).open("rb") as file:
                    data = file.read()
                    return data, _local_token(data), os.fstat(file.fileno()).st_mtime
            # Content and tag come from two requests; they belong together when the tag is the same on both sides.
            for _ in range(10):
                token, modified = self._remote_token(name), self.modified(name)
                data = self.read_bytes(name)
                if self._remote_token(name) == token:
                    return data, token, modified
        except FileNotFoundError:
            return None
        raise OutputError(f"{self.printable(name)}: it changes faster than it can be read. Who else is writing there?")

    def write_if_token(self, name: str, data: bytes, token: str) -> bool:
        """Replace `name` by `data` if it still is what `token` was read from; return whether it was replaced.

        One comparison and swap: If-Match on S3, a lock on the folder on a local disk.  Other stores compare, then
        write."""
        if self.is_local:
            target = self._local(name)
            with self._mapping_errors("write", name), _locked_folder(target.parent):
                if not target.is_file() or _local_token(target.read_bytes()) != token:
                    return False
                self.publish(name, data)
                return True
        self._check_put_size(name, data)
        try:
            self._remotely("write", name, lambda: self._put_if_match(name, data, token))
        except (FileNotFoundError, FileExistsError):
            # The reply to a PUT that succeeded may have been lost: then the refusal is our own doing.
            return self._holds(name, data)
        return True

    def delete(self, name: str) -> bool:
        """Remove `name`; return whether it was there."""
        try:
            if self.is_local:
                with self._mapping_errors("delete", name):
                    self._local(name).unlink()
            else:
                if not self.exists(name):
                    return False
                self._remotely("delete", name, lambda: self._fs.rm_file(self._path(name)))
        except FileNotFoundError:
            return False
        return True

    def sweep_temporaries(self, older_than: float) -> int:
        """Remove temporaries last written before `older_than` (seconds since the epoch); return how many.

        Object stores have none: what was not completed was never there."""
        if not self.is_local:
            return 0
        num_swept = 0
        with self._mapping_errors("sweep", ""):
            for folder, _, names in os.walk(self._root):
                for name in filter(_TEMPORARY.fullmatch, names):
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        if path.stat().st_mtime < older_than:
                            path.unlink()
                            num_swept += 1
        return num_swept

    # Local disk

    def _local(self, name: str) -> Path:
        return Path(self._path(name))

    def _path(self, name: str) -> str:
        parts = name.split("/") if name else []
        assert not any(part in ("", ".", "..") for part in parts), f"not a relative name: {name!r}"
        return "/".join([str(self._root).rstrip("/"), *parts])

    def _walk_local(self, folder: Path, recursive: bool) -> Iterator[str]:
        for parent, folders, names in os.walk(folder, onerror=_raise_unless_missing):
            if not recursive:
                folders.clear()
            yield from (Path(parent, name).relative_to(folder).as_posix() for name in names)

    @contextlib.contextmanager
    def _temporary(self, target: Path, data: bytes) -> Iterator[Path]:
        """Write `data` beside `target`, flushed to the disk, and remove that file again unless it was renamed."""
        _make_folder(target.parent)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()

    def _link(self, temporary: Path, target: Path) -> bool:
        try:
            os.link(temporary, target)
        except FileExistsError:
            # On NFS the answer to a link that succeeded may be lost, and the repeated request then says "exists".
            return temporary.samefile(target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # A file system without hard links (FAT, some FUSE): cooperating writers take turns instead.
            self._fenced = False
            with _locked_folder(target.parent):
                if target.exists():
                    return False
                temporary.rename(target)
        return True

    # Object stores

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
            if self._remote_token(name) != token:
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

    def _create_remote(self, name: str, data: bytes) -> bool:
        self._check_put_size(name, data)
        if not self.fenced:
            if self.exists(name):
                return False
            self._remotely("write", name, lambda: self._put(name, data))
            return self._holds(name, data)
        try:
            self._remotely("write", name, lambda: self._put(name, data, mode="create"))
        except FileExistsError:
            # A PUT that timed out may have succeeded, and its repetition (s3fs repeats too) then says "exists".
            return self._holds(name, data)
        return True

    def _probe_create_only(self) -> bool:
        name = f".probe-{secrets.token_hex(8)}"
        try:
            self._remotely("write", name, lambda: self._put(name, b"first", mode="create"))
            try:
                self._remotely("write", name, lambda: self._put(name, b"second", mode="create"))
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

    def _remote_token(self, name: str) -> str:
        info = self._existing_info(name)
        for field in ("ETag", "etag", "generation", "md5Hash"):
            if info.get(field):
                return str(info[field])
        return hashlib.sha256(self.read_bytes(name)).hexdigest()

    def _info(self, name: str) -> dict[str, Any] | None:
        try:
            info: dict[str, Any] = self._remotely("look for", name, lambda: self._fs.info(self._path(name)))
        except FileNotFoundError:
            return None
        return info if info.get("type") != "directory" else None

    def _existing_info(self, name: str) -> dict[str, Any]:
        info = self._info(name)
        if info is None:
            raise FileNotFoundError(errno.ENOENT, "no such object", self.printable(name))
        return info

    def _list_remote(self, folder: str, recursive: bool, folders: bool = False) -> _Names:
        path = self._path(folder)
        prefix = str(self._fs._strip_protocol(path)).rstrip("/") + "/"

        def names() -> _Names:
            self._fs.invalidate_cache()
            entries = self._fs.find(path, detail=True).values() if recursive else self._fs.ls(path, detail=True)
            names = [str(entry["name"]) for entry in entries if entry["type"] == "file"]
            if folders:
                names += [f"{entry['name'].rstrip('/')}/" for entry in entries if entry["type"] == "directory"]
            return [name[len(prefix) :] for name in names if name.startswith(prefix)]

        try:
            return list(self._remotely("list", folder, names))
        except FileNotFoundError:
            return []

    def _remotely(self, verb: str, name: str, request: Callable[[], Any]) -> Any:
        """Call `request`, which may be repeated safely, until it succeeds, is refused, or has failed too often."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_may_pass),
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=tenacity.wait_random_exponential(multiplier=self._first_wait, max=20),
            reraise=True,
        )
        with self._mapping_errors(verb, name):
            return retrying(request)

    @contextlib.contextmanager
    def _mapping_errors(self, verb: str, name: str) -> Iterator[None]:
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
            # While reading it is an answer; while writing locally it means a folder that vanished or is a file.
            # An object store says "exists" to a condition, and "not found" when the bucket is missing.
            if verb in ("read", "look for", "list", "delete", "rename") or (not self.is_local and _is_answer(error)):
                raise
            raise self._error(verb, name, error) from error
        except Exception as error:
            if self.is_local and not isinstance(error, OSError):
                raise  # not the disk's doing, but that of an `on_step`
            raise self._error(verb, name, error) from error

    def _error(self, verb: str, name: str, error: Exception) -> OutputError:
        number = error.errno if isinstance(error, OSError) else None
        where = self.printable(name) if name else self.url
        reason = os.strerror(number) if self.is_local and number else printable_error(error, self._options)
        what = f"{where}: cannot {verb} it ({reason.rstrip('.')})."
        if number in _FULL:
            return OutputFull(f"{what} Make room, or raise the quota or file-size limit, then run the command again.")
        if isinstance(error, PermissionError) or _is_unauthorised(error) or (self.is_local and number in _NOT_WRITABLE):
            return OutputNotWritable(f"{what} Check the path, its permissions and your credentials.")
        if isinstance(error, FileNotFoundError):
            return OutputNotWritable(f"{what} Create the bucket or container first.")
        return OutputError(f"{what} Check the storage, then run the command again: what is committed is kept.")


def _may_pass(error: BaseException) -> bool:
    lasting = (FileNotFoundError, FileExistsError, PermissionError, NotImplementedError, TypeError, ValueError)
    return isinstance(error, Exception) and not isinstance(error, lasting) and not _is_unauthorised(error)


def _is_answer(error: OSError) -> bool:
    return isinstance(error, FileExistsError) or "bucket" not in str(error).lower()


def _is_unauthorised(error: BaseException) -> bool:
    # botocore is not imported for its exceptions: it is there only where S3 is used.
    return type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")


def _is_failed_condition(error: OSError) -> bool:
    return isinstance(error, FileExistsError) or (
        error.errno == errno.EINVAL and "condition" in printable(str(error)).lower()
    )


def _local_token(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _make_folder(folder: Path) -> None:
    """Create `folder` and its parents so that they outlive a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # Some network and FUSE file systems cannot flush a folder; their rename is as durable as it gets.
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked_folder(folder: Path, patience_seconds: float = 30.0) -> Iterator[None]:
    """Hold the advisory lock of `folder`; it goes with the process, so a crash leaves nothing behind."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + patience_seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.005)
            except OSError as error:
                # A file system without locks: comparison and write still follow each other within microseconds.
                if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.EBADF, errno.EINVAL, errno.ENOLCK):
                    break
                raise
        yield
    finally:
        os.close(descriptor)
