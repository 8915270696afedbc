"""`job.json`: the identity of a dataset.  Written last when a job begins; without it there is nothing yet."""

from __future__ import annotations

from typing import Any

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
