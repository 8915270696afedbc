"""What a tokenizer is, as plain data: sizes, conventions, loss weights, and the named presets.

Standard library only, so that a driver can read a checkpoint's config without loading torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from schemas.errors import SpecError, nearest_name

EntropyKind = Literal["bit", "group"]
StraightThrough = Literal["scaled", "identity"]

MAX_BITS_PER_TOKEN = 64
"""A token's bits fit one 64-bit word of the packed form."""
MAX_GROUP_SIZE = 16
"""The grouped entropy holds 2^group_size probabilities per group and token."""
MAX_IMAGE_SIZE_PX = 4096
MAX_WIDTH = 16_384
MAX_LAYERS = 256
MAX_FRAMES = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Size of one half of the model, the encoder or the decoder."""

    width: int
    """Channels of a token inside the transformer."""
    layers: int
    heads: int
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, as a multiple of `width`."""
    layer_scale: float | None = None
    """Initial value of a learned factor per channel on both branches of a block; None leaves the factor out."""
    ln_pre: bool = True
    """LayerNorm between the position embedding and the first block; the patch embedding has a bias only without it."""

    def __post_init__(self) -> None:
        require_int("width", self.width, 1, MAX_WIDTH)
        require_int("layers", self.layers, 1, MAX_LAYERS)
        require_int("heads", self.heads, 1, self.width)
        require_float("mlp_ratio", self.mlp_ratio)
        require_bool("ln_pre", self.ln_pre)
        if self.width % self.heads:
            raise SpecError(f"width is {self.width}, not a multiple of heads, {self.heads}.")
        if not 1 <= self.mlp_width <= 16 * MAX_WIDTH:
            raise SpecError(f"mlp_ratio is {self.mlp_ratio}; width {self.width} times it must be at least 1.")
        if self.layer_scale is not None:
            require_float("layer_scale", self.layer_scale)

    @property
    def mlp_width(self) -> int:
        """Hidden width of a block's MLP, rounded down as in the reference."""
        return int(self.width * self.mlp_ratio)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizerLossConfig:
    """Weights of beta * commit + zeta * (gamma0 * sample entropy - gamma * codebook entropy) / inv_temperature.

    The entropies are those of paper section 3.2, in nats. Only training looks at them."""

    beta: float = 0.0
    gamma0: float = 1.0
    gamma: float = 1.0
    zeta: float = 1.0
    inv_temperature: float = 1.0
    """The paper's temperature tau is twice this, as in the reference."""
    sample_entropy: EntropyKind = "bit"
    """Both kinds are the same number, for the bits of a token are independent; "group" takes 2^g / g times the work."""
    codebook_entropy: EntropyKind = "group"
    """"group": over the 2^g codes of each group; "bit": per channel, an upper bound of it."""
    straight_through: StraightThrough = "scaled"
    """Gradient of a code with respect to its latent: "scaled" is 1/sqrt(L), as in the reference; "identity" is 1."""

    def __post_init__(self) -> None:
        for name in ("beta", "gamma0", "gamma", "zeta", "inv_temperature"):
            require_float(name, getattr(self, name))
        if self.inv_temperature <= 0:
            raise SpecError(f"inv_temperature is {self.inv_temperature}; it must be above 0.")
        _require_one_of("sample_entropy", self.sample_entropy, get_args(EntropyKind))
        _require_one_of("codebook_entropy", self.codebook_entropy, get_args(EntropyKind))
        _require_one_of("straight_through", self.straight_through, get_args(StraightThrough))


