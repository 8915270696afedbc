"""Generations: the first run of a dataset, and every later one that adds shards or wins back what had failed.

A generation has a plan of its own, a ledger of its own, and in the end a manifest that lists everything valid then."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from pipeline.dataset_files import (
    GENERATION_FILE,
    generation_name,
    plan_name,
    read_plan,
    read_plan_bytes,
    read_required,
)
from pipeline.storage import Storage
from schemas.errors import BsqError
from schemas.job import GenerationKind, GenerationRecord, Job

_COMMAND_OF_KIND = {
    "tokenize": "bsq tokenize",
    "append": "bsq tokenize --append",
    "retry": "bsq retry",
    "retry-samples": "bsq retry --samples",
    "retry-damaged": "bsq retry --damaged",
}


def list_begun(storage: Storage) -> list[int]:
    """Generations that were begun, ascending: 0, and those that wrote down what they do."""
    return [0, *sorted(int(match[1]) for name in storage.list("plan") if (match := GENERATION_FILE.match(name)))]


def read_generation(storage: Storage, job: Job, generation: int) -> GenerationRecord:
    """What a generation that was begun does.  Raises BsqError when its record is missing or damaged."""
    if generation == 0:
        return GenerationRecord(
            fingerprint=job.fingerprint,
            generation=0,
            kind="tokenize",
            spec=job.spec,
            plan_sha256=job.plan_sha256,
            created_by=job.created_by,
        )
    name = generation_name(generation)
    try:
        record = GenerationRecord.model_validate_json(read_required(storage, name))
    except ValidationError as error:
        raise BsqError(f"{storage.printable(name)}: no generation of bsqtok. Restore it from a copy.") from error
    if (record.fingerprint, record.generation) != (job.fingerprint, generation):
        raise BsqError(f"{storage.printable(name)}: belongs to another dataset or generation. Restore it from a copy.")
    return record


def command_of(kind: GenerationKind) -> str:
    """The command that begins such a generation, without its arguments."""
    return _COMMAND_OF_KIND[kind]


class Plan:
    """The shards of one or several plans by number; where a shard stands in several, the later plan counts."""

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        numbers = np.concatenate([np.zeros(0, np.int64), *(table["shard"].to_numpy() for table in tables)])
        order = np.argsort(numbers, kind="stable")
        last = np.append(numbers[order][1:] != numbers[order][:-1], np.ones(min(1, len(order)), np.bool_))
        self._places = order[last]
        self.shards: npt.NDArray[np.int64] = numbers[self._places]
        """Ascending, each once."""
        # Numbered one by one in one plan, as nearly all are: then a shard's place needs no search.
        num_steps = int(self.shards[-1] - self.shards[0]) + 1 if len(self.shards) else 0
        self._is_range = len(tables) == 1 and num_steps == len(self.shards) > 0
        self._is_range = self._is_range and np.array_equal(self._places, np.arange(len(numbers)))
        self._urls = pa.chunked_array([chunk for table in tables for chunk in table["url"].chunks], pa.string())

    @classmethod
    def of(cls, shards: Sequence[int], urls: Sequence[str]) -> Plan:
        """A plan of these shards with these URLs."""
        return cls([pa.table({"shard": pa.array(shards, pa.int64()), "url": pa.array(urls, pa.string())})])

    def select(self, shards: Sequence[int]) -> Plan:
        """Some of its shards."""
        return Plan.of(shards, [self.url(shard) for shard in shards])

    def __len__(self) -> int:
        return len(self.shards)

    def __contains__(self, shard: int) -> bool:
        return self._place(shard) is not None

    def url(self, shard: int) -> str:
        """The URL of a shard, without credentials; empty where the shard is in no plan."""
        place = self._place(shard)
        return "" if place is None else str(self._urls[place].as_py())

    def urls(self) -> list[str]:
        """The URLs of all shards, in the order of `shards`."""
        urls: list[str] = self._urls.take(pa.array(self._places)).to_pylist()
        return urls

    def shards_with(self, text: str) -> list[int]:
        """The shards whose URL contains `text`."""
        found = np.asarray(pc.match_substring(self._urls, text))[self._places]
        shards: list[int] = self.shards[found].tolist()
        return shards

    def find(self, urls: Sequence[str]) -> dict[str, int]:
        """The numbers of those of `urls` that are in the plan."""
        own = self._urls.combine_chunks().take(pa.array(self._places))
        places = pc.index_in(pa.array(urls, pa.string()), value_set=own).to_pylist()
        return {url: int(self.shards[place]) for url, place in zip(urls, places, strict=True) if place is not None}

    def _place(self, shard: int) -> int | None:
        if self._is_range:
            place = shard - int(self.shards[0])
            return place if 0 <= place < len(self.shards) else None
        place = int(np.searchsorted(self.shards, shard))
        return int(self._places[place]) if place < len(self.shards) and self.shards[place] == shard else None


def read_plans(storage: Storage, generations: Iterable[int]) -> Plan:
    """The plans of several generations as one.  Raises BsqError when one is missing or damaged."""
    return Plan([read_plan(storage, generation) for generation in generations])


def read_begun_plan(storage: Storage, record: GenerationRecord) -> Plan:
    """The plan that a generation was begun with.  Raises BsqError when it is missing, damaged, or another one."""
    name = plan_name(record.generation)
    if hashlib.sha256(read_plan_bytes(storage, record.generation)).hexdigest() != record.plan_sha256:
        raise BsqError(
            f"{storage.printable(name)}: not the plan that the generation was begun with (its SHA-256 differs). "
            f"Restore it from a copy."
        )
    return read_plans(storage, [record.generation])
