"""`job.json`: the identity of a dataset, and `plan/GGGG.json`: what a later generation adds to it.

Each is create-only and names the hash of its plan; without job.json there is no dataset yet."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from schemas.jobspec import JobSpec
from schemas.tokenfile import FORMAT_VERSION


class TokenizerRecord(BaseModel):
    """The tokenizer that made the tokens."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str
    """As the user named it."""
    config: dict[str, Any]
    """Its whole `config.json`."""
    weight_sha256: str
    folder: str
    """Where its copy lies in the dataset: `tokenizer/9f3c01ab`."""
    bits: int
    group_size: int
    patch_size: int
    grid: tuple[int, int]
    """Rows and columns of tokens in one frame."""


class Job(BaseModel):
    """What a dataset is, and the settings that its tokens were made with."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: str = "bsqtok"
    format_version: int = FORMAT_VERSION
    fingerprint: str
    fingerprint_fields: dict[str, Any]
    """What the fingerprint is a hash of, so that a refusal can name what differs."""
    spec: JobSpec
    """Resolved, without credentials."""
    tokenizer: TokenizerRecord
    plan_sha256: str
    created_by: str


GenerationKind = Literal["tokenize", "append", "retry", "retry-samples", "retry-damaged"]


class GenerationRecord(BaseModel):
    """What one generation does to the dataset, and with which settings; generation 0 is in job.json instead."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: str = "bsqtok"
    format_version: int = FORMAT_VERSION
    fingerprint: str
    generation: int
    kind: GenerationKind
    """tokenize: generation 0.  append: shards that were not in the dataset.  retry: shards that failed, whole.
    retry-samples, retry-damaged: what is missing of committed shards."""
    spec: JobSpec
    """Resolved, without credentials.  Fields that change no bits may differ from those of other generations."""
    plan_sha256: str
    created_by: str

    @property
    def part(self) -> int:
        """The part that a commit of this generation is: 0 for whole shards, else the generation's number."""
        return self.generation if self.kind in ("retry-samples", "retry-damaged") else 0
