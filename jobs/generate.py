"""Draws new pictures with a generator of tokens: what `bsq generate` does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt
import torch

from jobs.coded_inputs import read_media
from jobs.contact_sheet import Tile, draw_sheet, png_bytes
from jobs.share_bar import ShareBar
from pipeline.decode import Decoder, media_kind
from pipeline.encode import choose_device
from pipeline.storage import open_storage
from schemas.errors import CheckpointError, SampleError, SpecError, printable
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec
from tokenizer.bsqvit import BSQViT
from tokenizer.checkpoint import build_model, read_checkpoint
from tokenizer.generator import MaskedTokenModel
from tokenizer.generator_checkpoint import build_generator, generator_config, read_generator
from tokenizer.generator_config import GeneratorConfig
from tokenizer.losses import to_uint8
from tokenizer.unmasking import KeptTokens, SamplingOptions, sample_tokens, samples_at_once

MAX_PICTURES = 1024
MAX_COLUMNS = 8
MIDDLE = (0.25, 0.25, 0.75, 0.75)
NO_LABEL = "no label"

Frame = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """What to draw, and how."""

    weights: str
    labels: Sequence[str] = ()
    """Names of classes; none for pictures without a label."""
    count: int = 16
    """Pictures of each label."""
    seed: int = 0
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    inpaint: Path | None = None
    """A picture of which only `box` is drawn anew."""
    box: tuple[float, float, float, float] | None = None
    """Left, top, right and bottom as shares of the sides; None: the middle half of each."""
    tokenizer: str = "default"
    device: str = "cpu"


def generate(
    options: GenerateOptions,
    out: Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> int:
    """Draw pictures side by side into a PNG, a label after the other, and return how many.

    Raises SpecError for options that cannot be meant (a label that does not exist names the nearest), CheckpointError
    for weights that cannot be used or are not for the tokenizer."""
    if out.suffix.lower() != ".png":
        raise SpecError(f"--out is {printable(str(out))!r}; name a file that ends in .png.")
    if options.box is not None and options.inpaint is None:
        raise SpecError("--box goes with --inpaint only; leave it out, or name a picture.")
    num_pictures = options.count * max(1, len(options.labels))
    if not 1 <= num_pictures <= MAX_PICTURES:
        raise SpecError(f"{num_pictures:,} pictures are asked for; it must be from 1 to {MAX_PICTURES:,} together.")
    files = read_generator(options.weights, storage_options=storage_options)
    config = generator_config(files)
    names = options.labels or [NO_LABEL]
    labels = [config.label(name) for name in options.labels] or [config.no_label]
    tokenizer_files = read_checkpoint(options.tokenizer, storage_options=storage_options)
    device = choose_device(options.device)
    tokenizer = build_model(tokenizer_files, device=device)
    require_fitting(config, files.where, tokenizer, tokenizer_files.weight_sha256(), options.tokenizer)
    original = None if options.inpaint is None else _original(options.inpaint, options.box or MIDDLE, tokenizer)
    pictures = _draw(
        build_generator(files, device=device),
        tokenizer,
        [label for label in labels for _ in range(options.count)],
        options,
        None if original is None else original.tokens,
        stream,
    )
    captions = [name for name in names for _ in range(options.count)]
    tiles = [Tile([picture], [caption]) for picture, caption in zip(pictures, captions, strict=True)]
    if original is not None:
        tiles.insert(0, Tile([original.decoded], ["the picture's tokens"]))
    in_row = options.count if len(labels) > 1 else math.ceil(math.sqrt(len(tiles)))
    sheet = draw_sheet(_title(config, options), tiles, columns=min(MAX_COLUMNS, in_row))
    open_storage(str(out.absolute().parent)).publish(out.name, png_bytes(sheet))
    return num_pictures


def require_fitting(config: GeneratorConfig, where: str, tokenizer: BSQViT, sha256: str, name: str) -> None:
    """Raise CheckpointError unless a generator is for the tokens of a tokenizer."""
    if config.tokenizer_sha256 not in ("", sha256):
        raise CheckpointError(
            f"{where}: makes tokens of tokenizer {config.tokenizer_sha256[:8]}; {printable(name)} is {sha256[:8]}. "
            "Name the one that belongs to it with --tokenizer; a dataset keeps it in its folder tokenizer/."
        )
    sizes = tokenizer.config
    if (config.bits_per_token, config.grid) != (sizes.bits_per_token, sizes.grid):
        raise CheckpointError(
            f"{where}: makes tokens of {config.bits_per_token} bits on a grid of {config.grid}; {printable(name)} has "
            f"{sizes.bits_per_token} bits on {sizes.grid}."
        )


class _Original(NamedTuple):
    tokens: KeptTokens
    decoded: Frame


def _original(path: Path, box: tuple[float, float, float, float], tokenizer: BSQViT) -> _Original:
    """The tokens of a picture's middle square, of which those outside of the box are kept."""
    kept = kept_outside(box, tokenizer.config.grid)
    size, limits = tokenizer.config.image_size, LimitsSpec()
    media = read_media(path, limits)
    try:
        if media_kind(media) != "image":
            raise SpecError(f"{printable(str(path))}: is a video; --inpaint takes a picture.")
        view = next(Decoder(PreprocessSpec(size=size), ClipSpec(clip_frames=1), limits).views(path.name, media))
    except SampleError as error:
        raise SpecError(f"{printable(str(path))}: {error}") from error
    frame_HWC = view.frames_TCHW[0].permute(1, 2, 0).contiguous()
    device = next(tokenizer.parameters()).device
    bits = tokenizer.encode(frame_HWC[None, None].to(device))
    return _Original(KeptTokens(bits[0, 0], kept), _frames(tokenizer, bits[:, 0])[0])


