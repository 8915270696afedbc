"""Who drives a job and how far it is: the one file of a dataset that changes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Progress(BaseModel):
    """How far a job is; what `bsq status` shows and the live display draws."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    shards: int = 0
    """Shards of the generation."""
    committed: int = 0
    failed_shards: int = 0
    partial_shards: int = 0
    samples: int = 0
    """Samples of committed shards, tokenized or failed."""
    failed_samples: int = 0
    poison_samples: int = 0
    """Those of `failed_samples` that ended or hung their decoder."""
    warnings: int = 0
    rows: int = 0
    tokens: int = 0
    bytes: int = 0
    """Bytes of token files."""
    seconds: float = 0.0
    """Since this driver began."""
    samples_per_second: float = 0.0
    """Samples encoded per second, over the last minute."""
    tokens_per_second: float = 0.0
    eta_seconds: float | None = None
    """None until there is something to estimate from."""
    workers: int = 0
    """Workers alive."""
    device_wait: float = 0.0
    """Share of its time that the device waited for a batch: high means that more CPUs would help."""
    decode_wait: float = 0.0
    """Share of their time that the decoders waited for a free batch: high means that more devices would help."""
    read_wait: float = 0.0
    """Share of the time in which nothing that was read waited for a decoder: high, beside a device that waits, means
    that storage is the limit."""


class Lease(BaseModel):
    """`lease.json`: rewritten by its owner every quarter of `ttl_seconds`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    owner: str
    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    process_started: str
    """Start time of the process as the kernel counts it; tells a reused pid apart."""
    ttl_seconds: float = 60.0
    progress: Progress = Progress()
