"""What a generator of tokens is, as plain data.  Standard library only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from schemas.errors import SpecError, nearest_name, printable
from tokenizer.config import (
    MAX_BITS_PER_TOKEN,
    MAX_GROUP_SIZE,
    TransformerConfig,
    known_fields,
    require_bool,
    require_int,
)
from tokenizer.prior_config import MAX_GRID_SIDE

MAX_CLASSES = 65_536
MAX_NAME_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig:
    """Everything that a `MaskedTokenModel` is, except its weights."""

    preset: str = "custom"
    """Name under which the sizes were chosen; it changes nothing."""
    bits_per_token: int = 18
    """L: bits of one token."""
    group_size: int = 9
    """Bits of a symbol; divides `bits_per_token`."""
    grid: tuple[int, int] = (16, 16)
    """Rows and columns of tokens in one frame."""
    classes: tuple[str, ...] = ()
    """Names of labels 0, 1, ...; empty where it knows none."""
    width: int = 256
    """Channels of a token inside the transformer."""
    layers: int = 8
    heads: int = 4
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, as a multiple of `width`."""
    tokenizer_sha256: str = ""
    """Weight hash of the tokenizer whose tokens it makes; empty before it is trained."""
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
        check_classes(self.classes)
        # Checks the sizes.
        _ = self.transformer

    @property
    def transformer(self) -> TransformerConfig:
        """The sizes of the blocks."""
        return TransformerConfig(width=self.width, layers=self.layers, heads=self.heads, mlp_ratio=self.mlp_ratio)

    @property
    def num_groups(self) -> int:
        """Symbols of a token."""
        return self.bits_per_token // self.group_size

    @property
    def num_tokens(self) -> int:
        """Tokens of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def no_label(self) -> int:
        """Stands for no label."""
        return len(self.classes)

    def label(self, name: str) -> int:
        """The label of a class.  Raises SpecError naming the nearest class."""
        if name not in self.classes:
            if not self.classes:
                raise SpecError(f"There is no class {printable(name)!r}: these weights know none. Leave the label out.")
            shown = ", ".join(self.classes[:20]) + (" ..." if len(self.classes) > 20 else "")
            raise SpecError(
                f"There is no class {printable(name)!r}.{nearest_name(name, self.classes)} The classes are {shown}."
            )
        return self.classes.index(name)

    def to_json_dict(self) -> dict[str, Any]:
        """The config as JSON types; `from_json_dict` reads it back equal."""
        lists = {"grid": list(self.grid), "classes": list(self.classes)}
        return {"model": "generator", **dataclasses.asdict(self), **lists}

    @classmethod
    def from_json_dict(cls, values: object) -> GeneratorConfig:
        """Read what `to_json_dict` wrote.  Raises SpecError naming an unknown or impossible value."""
        if not isinstance(values, dict) or values.get("model") != "generator":
            raise SpecError("this is no config of a generator of tokens.")
        given = {name: value for name, value in values.items() if name != "model"}
        fields = known_fields(cls, given, "generator config")
        for name in ("grid", "classes"):
            if isinstance(fields.get(name), list):
                fields[name] = tuple(fields[name])
        return cls(**fields)


def check_classes(classes: object) -> None:
    """Raise SpecError unless `classes` is a tuple of names, all different."""
    if not isinstance(classes, tuple) or len(classes) > MAX_CLASSES:
        raise SpecError(f"classes must be a list of at most {MAX_CLASSES:,} names.")
    for name in classes:
        if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME_CHARACTERS or not name.isprintable():
            raise SpecError(
                f"classes has {str(name)[:40]!r}; a name is text of 1 to {MAX_NAME_CHARACTERS} letters that can be "
                "printed."
            )
    if len(set(classes)) < len(classes):
        twice = next(name for number, name in enumerate(classes) if name in classes[:number])
        raise SpecError(f"classes names {twice!r} twice.")


PRESETS: dict[str, GeneratorConfig] = {
    config.preset: config
    for config in (
        # 6.7 M parameters, 13.3 MB in fp16.
        GeneratorConfig(preset="generator-small"),
        # For tests.
        GeneratorConfig(preset="generator-tiny", width=32, layers=2, heads=2),
    )
}


def generator_preset(name: str) -> GeneratorConfig:
    """The sizes of a named preset, untrained.  Raises SpecError naming the nearest preset."""
    if name not in PRESETS:
        raise SpecError(f"There is no generator {name!r}; valid: {', '.join(PRESETS)}.{nearest_name(name, PRESETS)}")
    return PRESETS[name]
