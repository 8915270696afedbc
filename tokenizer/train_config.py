"""What a training run is, as plain data, and the named recipes.  Standard library only."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin

from schemas.errors import SpecError, nearest_name
from tokenizer.config import BSQViTConfig, QuantizerLossConfig, preset_config

FREE_SETTINGS = {
    "recipe", "model.init_from", "losses.lpips_folder", "optimizer.steps", "run.device", "run.compile",
    "run.checkpoint_blocks", "run.log_every", "run.picture_every", "run.save_every", "run.validate_every",
    "run.keep_last", "run.dead_channel_bits",
}  # fmt: skip
"""What may differ between a run and its continuation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPart:
    """Which model is trained."""

    preset: str = "vit-small-128-l18"
    """Sizes to begin with."""
    init_from: str | None = None
    """Name, folder or URL of a tokenizer whose weights are the start; it decides the sizes then, not the preset."""
    image_size: int | None = None
    """Pixels; None: as in the preset.  With `init_from`, position embeddings are interpolated."""
    max_frames: int | None = None
    """Frames of a clip; None: as in the preset.  An image tokenizer continues with temporal embeddings of 0."""
    width: int | None = None
    """Of both halves; None, here and below: as in the preset."""
    layers: int | None = None
    heads: int | None = None
    head_width: int | None = None
    bits_per_token: int | None = None
    group_size: int | None = None
    decoder_layers: int | None = None
    """Of the decoder alone.  Layers beyond those of `init_from` begin as the identity."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossPart:
    """Weights of the losses; pixels go from -1 to 1."""

    transform_code: bool = False
    """Teach both halves a fixed transform code, each by itself, instead of each other; what judges reconstructions
    teaches the decoder, all other losses wait."""
    code_classes: int = 1
    """Classes of blocks of the transform code: more make a better code that takes longer to learn."""
    own_bits_from: float = 0.5
    """With `transform_code`, share of the steps after which the decoder is given the encoder's bits."""
    reconstruction: Literal["l1", "mse", "log_mse"] = "l1"
    """log_mse: the log of each picture's mean square, which is its PSNR."""
    reconstruction_weight: float = 1.0
    ms_ssim_weight: float = 0.0
    """Of 1 - MS-SSIM with a window of 7 taps."""
    lpips_weight: float = 0.1
    lpips_folder: str | None = None
    """Folder with vgg16.safetensors and lpips_vgg.safetensors."""
    adversarial_weight: float = 0.1
    adversarial_start: int = 0
    """Step from which the discriminator is trained and its loss counts."""
    r1_weight: float = 10.0
    r1_every: int = 16
    """Discriminator updates from one penalty to the next, which counts so many times as much."""
    entropy_weight: float = 0.1
    """Of the quantizer's losses together."""
    entropy_start: float = 3.0
    """Factor on `entropy_weight` at step 0; falls to 1 over `entropy_ramp_steps`."""
    entropy_ramp_steps: int = 2000
    quantizer: QuantizerLossConfig = field(default_factory=QuantizerLossConfig)


