"""What a prior over tokens is, as plain data.  Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.errors import SpecError, nearest_name
from tokenizer.config import MAX_FRAMES, MAX_LAYERS, MAX_WIDTH, require_float, require_int
from tokenizer.token_model_config import TokenModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PriorConfig(TokenModelConfig):
    """Everything that a `TokenPrior` is, except its weights."""

    model = "prior"

    max_frames: int = 16
    """The most frames of a clip."""
    context_frames: int = 2
    """A token is predicted from the tokens before it, as many as so many frames hold."""
    heads: int = 4
    """Heads of queries; keys and values have one head, so that the cache is small."""
    head_width: int = 256
    """Hidden width of the head that predicts one group after another."""

    def __post_init__(self) -> None:
        TokenModelConfig.__post_init__(self)
        require_int("max_frames", self.max_frames, 1, MAX_FRAMES)
        require_int("context_frames", self.context_frames, 1, MAX_FRAMES)
        require_int("width", self.width, 1, MAX_WIDTH)
        require_int("layers", self.layers, 1, MAX_LAYERS)
        require_int("heads", self.heads, 1, self.width)
        require_int("head_width", self.head_width, 1, MAX_WIDTH)
        require_float("mlp_ratio", self.mlp_ratio)
        if self.width % self.heads:
            raise SpecError(f"width is {self.width}, not a multiple of heads, {self.heads}.")
        if not 1 <= self.mlp_width <= 16 * MAX_WIDTH:
            raise SpecError(f"mlp_ratio is {self.mlp_ratio}; width {self.width} times it must be at least 1.")

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def context_tokens(self) -> int:
        """Tokens that one of them is predicted from, at most."""
        return self.context_frames * self.tokens_per_frame


PRESETS: dict[str, PriorConfig] = {
    config.preset: config
    for config in (
        # 4.6 M parameters, 9.3 MB in fp16: codes 3,500 tokens/s on two CPU cores.
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
