"""A folder of a local or mounted disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.storage.base import TEMPORARY, Names, Storage

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalFolder(Storage):
    """Files are written beside their name, flushed to the disk, and renamed or linked."""

    is_local = True

    def __init__(self, url: str, root: str) -> None:
        super().__init__(url, str(Path(root).absolute()), {})
        self._fenced = True

    @property
    def fenced(self) -> bool:
        return self._fenced

    def local_path(self, name: str) -> Path:
        return Path(self._path(name))

    def read_bytes(self, name: str) -> bytes:
        with self._naming_errors("read", name):
            return self.local_path(name).read_bytes()

    def read_range(self, name: str, start: int, length: int) -> bytes:
        with self._naming_errors("read", name), self.local_path(name).open("rb") as file:
            file.seek(start)
            return file.read(length)

    def exists(self, name: str) -> bool:
        with self._naming_errors("look for", name):
            return self.local_path(name).is_file()

    def size(self, name: str) -> int:
        with self._naming_errors("look for", name):
            return self.local_path(name).stat().st_size

    def modified(self, name: str) -> float:
        with self._naming_errors("look for", name):
            return self.local_path(name).stat().st_mtime

    def _files(self, folder: str, recursive: bool) -> Names:
        top = self.local_path(folder)
        found = []
        with self._naming_errors("list", folder):
            for parent, folders, names in os.walk(top, onerror=_raise_unless_missing):
                if not recursive:
                    folders.clear()
                found += [Path(parent, name).relative_to(top).as_posix() for name in names]
        return found

    def _entries(self) -> Names:
        with self._naming_errors("list", ""):
            try:
                return [f"{each.name}/" if each.is_dir() else each.name for each in os.scandir(self._root)]
            except FileNotFoundError:
                return []

    def publish(self, name: str, data: bytes, *, on_step: Callable[[str], None] | None = None) -> None:
        target = self.local_path(name)
        with self._naming_errors("write", name), _temporary(target, data) as temporary:
            if on_step:
                on_step("after_temp")
            temporary.replace(target)
            _sync_folder(target.parent)

    def create_only(self, name: str, data: bytes, *, on_temporary: Callable[[], None] | None = None) -> bool:
        target = self.local_path(name)
        with self._naming_errors("write", name), _temporary(target, data) as temporary:
            if on_temporary:
                on_temporary()
            won = self._link(temporary, target)
            if won:
                _sync_folder(target.parent)
            return won

    def read_with_token(self, name: str) -> tuple[bytes, str, float] | None:
        try:
            with self._naming_errors("read", name), self.local_path(name).open("rb") as file:
                data = file.read()
                return data, _token(data), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return None

    def write_if_token(self, name: str, data: bytes, token: str) -> bool:
        target = self.local_path(name)
        with self._naming_errors("write", name), _locked(target.parent):
            if not target.is_file() or _token(target.read_bytes()) != token:
                return False
            self.publish(name, data)
            return True

    def delete(self, name: str) -> bool:
        try:
            with self._naming_errors("delete", name):
                self.local_path(name).unlink()
        except FileNotFoundError:
            return False
        return True

    def sweep_temporaries(self, older_than: float) -> int:
        num_swept = 0
        with self._naming_errors("sweep", ""):
            for folder, _, names in os.walk(self._root):
                for name in filter(TEMPORARY.fullmatch, names):
                    path = Path(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        if path.stat().st_mtime < older_than:
                            path.unlink()
                            num_swept += 1
        return num_swept

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
            with _locked(target.parent):
                if target.exists():
                    return False
                temporary.rename(target)
        return True


@contextlib.contextmanager
def _temporary(target: Path, data: bytes) -> Iterator[Path]:
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


def _token(data: bytes) -> str:
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
def _locked(folder: Path, patience_seconds: float = 30.0) -> Iterator[None]:
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
