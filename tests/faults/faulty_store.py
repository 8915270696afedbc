"""An S3-speaking server behind a proxy that answers with errors, breaks off, is slow, lists late or takes nothing."""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from tests.conftest import ObjectStore

PIECE_BYTES = 8192
_HOP_HEADERS = {"connection", "transfer-encoding", "content-length", "keep-alive", "server", "date"}
ACCESS_DENIED = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
INTERNAL_ERROR = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>Try again.</Message></Error>"


@dataclass
class Faults:
    """What the proxy does to requests; may be changed while it runs."""

    error_share: float = 0.0
    """Of all requests that are answered with 500 before they reach the store."""
    lost_share: float = 0.0
    """Of all writes that reach the store, but whose answer does not come back."""
    broken_share: float = 0.0
    """Of all bodies that end in the middle."""
    bytes_per_second: float = float("inf")
    """Of every body that is read."""
    lag_seconds: float = 0.0
    """For so long a new object is in no listing."""
    is_read_only: bool = False
    struck: Counter[str] = field(default_factory=Counter)
    """How often each of them has happened."""


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, backend: str, faults: Faults) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.backend, self.faults = backend, faults
        self.generator = random.Random(7)
        self.written: dict[str, float] = {}
        self.lock = threading.Lock()

    def draw(self, name: str, share: float) -> bool:
        """Whether a fault strikes now."""
        with self.lock:
            strikes = self.generator.random() < share
            self.faults.struck[name] += strikes
            return strikes


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def log_message(self, *_: Any) -> None:
        return

    def handle_one_request(self) -> None:
        with contextlib.suppress(OSError):
            super().handle_one_request()

    def do_GET(self) -> None:
        self._pass_on()

    do_PUT = do_POST = do_DELETE = do_HEAD = do_GET

    def _pass_on(self) -> None:
        server, faults = self.server, self.server.faults
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_write = self.command in ("PUT", "POST", "DELETE")
        if is_write and faults.is_read_only:
            faults.struck["read-only"] += 1
            return self._answer(403, {}, ACCESS_DENIED)
        if server.draw("error", faults.error_share):
            return self._answer(500, {}, INTERNAL_ERROR)
        connection = http.client.HTTPConnection(server.backend, timeout=60)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            reply = connection.getresponse()
            data, headers = reply.read(), dict(reply.getheaders())
        finally:
            connection.close()
        path = urlsplit(self.path).path
        if self.command == "PUT" and reply.status == 200:
            server.written.setdefault(path, time.monotonic())
        if is_write and server.draw("lost", faults.lost_share):
            self.close_connection = True
            return None
        if self.command == "GET" and "list-type" in self.path:
            data = self._without_new(data, path)
        return self._answer(reply.status, headers, data)

    def _without_new(self, listing: bytes, bucket: str) -> bytes:
        """The listing without objects that were written a moment ago."""

        def keep(match: re.Match[bytes]) -> bytes:
            key = re.search(rb"<Key>(.*?)</Key>", match[0], re.DOTALL)
            assert key is not None
            path = f"{bucket.rstrip('/')}/{key[1].decode()}"
            age = time.monotonic() - self.server.written.get(path, float("-inf"))
            if age >= self.server.faults.lag_seconds:
                return match[0]
            self.server.faults.struck["lag"] += 1
            return b""

        return re.sub(rb"<Contents>.*?</Contents>", keep, listing, flags=re.DOTALL)

    def _answer(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _HOP_HEADERS:
                self.send_header(name, value)
        # A HEAD tells the length of what it does not send.
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command == "HEAD":
            return
        faults = self.server.faults
        is_object = self.command == "GET" and status in (200, 206) and len(data) > 1
        if is_object and self.server.draw("broken", faults.broken_share):
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            self.wfile.write(piece)
            if is_object and faults.bytes_per_second < float("inf"):
                time.sleep(len(piece) / faults.bytes_per_second)


@contextlib.contextmanager
def faulty(store: ObjectStore) -> Iterator[tuple[ObjectStore, Faults]]:
    """The same bucket behind a proxy, and what the proxy does to requests."""
    faults = Faults()
    proxy = _Proxy(urlsplit(store.storage_options["endpoint_url"]).netloc, faults)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{proxy.server_address[1]}"
        yield ObjectStore(store.url, {**store.storage_options, "endpoint_url": endpoint}), faults
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
