"""A Ray cluster of its own for tests: a head with dashboard on free ports, in an environment without bsqtok."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

START_SECONDS = 120.0
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "5" * 64}
"""Environment of whoever may talk to the cluster."""


_QUICK_CHECKS = {
    "health_check_initial_delay_ms": 500,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 4,
}
"""A node that died is noticed within seconds."""


@dataclass
class RayCluster:
    """A head, and nodes that joined it."""

    python: Path
    folder: Path
    port: int
    dashboard_port: int
    metrics_port: int
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    def start_node(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_metrics_report_interval_ms": "500", **TOKEN}
        # As in an environment that was activated: jobs run the `python` that is found first.
        environment["PATH"] = f"{self.python.parent}{os.pathsep}{environment['PATH']}"
        with (self.folder / f"node-{len(self.nodes)}.log").open("wb") as log:
            node = subprocess.Popen(
                [self.python, "-m", "ray.scripts.scripts", "start", *arguments, "--block"],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.folder,
                start_new_session=True,
            )
        self.nodes.append(node)
        return node

    def metrics(self) -> dict[str, float]:
        """What Prometheus would read from the head: `name{labels}` to its value."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        found = re.findall(r"^(\w+(?:\{[^}]*\})?) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}


@contextlib.contextmanager
def ray_cluster(*, num_cpus: int = 2) -> Iterator[RayCluster]:
    """Start a head and wait for its dashboard; everything it started is gone afterwards."""
    # Not pytest's folder: sockets lie in it, and their names must be short.
    with tempfile.TemporaryDirectory(prefix="bsqray-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        port, dashboard, metrics = free_port(), free_port(), free_port()
        cluster = RayCluster(bare_environment(folder / "env"), folder, port, dashboard, metrics)
        try:
            cluster.start_node(
                *("--head", "--node-ip-address=127.0.0.1", f"--port={port}", f"--num-cpus={num_cpus}", "--num-gpus=0"),
                *("--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                *(f"--metrics-export-port={metrics}", f"--temp-dir={folder}", "--object-store-memory=100000000"),
            )
            for url in (f"{cluster.dashboard}/api/version", f"http://127.0.0.1:{metrics}/metrics"):
                wait_for_answer(url, folder / "node-0.log")
            yield cluster
        finally:
            for node in cluster.nodes:
                node.terminate()
            for node in cluster.nodes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    node.wait(20)
            kill_all_that_name(str(folder))


@contextlib.contextmanager
def ray_nodes() -> Iterator[Any]:
    """A head that has no CPU for workers, to be joined by nodes, each with a raylet of its own on this machine."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "object_store_memory": 80 << 20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={**head, "_system_config": _QUICK_CHECKS})
    try:
        yield cluster
    finally:
        cluster.shutdown()


def raylet(node: Any) -> int:
    """The process of such a node that all its others descend from."""
    (process,) = node.all_processes["raylet"]
    return int(process.process.pid)


def bare_environment(folder: Path) -> Path:
    """A small virtual environment that sees the packages of this one, but not bsqtok; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Paths that a .pth file names are searched, but their own .pth files, that of bsqtok among them, are not read.
    (packages / "parent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return folder / "bin" / "python"


def free_port() -> int:
    """A port that is free, and that no process is given which asks for any."""
    while True:
        port = random.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def wait_for_answer(url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN['RAY_AUTH_TOKEN']}"})
        with contextlib.suppress(OSError):
            urllib.request.urlopen(request, timeout=5).close()
            return
        assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
        time.sleep(0.2)


def kill_all_that_name(folder: str) -> None:
    """End processes whose command line or environment names the folder: those of its cluster."""
    for process in Path("/proc").iterdir():
        if not process.name.isdecimal() or int(process.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if folder.encode() in (process / "cmdline").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)
