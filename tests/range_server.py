"""A web server for shards, with ranges, that counts what it serves and can be slow."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class RangeServer:
    """A running server."""

    host: str
    """`127.0.0.1:PORT`"""
    bytes_sent: int = 0

    def url(self, name: str) -> str:
        return f"http://{self.host}/{name}"


@contextmanager
def serve_ranges(folder: Path, *, delay_seconds: float = 0.0) -> Iterator[RangeServer]:
    """Serve the files in `folder`; every answer with a body comes `delay_seconds` late."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, *, with_body: bool) -> None:
            path = folder / self.path.partition("?")[0].lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            data = path.read_bytes()
            first, last = 0, len(data)
            if wanted := self.headers.get("Range"):
                begin, _, end = wanted.removeprefix("bytes=").partition("-")
                first, last = int(begin), min(last, int(end) + 1 if end else last)
            self.send_response(206 if wanted else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(last - first))
            if wanted:
                self.send_header("Content-Range", f"bytes {first}-{last - 1}/{len(data)}")
            self.end_headers()
            if with_body:
                time.sleep(delay_seconds)
                self.wfile.write(data[first:last])
                server.bytes_sent += last - first

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = RangeServer(f"127.0.0.1:{http.server_address[1]}")
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
