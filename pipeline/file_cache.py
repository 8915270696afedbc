"""A bounded folder of local copies of remote files, shared by the processes of a host.

Locks are those of the kernel (flock) on the files themselves, so a process that is killed leaves none behind.  A copy
appears under its name in one step, after its SHA-256 has been compared.  A copy that some process reads is never
deleted; when all are in use and the folder is full, further files are read from their store."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.storage import Storage
from schemas.errors import BsqError, SpecError

FOLDER = "bsqtok-files"
"""The folder inside `cache_dir` that the cache owns; nothing outside it is ever touched."""

_COPY = re.compile(r"[0-9a-f]{64}(\.part)?")
_PART = ".part"
_REQUEST_BYTES = 1 << 24
_POLL_SECONDS = 0.02
_COMPLETED = -1
"""Instead of a file to write to: another process has just written it."""


class FileCache:
    """Copies of files by their SHA-256, at most `max_bytes` in all; the longest unused go first."""

    def __init__(self, cache_dir: str | Path, max_bytes: int, *, patience_seconds: float = 300.0) -> None:
        """`patience_seconds` bounds how long a file that another process is fetching is waited for.

        Raises SpecError."""
        if max_bytes < 1:
            raise SpecError(f"cache_bytes is {max_bytes}; it must be at least 1.")
        self._folder = Path(cache_dir).absolute() / FOLDER
        self._max_bytes = max_bytes
        self._patience = patience_seconds

    def fetch(self, storage: Storage, name: str, num_bytes: int, sha256: str) -> io.FileIO | None:
        """The copy of a file, open for reading and safe from deletion until closed; None where there is no room.

        Fetches the file unless a copy is there.  Raises BsqError when what the store gives is not the file that is
        recorded, also at the second attempt."""
        if num_bytes > self._max_bytes:
            return None
        deadline = time.monotonic() + self._patience
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            while True:
                if (copy := self._open_copy(sha256, num_bytes)) is not None:
                    return copy
                with self._part(sha256, deadline) as part:
                    if part is None:
                        return None
                    if part == _COMPLETED:
                        continue
                    if (self._folder / sha256).exists():
                        (self._folder / (sha256 + _PART)).unlink()
                        continue
                    if not self._make_room(part, sha256, num_bytes):
                        (self._folder / (sha256 + _PART)).unlink()
                        return None
                    self._fill(part, storage, name, num_bytes, sha256)
                    # The lock becomes that of a reader: nobody may delete the copy before it is opened again.
                    fcntl.flock(part, fcntl.LOCK_SH)
                    # Under the lock, so that whoever counts meets it under exactly one of its names.
                    with self._locked_folder():
                        (self._folder / (sha256 + _PART)).rename(self._folder / sha256)
                    return io.FileIO(os.dup(part), "rb")
        except OSError as error:
            raise BsqError(
                f"{self._folder}: the cache cannot be used ({os.strerror(error.errno or 0)}). Check its permissions "
                f"and the room on its disk, or choose another cache_dir."
            ) from error

    def num_bytes(self) -> int:
        """Bytes of the copies, with those that are being fetched."""
        try:
            with self._locked_folder():
                return sum(size for _, size, _ in self._entries())
        except FileNotFoundError:
            return 0

    def _open_copy(self, sha256: str, num_bytes: int) -> io.FileIO | None:
        path = self._folder / sha256
        try:
            file = io.FileIO(str(path), "rb")
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        status = os.fstat(file.fileno())
        if status.st_nlink and status.st_size == num_bytes:
            with contextlib.suppress(OSError):
                os.utime(path)
            return file
        if status.st_nlink:
            # Cut short, by a full disk or a power cut: what is opened may not be trusted.
            path.unlink(missing_ok=True)
        file.close()
        return None

    @contextlib.contextmanager
    def _part(self, sha256: str, deadline: float) -> Iterator[int | None]:
        """The file that a copy is written to, locked; None when another process kept it for too long.

        _COMPLETED when the copy appeared meanwhile."""
        path = self._folder / (sha256 + _PART)
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                while not _lock(descriptor):
                    # Once the copy is there its readers hold the lock, for as long as they like.
                    if (self._folder / sha256).exists():
                        yield _COMPLETED
                        return
                    if time.monotonic() > deadline:
                        yield None
                        return
                    time.sleep(_POLL_SECONDS)
                # Unless it was completed and renamed meanwhile, or given up.
                if _is_same(descriptor, path):
                    yield descriptor
                    return
                if (self._folder / sha256).exists():
                    yield _COMPLETED
                    return
            finally:
                os.close(descriptor)

    def _make_room(self, part: int, sha256: str, num_bytes: int) -> bool:
        """Reserve the bytes of a file, deleting what is unused for longest; False when too much is in use."""
        with self._locked_folder():
            entries = sorted(self._entries())
            total = sum(size for _, size, _ in entries) - os.fstat(part).st_size
            for _, size, name in entries:
                if total + num_bytes <= self._max_bytes:
                    break
                if not name.startswith(sha256) and self._delete_unused(name):
                    total -= size
            if total + num_bytes > self._max_bytes:
                return False
            # Other processes count the size that it will have.
            os.ftruncate(part, num_bytes)
            return True

    def _entries(self) -> list[tuple[float, int, str]]:
        """Time of last use, bytes and name of everything that the cache wrote."""
        entries = []
        with contextlib.suppress(FileNotFoundError), os.scandir(self._folder) as found:
            for entry in found:
                if _COPY.fullmatch(entry.name):
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        entries.append((status.st_mtime, status.st_size, entry.name))
        return entries

    def _delete_unused(self, name: str) -> bool:
        path = self._folder / name
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return True
        try:
            # A part whose lock is free belongs to a process that died.
            if not _lock(descriptor):
                return False
            path.unlink(missing_ok=True)
            return True
        finally:
            os.close(descriptor)

    def _fill(self, part: int, storage: Storage, name: str, num_bytes: int, sha256: str) -> None:
        for attempt in (1, 2):
            digest = hashlib.sha256()
            for offset in range(0, num_bytes, _REQUEST_BYTES):
                try:
                    data = storage.read_range(name, offset, min(_REQUEST_BYTES, num_bytes - offset))
                except FileNotFoundError as error:
                    raise BsqError(
                        f"{storage.printable(name)}: gone or altered: it is not there. Run `bsq verify {storage.url}`."
                    ) from error
                digest.update(data)
                view = memoryview(data)
                while view:
                    written = os.pwrite(part, view, offset)
                    view, offset = view[written:], offset + written
            if digest.hexdigest() == sha256:
                return
            if attempt == 2:
                (self._folder / (sha256 + _PART)).unlink(missing_ok=True)
                raise BsqError(
                    f"{storage.printable(name)}: gone or altered: its SHA-256 is not the one that is recorded, fetched "
                    f"twice. Run `bsq verify {storage.url}`."
                )

    @contextlib.contextmanager
    def _locked_folder(self) -> Iterator[None]:
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