@dataclass(frozen=True, kw_only=True, slots=True)
class DiscriminatorPart:
    """The StyleGAN2-style discriminator; used where `losses.adversarial_weight` is not 0."""

    channels: int = 64
    """At full size."""
    max_channels: int = 512
    learning_rate_factor: float = 1.0
    """Its learning rate as a multiple of the tokenizer's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningPart:
    """The optimiser, its schedule, clipping and the moving average."""

    method: Literal["adamw", "muon"] = "adamw"
    """muon: the matrices of the transformers' blocks learn by Muon, the rest by AdamW."""
    steps: int = 1_000_000
    learning_rate: float = 4e-7
    """Peak; see `per_sample`."""
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 1e-4
    muon_momentum: float = 0.95
    muon_rate_factor: float = 2.0
    """Learning rate of Muon, whose updates are scaled to the size of AdamW's, as a multiple of AdamW's."""
    decay: Literal["matrices", "all"] = "matrices"
    """matrices: no decay on norms, biases and embeddings."""
    warmup_steps: int = 5000
    warmup_from: float = 0.1
    cosine_to: float = 0.5
    clip_norm: float = 1.0
    """Largest norm of all gradients together; 0 does not clip."""
    ema: float = 0.999
    """Decay of the moving average of the weights; 0 keeps the last weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerPart(LearningPart):
    """How the tokenizer and its discriminator learn."""

    learns: Literal["all", "decoder"] = "all"
    """decoder: the encoder stays as it is, and tokens with it; pictures of tokens that are stored become better."""
    batch_images: int = 32
    """Images in a batch of one process."""
    batch_clips: int = 2
    """Clips in a batch of one process."""
    per_sample: bool = True
    """Multiply the learning rate by the images of a batch over all processes, as the paper does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingPart:
    """How batches are drawn from pixels that are already decoded."""

    clip_share: float = 0.3
    """Share of batches that hold clips, where there are both."""
    crop_scale: tuple[float, float] = (0.8, 1.0)
    """Side of the crop as a share of the frame's short side; one side for a batch, a place for each sample."""
    flip: bool = True
    """Mirror half of the samples left to right."""
    colour_detail: float = 0.0
    """Share of samples whose colours are made as sharp as their brightness (tokenizer/colour_detail.py)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoopPart:
    """How the loop goes.  Only `seed` and `dtype` change numbers."""

    seed: int = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the transformers; auto is bfloat16 on GPUs that have it.  The quantizer is always float32."""
    device: str = "auto"
    log_every: int = 50
    picture_every: int = 1000
    save_every: int = 1000
    validate_every: int = 1000
    keep_last: int = 2
    """Training states that are kept, besides the best weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPart(LoopPart):
    """How the run of a tokenizer goes."""

    compile: bool = False
    """Use torch.compile for the tokenizer and the discriminator."""
    checkpoint_blocks: bool = False
    """Compute activations again in the backward pass: less memory for a third more work."""
    dead_channel_bits: float = 0.1
    """A channel whose bits have less entropy than this over a log interval is reported."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A whole run, except where its batches come from."""

    recipe: str = "paper"
    """Name of the recipe that the other values began with."""
    model: ModelPart = field(default_factory=ModelPart)
    losses: LossPart = field(default_factory=LossPart)
    discriminator: DiscriminatorPart = field(default_factory=DiscriminatorPart)
    optimizer: OptimizerPart = field(default_factory=OptimizerPart)
    sampling: SamplingPart = field(default_factory=SamplingPart)
    run: RunPart = field(default_factory=RunPart)

    def __post_init__(self) -> None:
        check_loop(self.optimizer, self.run)
        require_at_least(
            {
                "optimizer.batch_images": (self.optimizer.batch_images, 1),
                "optimizer.batch_clips": (self.optimizer.batch_clips, 1),
                "losses.r1_every": (self.losses.r1_every, 1),
                "losses.code_classes": (self.losses.code_classes, 1),
            }
        )
        for name, share in (
            ("sampling.clip_share", self.sampling.clip_share),
            ("sampling.colour_detail", self.sampling.colour_detail),
            ("losses.own_bits_from", self.losses.own_bits_from),
        ):
            if not 0 <= share <= 1:
                raise SpecError(f"{name} is {share}; it must be from 0 to 1.")
        low, high = self.sampling.crop_scale
        if not 0 < low <= high <= 1:
            raise SpecError(f"sampling.crop_scale is [{low}, {high}]; it must satisfy 0 < low <= high <= 1.")
        if self.losses.lpips_weight and not self.losses.lpips_folder:
            raise SpecError(
                f"losses.lpips_weight is {self.losses.lpips_weight}, but losses.lpips_folder names no weights, and "
                "nothing is fetched. Name a folder (docs/training.md says what is in it), or use the recipe no-lpips."
            )

    def to_json_dict(self) -> dict[str, Any]:
        """The config as JSON types; `train_config` reads it back equal."""
        values = dataclasses.asdict(self)
        values["sampling"]["crop_scale"] = list(self.sampling.crop_scale)
        return values

    def require_same_run(self, saved: dict[str, Any], where: str) -> bool:
        """Raise SpecError where `saved`, in JSON types, is another run; return whether only its end has moved."""
        return require_same_settings(saved, self.to_json_dict(), FREE_SETTINGS, where)

    def model_config(self) -> BSQViTConfig:
        """The architecture where the run does not begin with given weights."""
        part = self.model
        config = preset_config(part.preset)
        both = {name: getattr(part, name) for name in ("width", "layers", "heads") if getattr(part, name) is not None}
        sizes = ("image_size", "max_frames", "head_width", "bits_per_token", "group_size")
        changed: dict[str, Any] = {name: getattr(part, name) for name in sizes if getattr(part, name) is not None}
        if both or changed or part.decoder_layers is not None:
            changed["preset"] = "custom"
        halves = {name: dataclasses.replace(getattr(config, name), **both) for name in ("encoder", "decoder")}
        if part.decoder_layers is not None:
            halves["decoder"] = dataclasses.replace(halves["decoder"], layers=part.decoder_layers)
        return dataclasses.replace(config, losses=self.losses.quantizer, **halves, **changed)


def check_loop(learning: LearningPart, loop: LoopPart) -> None:
    """Raise SpecError for what no run can be."""
    require_at_least(
        {
            "optimizer.steps": (learning.steps, 1),
            "optimizer.warmup_steps": (learning.warmup_steps, 0),
            "optimizer.clip_norm": (learning.clip_norm, 0),
            "run.log_every": (loop.log_every, 1),
            "run.save_every": (loop.save_every, 1),
            "run.picture_every": (loop.picture_every, 1),
            "run.validate_every": (loop.validate_every, 1),
            "run.keep_last": (loop.keep_last, 1),
            "run.seed": (loop.seed, 0),
        }
    )
    if not 0 <= learning.ema < 1:
        raise SpecError(f"optimizer.ema is {learning.ema}; it must be from 0 to below 1.")


