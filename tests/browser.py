"""A real browser without a window, told what to do over its own debugging protocol."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_SECONDS = 60.0
QUIET = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-default-apps", "--disable-sync", "--hide-scrollbars",
    "--disable-dev-shm-usage", "--remote-debugging-port=0",
)  # fmt: skip


def find_browser() -> str:
    """Path of a browser of Chromium's family; the test is skipped where there is none."""
    named = os.environ.get("BSQTOK_BROWSER")
    found = named or next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip("needs Chromium (apt-get install chromium, or set BSQTOK_BROWSER)")
    return found


@dataclass
class Visit:
    """What a browser saw of one page."""

    requests: list[str] = field(default_factory=list)
    """URLs that it asked for, the page's own included."""
    complaints: list[str] = field(default_factory=list)
    """What it wrote to its console: blocked scripts, broken pictures, bad styles."""
    dialogs: list[str] = field(default_factory=list)
    """What scripts of the page said."""
    answers: list[Any] = field(default_factory=list)
    """Of each question, at each width."""
    screenshots: list[bytes] = field(default_factory=list)
    """PNG of the whole page at each width."""


def visit(page: Path, questions: list[str], *, widths: tuple[int, ...] = (1200,), scheme: str = "light") -> Visit:
    """Open `page` at each width (CSS px) and ask it JavaScript expressions."""
    browser = find_browser()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [browser, *QUIET, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            return asyncio.run(
                asyncio.wait_for(_visit(Path(profile), page, questions, widths, scheme), PATIENCE_SECONDS)
            )
        finally:
            process.terminate()
            process.wait(10)


async def _visit(profile: Path, page: Path, questions: list[str], widths: tuple[int, ...], scheme: str) -> Visit:
    seen = Visit()
    address = profile / "DevToolsActivePort"
    while not (address.exists() and len(address.read_text().splitlines()) == 2):
        await asyncio.sleep(0.05)
    port = address.read_text().splitlines()[0]
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
            targets = [target for target in await answer.json() if target["type"] == "page"]
        async with session.ws_connect(targets[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
            tab = _Tab(socket, seen)
            reader = asyncio.create_task(tab.read())
            for domain in ("Page", "Network", "Runtime", "Log"):
                await tab.call(f"{domain}.enable")
            await tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            for width in widths:
                await tab.call(
                    "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False
                )
                await tab.call("Page.navigate", url=page.as_uri())
                await tab.loaded.wait()
                tab.loaded.clear()
                for question in questions:
                    result = await tab.call("Runtime.evaluate", expression=question, returnByValue=True)
                    assert "exceptionDetails" not in result, result
                    seen.answers.append(result["result"].get("value"))
                shot = await tab.call("Page.captureScreenshot", captureBeyondViewport=True)
                seen.screenshots.append(base64.b64decode(shot["data"]))
            reader.cancel()
    return seen


class _Tab:
    """One open page."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse, seen: Visit) -> None:
        self.loaded = asyncio.Event()
        self._socket, self._seen = socket, seen
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        number = len(self._answers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        return await self._answers[number]

    async def read(self) -> None:
        async for message in self._socket:
            event = message.json()
            if "id" in event:
                assert "error" not in event, event
                self._answers[event["id"]].set_result(event["result"])
                continue
            params = event["params"]
            if event["method"] == "Network.requestWillBeSent":
                self._seen.requests.append(params["request"]["url"])
            elif event["method"] == "Page.loadEventFired":
                self.loaded.set()
            elif event["method"] == "Page.javascriptDialogOpening":
                self._seen.dialogs.append(params["message"])
                self._closing = asyncio.create_task(self.call("Page.handleJavaScriptDialog", accept=True))
            elif event["method"] == "Log.entryAdded":
                self._seen.complaints.append(params["entry"]["text"])
            elif event["method"] == "Runtime.consoleAPICalled":
                self._seen.complaints.append(str(params["args"]))
