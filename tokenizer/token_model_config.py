"""What every model over tokens is, as plain data.  Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from schemas.errors import SpecError
from tokenizer.config import (
    MAX_BITS_PER_TOKEN,
    MAX_GROUP_SIZE,
    known_fields,
    require_bool,
    require_int,
)

MAX_GRID_SIDE = 255


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenModelConfig:
    """The tokens that a model knows, and the sizes of its transformer."""

    model: ClassVar[str]
    """Which kind of model it is."""

    preset: str = "custom"
    """Name under which the sizes were chosen; it changes nothing."""
    bits_per_token: int = 18
    """L: bits of one token."""
    group_size: int = 9
    """Bits of a symbol; divides `bits_per_token`."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of tokens in one frame."""
    width: int = 256
    """Channels of a token inside the transformer."""
    layers: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, as a multiple of `width`."""
    tokenizer_sha256: str = ""
    """Weight hash of the tokenizer whose tokens they are; empty before it is trained."""
    trained: bool = False
    """False where the weights are random."""

    def __post_init__(self) -> None:
        require_int("bits_per_token", self.bits_per_token, 1, MAX_BITS_PER_TOKEN)
        require_int("group_size", self.group_size, 1, MAX_GROUP_SIZE)
        if not isinstance(self.grid, tuple) or len(self.grid) != 2:
            raise SpecError(f"grid is {self.grid!r}; it must be two numbers, rows and columns.")
        for side in self.grid:
            require_int("grid", side, 1, MAX_GRID_SIDE)
        if self.bits_per_token % self.group_size:
            raise SpecError(
                f"bits_per_token is {self.bits_per_token}, not a multiple of group_size, {self.group_size}."
            )
        require_bool("trained", self.trained)
        if not isinstance(self.preset, str) or not isinstance(self.tokenizer_sha256, str):
            raise SpecError("preset and tokenizer_sha256 are texts.")

    @property
    def num_groups(self) -> int:
        """Symbols of a token."""
        return self.bits_per_token // self.group_size

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    def to_json_dict(self) -> dict[str, Any]:
        """The config as JSON types; `from_json_dict` reads it back equal."""
        values = dataclasses.asdict(self)
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return {"model": self.model, **values, **lists}

    @classmethod
    def from_json_dict(cls, values: object) -> Self:
        """Read what `to_json_dict` wrote.  Raises SpecError naming an unknown or impossible value."""
        if not isinstance(values, dict) or values.get("model") != cls.model:
            raise SpecError(f"this is no config of a {cls.model} of tokens.")
        given = {name: value for name, value in values.items() if name != "model"}
        fields = known_fields(cls, given, f"{cls.model} config")
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**fields)
