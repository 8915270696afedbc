"""A running job as metrics of Ray, which its nodes offer to Prometheus under the names given here with `ray_` before.

All of it comes from what workers tell the driver anyway: heartbeats and commits.  Where Ray is installed without its
dashboard the numbers go nowhere, and the job is none the worse."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from pipeline.messages import Heartbeat, ShardCommitted
from schemas.lease import Progress

INTERVAL_SECONDS = 2.0
"""How often the gauges of one worker are set, and over how long its idle shares are measured."""


class JobMetrics:
    """Counts what a driver hears.  Ray must have been started or joined."""

    def __init__(self, dataset: str) -> None:
        """`dataset` is the output's URL without credentials; every number carries it."""
        self._dataset = dataset
        self._samples = self._counter("bsq_samples", "Samples of committed shards, tokenized or failed.")
        self._tokens = self._counter("bsq_tokens", "Tokens of committed shards.")
        self._decoded = self._counter("bsq_samples_decoded", "Samples decoded, whether committed yet or not.", "worker")
        self._encoded = self._counter("bsq_tokens_encoded", "Tokens encoded, whether committed yet or not.", "worker")
        self._bytes = self._counter("bsq_source_bytes", "Bytes of committed shards.")
        self._failures = self._counter(
            "bsq_failures",
            "Failures by class; scope is sample, attempt or shard (given up).",
            "scope error",
        )
        self._stages = self._counter(
            "bsq_stage_seconds", "Seconds of committed shards in read, decode, encode and write, over threads.", "stage"
        )
        self._shards = self._gauge("bsq_shards", "Shards by state: planned, committed or failed.", "state")
        self._queues = self._gauge(
            "bsq_queue_bytes", "Bytes that wait: undecoded members, and batches for the device.", "worker queue"
        )
        self._idle = self._gauge("bsq_device_idle_fraction", "Share of its time that the device waits.", "worker")
        self._blocked = self._gauge("bsq_decode_wait_fraction", "Share of their time that decoders wait.", "worker")
        self._heard: dict[str, tuple[float, Heartbeat]] = {}

    def heard(self, worker: str, heartbeat: Heartbeat) -> None:
        """Take the heartbeat of a worker; one whose clock went back is a new process in its place."""
        now = time.monotonic()
        before, last = self._heard.get(worker, (0.0, None))
        if last is not None and heartbeat.seconds < last.seconds:
            last = None
        elif now - before < INTERVAL_SECONDS:
            return
        self._heard[worker] = (now, heartbeat)
        self._add(self._decoded, heartbeat.samples - (last.samples if last else 0), worker=worker)
        self._add(self._encoded, heartbeat.tokens - (last.tokens if last else 0), worker=worker)
        seconds = heartbeat.seconds - (last.seconds if last else 0.0)
        if seconds > 0:
            waited = heartbeat.device_wait_seconds - (last.device_wait_seconds if last else 0.0)
            self._set(self._idle, min(1.0, waited / seconds / heartbeat.num_lanes), worker=worker)
            waited = heartbeat.decode_wait_seconds - (last.decode_wait_seconds if last else 0.0)
            self._set(self._blocked, min(1.0, waited / seconds / heartbeat.num_decoders), worker=worker)
        self._set(self._queues, heartbeat.waiting_bytes, worker=worker, queue="undecoded")
        self._set(self._queues, heartbeat.batched_bytes, worker=worker, queue="batches")

    def committed(self, message: ShardCommitted) -> None:
        """Take a shard that a worker has published."""
        commit = message.commit
        self._add(self._samples, commit.samples)
        self._add(self._tokens, commit.tokens)
        self._add(self._bytes, commit.source.bytes)
        for stage in ("read", "decode", "encode", "write"):
            self._add(self._stages, getattr(commit.seconds, stage), stage=stage)
        for error, count in message.failures.items():
            self._add(self._failures, count, scope="sample", error=error)

    def attempt_failed(self, error: str, *, gave_up: bool) -> None:
        """Take a failed attempt at a shard, after which it may have been given up."""
        self._add(self._failures, 1, scope="attempt", error=error)
        if gave_up:
            self._add(self._failures, 1, scope="shard", error=error)

    def progressed(self, progress: Progress) -> None:
        """Take how far the job is."""
        self._set(self._shards, progress.shards, state="planned")
        self._set(self._shards, progress.committed, state="committed")
        self._set(self._shards, progress.failed_shards, state="failed")

    def _counter(self, name: str, description: str, tags: str = "") -> Counter:
        return Counter(name, description, ("dataset", *tags.split()))

    def _gauge(self, name: str, description: str, tags: str = "") -> Gauge:
        return Gauge(name, description, ("dataset", *tags.split()))

    def _add(self, counter: Counter, value: float, **tags: str) -> None:
        if value > 0:
            counter.inc(value, self._tags(tags))

    def _set(self, gauge: Gauge, value: float, **tags: str) -> None:
        gauge.set(value, self._tags(tags))

    def _tags(self, tags: Mapping[str, str]) -> dict[str, str]:
        return {"dataset": self._dataset, **tags}
