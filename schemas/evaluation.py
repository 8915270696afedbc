"""`evaluation.json`: how well a tokenizer reconstructs, and codecs beside it at equal bytes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

EVALUATION_FORMAT_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpreadRecord(_Record):
    """A number over items: pictures, or clips, of which each is the mean over its frames."""

    mean: float
    std: float
    least: float
    p05: float
    median: float
    p95: float
    most: float


class MethodRecord(_Record):
    """One way to make pictures again, and how close they come."""

    method: str
    """`tokens`, or the name of a codec."""
    description: str
    equal: Literal["payload", "file"] | None = None
    """Which bytes of a codec come nearest to those of the tokens; null for the tokens."""
    filter: str
    """How the originals were resized: numbers of another filter are other numbers."""
    payload_bytes_per_frame: float
    """Mean bytes that carry the picture; of the tokens all."""
    file_bytes_per_frame: float
    payload_bits_per_pixel: float
    file_bits_per_pixel: float
    measures: dict[str, SpreadRecord]
    """`psnr` (dB), `ssim`, `ms_ssim` or `ms_ssim_w7`, the same in dB, `lpips`; of pixels rounded to 8 bits."""
    frechet: dict[str, float]
    """`rfid` of pictures, `rfvd` of clips; only where their weights were given."""


class GroupRecord(_Record):
    """How much of the codes of one group of bits occurs."""

    codes: int
    used: int
    entropy_bits: float


class CodesRecord(_Record):
    """What the tokens use of their codebook."""

    tokens: int
    channel_entropy_bits: list[float]
    """Of each channel, at most 1."""
    least_channel_entropy_bits: float
    groups: list[GroupRecord]


class ItemRecord(_Record):
    """The measures of one item by the tokens."""

    shard: int
    key: str
    clip: int
    frames: int
    measures: dict[str, float]


class KindRecord(_Record):
    """The results on pictures, or on clips."""

    kind: Literal["images", "clips"]
    items: int
    frames: int
    methods: list[MethodRecord]
    """The tokens first."""
    codes: CodesRecord
    picture: str | None
    """File with the best, median and worst items beside their originals."""
    per_item: list[ItemRecord]


class TokenizerSummary(_Record):
    """The tokenizer that was measured."""

    name: str
    """As the user named it."""
    weight_sha256: str
    config: dict[str, Any]
    """Its whole `config.json`."""


class EvaluationReport(_Record):
    """The whole file."""

    format: Literal["bsqtok-evaluation"] = "bsqtok-evaluation"
    format_version: int = EVALUATION_FORMAT_VERSION
    created_by: str
    tokenizer: TokenizerSummary
    shards: list[str]
    """Without credentials."""
    crop: str
    filter: str
    engine: str
    fps: float | Literal["source"]
    clip_frames: int
    clips_per_video: int
    limit: int | None
    """The most pictures, and the most videos, that were read."""
    arithmetic: dict[str, str]
    """Device, dtype and versions."""
    networks: dict[str, str]
    """Files that the feature networks were read from, by measure."""
    left_out: int
    """Samples and shards that could not be read."""
    results: list[KindRecord]
