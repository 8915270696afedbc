"""What a prior over tokens is, as plain data.  Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from schemas.errors import SpecError, nearest_name
from tokenizer.config import (
    MAX_BITS_PER_TOKEN,
    MAX_FRAMES,
    MAX_GROUP_SIZE,
    MAX_LAYERS,
    MAX_WIDTH,
    known_fields,
    require_bool,
    require_float,
    require_int,
)

MAX_GRID_SIDE = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorConfig:
    """Everything that a `TokenPrior` is, except its weights."""

    preset: str = "custom"
    """Name under which the sizes were chosen; it changes nothing."""
    bits_per_token: int = 18
    """L: bits of one token."""
    group_size: int = 9
    """Bits of a symbol; divides `bits_per_token`."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of tokens in one frame."""
    max_frames: int = 16
    """The most frames of a clip."""
    context_frames: int = 2
    """A token is predicted from the tokens before it, as many as so many frames hold."""
    width: int = 256
    """Channels of a token inside the transformer."""
    layers: int = 6
    heads: int = 4
    """Heads of queries; keys and values have one head, so that the cache is small."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, as a multiple of `width`."""
    head_width: int = 256
    """Hidden width of the head that predicts one group after another."""
    tokenizer_sha256: str = ""
    """Weight hash of the tokenizer whose tokens it predicts; empty before it is trained."""
    trained: bool = False
    """False where the weights are random."""

    def __post_init__(self) -> None:
        require_int("bits_per_token", self.bits_per_token, 1, MAX_BITS_PER_TOKEN)
        require_int("group_size", self.group_size, 1, MAX_GROUP_SIZE)
        if not isinstance(self.grid, tuple) or len(self.grid) != 2:
            raise SpecError(f"grid is {self.grid!r}; it must be two numbers, rows and columns.")
        for side in self.grid:
            require_int("grid", side, 1, MAX_GRID_SIDE)
        require_int("max_frames", self.max_frames, 1, MAX_FRAMES)
        require_int("context_frames", self.context_frames, 1, MAX_FRAMES)
        require_int("width", self.width, 1, MAX_WIDTH)
        require_int("layers", self.layers, 1, MAX_LAYERS)
        require_int("heads", self.heads, 1, self.width)
        require_int("head_width", self.head_width, 1, MAX_WIDTH)
        require_float("mlp_ratio", self.mlp_ratio)
        require_bool("trained", self.trained)
        if self.bits_per_token % self.group_size:
            raise SpecError(
                f"bits_per_token is {self.bits_per_token}, not a multiple of group_size, {self.group_size}."
            )
        if self.width % self.heads:
            raise SpecError(f"width is {self.width}, not a multiple of heads, {self.heads}.")
        if not 1 <= self.mlp_width <= 16 * MAX_WIDTH:
            raise SpecError(f"mlp_ratio is {self.mlp_ratio}; width {self.width} times it must be at least 1.")
        if not isinstance(self.preset, str) or not isinstance(self.tokenizer_sha256, str):
            raise SpecError("preset and tokenizer_sha256 are texts.")

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def num_groups(self) -> int:
        """Symbols of a token."""
        return self.bits_per_token // self.group_size

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def context_tokens(self) -> int:
        """Tokens that one of them is predicted from, at most."""
        return self.context_frames * self.tokens_per_frame

    def to_json_dict(self) -> dict[str, Any]:
        """The config as JSON types; `from_json_dict` reads it back equal."""
        return {"model": "prior", **dataclasses.asdict(self), "grid": list(self.grid)}

    @classmethod
    def from_json_dict(cls, values: object) -> PriorConfig:
        """Read what `to_json_dict` wrote.  Raises SpecError naming an unknown or impossible value."""
        if not isinstance(values, dict) or values.get("model") != "prior":
            raise SpecError("this is no config of a prior over tokens.")
        fields = known_fields(cls, {name: value for name, value in values.items() if name != "model"}, "prior config")
        if isinstance(fields.get("grid"), list):
            fields["grid"] = tuple(fields["grid"])
        return cls(**fields)


PRESETS: dict[str, PriorConfig] = {
    config.preset: config
    for config in (
        # 4.7 M parameters, 9.4 MB in fp16: codes 2,000 tokens/s on two CPU cores.
        PriorConfig(preset="prior-small"),
        # For tests.
        PriorConfig(preset="prior-tiny", width=32, layers=2, heads=2, head_width=32),
    )
}


def prior_preset(name: str) -> PriorConfig:
    """The sizes of a named preset, untrained.  Raises SpecError naming the nearest preset."""
    if name not in PRESETS:
        raise SpecError(f"There is no prior {name!r}; valid: {', '.join(PRESETS)}.{nearest_name(name, PRESETS)}")
    return PRESETS[name]