REFERENCE_LOSSES: dict[str, dict[str, EntropyKind]] = {
    "analytical": {"sample_entropy": "bit", "codebook_entropy": "bit"},
    "group": {"sample_entropy": "group", "codebook_entropy": "group"},
}
"""What the reference computes for each value of its `persample_entropy_compute`: it decides both terms."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BSQViTConfig:
    """Everything that a BSQ-ViT is, except its weights."""

    preset: str = "custom"
    """Name under which the sizes were chosen; it changes nothing."""
    image_size: int
    """Height and width of a frame in pixels."""
    patch_size: int = 8
    max_frames: int = 1
    """The most frames of a clip; 1 makes an image tokenizer without temporal embedding."""
    bits_per_token: int = 18
    """L of the paper."""
    group_size: int = 9
    """Neighbouring bits that form one group; divides `bits_per_token`."""
    encoder: TransformerConfig
    decoder: TransformerConfig
    head_width: int | None = 3072
    """Hidden width of the decoder's tanh head; None makes the head one linear layer."""
    l2_norm: bool = True
    """Project latents onto the unit sphere."""
    post_q_l2_norm: bool = True
    """Codes are +-1/sqrt(L), on the unit sphere, instead of +-1."""
    clamp_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the pixels that the network sees and makes; callers always see [-1, 1]."""
    losses: QuantizerLossConfig = field(default_factory=QuantizerLossConfig)
    trained: bool = False
    """False where the weights are random."""

    def __post_init__(self) -> None:
        if not isinstance(self.preset, str):
            raise SpecError(f"preset is {self.preset!r}; it must be a name.")
        require_int("image_size", self.image_size, 1, MAX_IMAGE_SIZE_PX)
        require_int("patch_size", self.patch_size, 1, self.image_size)
        require_int("max_frames", self.max_frames, 1, MAX_FRAMES)
        require_int("bits_per_token", self.bits_per_token, 1, MAX_BITS_PER_TOKEN)
        require_int("group_size", self.group_size, 1, MAX_GROUP_SIZE)
        if self.head_width is not None:
            require_int("head_width", self.head_width, 1, 16 * MAX_WIDTH)
        for name in ("l2_norm", "post_q_l2_norm", "trained"):
            require_bool(name, getattr(self, name))
        if self.image_size % self.patch_size:
            raise SpecError(f"image_size is {self.image_size}, not a multiple of patch_size, {self.patch_size}.")
        if self.bits_per_token % self.group_size:
            raise SpecError(
                f"bits_per_token is {self.bits_per_token}, not a multiple of group_size, {self.group_size}."
            )
        if self.clamp_range not in ((-1.0, 1.0), (0.0, 1.0)):
            raise SpecError(f"clamp_range is {self.clamp_range}; it must be (-1, 1) or (0, 1).")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in one frame."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def patch_values(self) -> int:
        """Values of one patch: 3 channels of patch_size x patch_size pixels."""
        return 3 * self.patch_size * self.patch_size

    def to_json_dict(self) -> dict[str, Any]:
        """The config as JSON types; `from_json_dict` reads it back equal."""
        return {**dataclasses.asdict(self), "clamp_range": list(self.clamp_range)}

    @classmethod
    def from_json_dict(cls, values: object) -> BSQViTConfig:
        """Read what `to_json_dict` wrote. Raises SpecError naming an unknown, missing or impossible value."""
        fields = known_fields(cls, values, "tokenizer config")
        for half in ("encoder", "decoder"):
            fields[half] = TransformerConfig(**known_fields(TransformerConfig, fields[half], half))
        if "losses" in fields:
            fields["losses"] = QuantizerLossConfig(**known_fields(QuantizerLossConfig, fields["losses"], "losses"))
        if "clamp_range" in fields:
            fields["clamp_range"] = _pair("clamp_range", fields["clamp_range"])
        return cls(**fields)


def preset_config(name: str) -> BSQViTConfig:
    """The config of a named preset, untrained. Raises SpecError naming the nearest preset."""
    if name not in PRESETS:
        raise SpecError(f"There is no preset {name!r}; {_help(name, PRESETS)}")
    return PRESETS[name]


def _help(name: str, valid: Iterable[str]) -> str:
    names = list(valid)
    return f"valid: {', '.join(names)}.{nearest_name(name, names)}"


def known_fields(cls: type[Any], values: object, where: str) -> dict[str, Any]:
    """The values of a dataclass in JSON types.  Raises SpecError for a name that it lacks, or that is missing."""
    if not isinstance(values, dict):
        raise SpecError(f"{where}: expected an object with named values, found {type(values).__name__}.")
    known = {each.name: each for each in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise SpecError(f"{where}: unknown key {name!r}; {_help(str(name), known)}")
    for name, each in known.items():
        required = each.default is dataclasses.MISSING and each.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise SpecError(f"{where}: {name!r} is missing.")
    return dict(values)


def _pair(name: str, value: object) -> tuple[float, float]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise SpecError(f"{name} is {value!r}; it must be two numbers.")
    for each in value:
        require_float(name, each)
    return float(value[0]), float(value[1])


def require_int(name: str, value: object, least: int, most: int) -> None:
    """Raise SpecError unless `value` is a whole number from `least` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise SpecError(f"{name} is {value!r}; it must be a whole number from {least} to {most:,}.")


def require_float(name: str, value: object) -> None:
    """Raise SpecError unless `value` is a finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(f"{name} is {value!r}; it must be a finite number.")


def require_bool(name: str, value: object) -> None:
    """Raise SpecError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise SpecError(f"{name} is {value!r}; it must be true or false.")


def _require_one_of(name: str, value: object, valid: tuple[str, ...]) -> None:
    if value not in valid:
        raise SpecError(f"{name} is {value!r}; {_help(str(value), valid)}")


def _vit(preset: str, half: TransformerConfig, **sizes: Any) -> BSQViTConfig:
    return BSQViTConfig(preset=preset, encoder=half, decoder=half, **sizes)


_BASE = TransformerConfig(width=768, layers=12, heads=12)
_SMALL = TransformerConfig(width=192, layers=4, heads=3)
_TINY = TransformerConfig(width=64, layers=2, heads=2)

PRESETS: dict[str, BSQViTConfig] = {
    config.preset: config
    for config in (
        # The paper's models: images at 256 px, clips of 16 frames at 128 px.
        _vit("vit-b8-256-l18", _BASE, image_size=256, bits_per_token=18),
        _vit("vit-b8-256-l36", _BASE, image_size=256, bits_per_token=36),
        _vit("vit-b8-128-l18", _BASE, image_size=128, bits_per_token=18, max_frames=16),
        # Ours, which can be trained and run without a GPU: 4.0 M parameters, 8 MB in fp16.
        _vit("vit-small-128-l18", _SMALL, image_size=128, bits_per_token=18, max_frames=16, head_width=768),
        # For tests.
        _vit("vit-tiny-32-l18", _TINY, image_size=32, bits_per_token=18, max_frames=8, head_width=128),
    )
}