def require_at_least(settings: Mapping[str, tuple[float, float]]) -> None:
    """Raise SpecError for the first value, by name, that is under its least."""
    for name, (value, least) in settings.items():
        if value < least:
            raise SpecError(f"{name} is {value}; it must be at least {least}.")


def require_given_sizes(given: Mapping[str, object], found: Mapping[str, object]) -> None:
    """Raise SpecError for the first setting of `model`, by name, that is given, and not as `model.init_from` has it."""
    for name, value in given.items():
        if value is not None and value != found[name]:
            raise SpecError(
                f"model.{name} is {value}, but the model of model.init_from has {found[name]}, and it decides the "
                f"sizes. Leave model.{name} out, or leave out model.init_from."
            )


def require_same_settings(saved: dict[str, Any], now: dict[str, Any], free: Set[str], where: str) -> bool:
    """Raise SpecError where settings outside of `free` differ; return whether the end of the run has moved."""
    old, new = _flat(saved), _flat(now)
    changed = {name for name in old.keys() | new.keys() if old.get(name) != new.get(name)}
    for name in sorted(changed - free):
        raise SpecError(
            f"{where}: the run was begun with {name} {old.get(name)!r}, now it is {new.get(name)!r}. "
            "Give the same settings, or start a new run with model.init_from."
        )
    return "optimizer.steps" in changed


RECIPES: dict[str, dict[str, Any]] = {
    # The paper's, which needs LPIPS weights.
    "paper": {},
    # The paper's with MS-SSIM in the place of LPIPS.
    "no-lpips": {"losses": {"lpips_weight": 0.0, "ms_ssim_weight": 0.1}},
    # Reconstruction and the entropy of each bit: learns on two CPU cores.
    "small-cpu": {
        "losses": {
            "reconstruction": "mse",
            "lpips_weight": 0.0,
            "adversarial_weight": 0.0,
            "entropy_weight": 0.002,
            "entropy_start": 1.0,
            "quantizer": {"gamma0": 0.0, "codebook_entropy": "bit"},
        },
        "optimizer": {
            "method": "muon",
            "steps": 20_000,
            "learning_rate": 1.5e-3,
            "per_sample": False,
            "warmup_steps": 200,
            "warmup_from": 0.0,
            "cosine_to": 0.0,
        },
        "run": {"dtype": "bfloat16"},
    },
}


def train_config(values: object, where: str = "training config") -> TrainConfig:
    """Read a mapping: the values of its `recipe`, replaced by what it says itself.

    Raises SpecError, in one line, for an unknown name (with the nearest) or an impossible value."""
    if not isinstance(values, Mapping):
        raise SpecError(f"{where}: expected a mapping of settings, found {type(values).__name__}.")
    recipe = values.get("recipe", "paper")
    if recipe not in RECIPES:
        raise SpecError(
            f"{where}: there is no recipe {recipe!r}; valid: {', '.join(RECIPES)}.{nearest_name(str(recipe), RECIPES)}"
        )
    config: TrainConfig = build_settings(TrainConfig, _merged(RECIPES[recipe], values), where, "")
    return config


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in over.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def build_settings(kind: type[Any], values: object, where: str, prefix: str = "") -> Any:
    """A dataclass of settings from a mapping.  Raises SpecError, in one line, for what is wrong."""
    if not isinstance(values, Mapping):
        raise SpecError(f"{where}: {prefix.rstrip('.')} must be a mapping of settings, found {type(values).__name__}.")
    hints = typing.get_type_hints(kind)
    for name in values:
        if name not in hints:
            raise SpecError(f"{where}: unknown key {prefix + str(name)!r}.{nearest_name(str(name), hints)}")
    return kind(**{name: _value(hints[name], value, where, prefix + name) for name, value in values.items()})


def _value(hint: Any, value: object, where: str, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return build_settings(typing.cast(type[Any], hint), value, where, f"{name}.")
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            valid = ", ".join(get_args(hint))
            raise SpecError(f"{where}: {name} is {value!r}; valid: {valid}.{nearest_name(str(value), get_args(hint))}")
        return value
    if get_origin(hint) is types.UnionType:
        return None if value is None else _value(get_args(hint)[0], value, where, name)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple) or len(value) != 2:
            raise SpecError(f"{where}: {name} is {value!r}; it must be two numbers.")
        return tuple(_value(float, each, where, name) for each in value)
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    fits = isinstance(value, int | float if hint is float else hint) and (hint is bool or not isinstance(value, bool))
    if not fits:
        raise SpecError(f"{where}: {name} is {value!r}; it must be {words[hint]}.")
    return float(typing.cast(float, value)) if hint is float else value


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
