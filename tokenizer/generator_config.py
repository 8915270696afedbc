"""What a generator of tokens is, as plain data.  Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.errors import SpecError, nearest_name, printable
from tokenizer.config import TransformerConfig
from tokenizer.token_model_config import TokenModelConfig

MAX_CLASSES = 65_536
MAX_NAME_CHARACTERS = 200


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratorConfig(TokenModelConfig):
    """Everything that a `MaskedTokenModel` is, except its weights."""

    model = "generator"

    classes: tuple[str, ...] = ()
    """Names of labels 0, 1, ...; empty where it knows none."""
    layers: int = 8

    def __post_init__(self) -> None:
        TokenModelConfig.__post_init__(self)
        check_classes(self.classes)
        # Checks the sizes.
        _ = self.transformer

    @property
    def transformer(self) -> TransformerConfig:
        """The sizes of the blocks."""
        return TransformerConfig(width=self.width, layers=self.layers, heads=self.heads, mlp_ratio=self.mlp_ratio)

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