def kept_outside(box: tuple[float, float, float, float], grid: tuple[int, int]) -> torch.Tensor:
    """Which tokens lie outside of a box of left, top, right, bottom as shares: bool [h, w].

    A token that the box touches is not kept.  Raises SpecError for a box that is none."""
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise SpecError(
            f"--box is {','.join(f'{side:g}' for side in box)}; give left,top,right,bottom as shares of the sides that "
            "rise from 0 to 1, such as 0.25,0.25,0.75,0.75."
        )
    kept = torch.ones(grid, dtype=torch.bool)
    rows, columns = grid
    kept[math.floor(top * rows) : math.ceil(bottom * rows), math.floor(left * columns) : math.ceil(right * columns)] = (
        False
    )
    return kept


def _draw(
    model: MaskedTokenModel,
    tokenizer: BSQViT,
    labels: Sequence[int],
    options: GenerateOptions,
    around: KeptTokens | None,
    stream: TextIO | None,
) -> list[Frame]:
    at_once = samples_at_once(model.masked.device)
    pictures: list[Frame] = []
    with ShareBar(stream) as bar:
        for first in range(0, len(labels), at_once):
            several = labels[first : first + at_once]
            bits = sample_tokens(model, several, options.seed, options.sampling, first=first, around=around)
            pictures += _frames(tokenizer, bits)
            bar.show(len(pictures) / len(labels), f"{len(pictures):,} of {len(labels):,} pictures")
    return pictures


def _frames(tokenizer: BSQViT, bits_BhwL: torch.Tensor) -> list[Frame]:
    pixels_BHWC = tokenizer.decode(bits_BhwL.unsqueeze(1))[:, 0]
    return list(to_uint8(pixels_BHWC).cpu().numpy())


def _title(config: GeneratorConfig, options: GenerateOptions) -> str:
    sampling = options.sampling
    untrained = "" if config.trained else ", RANDOM WEIGHTS (never trained)"
    guidance = f"guidance {sampling.guidance:g}, " if options.labels else ""
    return f"{config.preset}{untrained}: seed {options.seed}, {guidance}{sampling.steps} steps"
