"""Serves files over HTTP, slowly: storage that is the limit, while everything is on this machine."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE_BYTES = 4096


class _Handler(SimpleHTTPRequestHandler):
    bytes_per_second = 0.0

    def log_message(self, *_: Any) -> None:
        return

    def copyfile(self, source: Any, outputfile: Any) -> None:
        with contextlib.suppress(OSError):
            while piece := source.read(PIECE_BYTES):
                outputfile.write(piece)
                time.sleep(len(piece) / self.bytes_per_second)


@contextlib.contextmanager
def slow_server(folder: Path, *, bytes_per_second: float, port: int = 0) -> Iterator[str]:
    """Serve `folder` at so many bytes per second for each connection; yield its URL."""
    handler = type("Handler", (_Handler,), {"bytes_per_second": bytes_per_second})
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(handler, directory=str(folder)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
