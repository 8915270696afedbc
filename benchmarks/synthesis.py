"""Measure pictures of a generator: whether a classifier sees the asked class in them, how near their features are to
those of real pictures, and whether they are copies of training pictures.

python -m benchmarks.synthesis --weights runs/generator/best --train 'labelled-clothes/train-*.tar' \\
    --validation 'labelled-clothes/val-*.tar' --out synthesis

The classifier is a small one, trained here on the real training pictures.  Distances in its features are for comparison
with the other lines of the same table, and not with FID, which `--inception` adds with the inception score."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs.contact_sheet import Tile, draw_sheet, png_bytes
from pipeline.byte_stream import open_shard
from pipeline.decode import Decoder
from pipeline.group import group_samples
from pipeline.sidecars import read_sidecars
from pipeline.sources import expand_shards
from pipeline.tar import read_members
from schemas.jobspec import ClipSpec, LimitsSpec, PreprocessSpec
from tokenizer.bsqvit import BSQViT
from tokenizer.checkpoint import from_pretrained
from tokenizer.frechet import FeatureStatistics, frechet_distance
from tokenizer.generator_checkpoint import build_generator, read_generator
from tokenizer.inception import InceptionFeatures, inception_score, load_inception
from tokenizer.losses import exact_convolutions, to_uint8
from tokenizer.unmasking import SamplingOptions, sample_tokens

SIDE = 64
"""Pixels of what the classifier sees."""
BATCH = 64
NEAR = 0.05
"""A sample is near a training picture if it is nearer than this share of the validation pictures are."""


class Pictures(NamedTuple):
    """Pictures uint8 [N, 3, S, S] and their labels int64 [N]."""

    pixels: Tensor
    labels: Tensor


class Classifier(nn.Module):
    """Four convolutions with stride 2, group norm, and the mean over places as features."""

    def __init__(self, num_classes: int, width: int = 48) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 4 * width]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.GroupNorm(8, outputs), nn.GELU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], num_classes)

    def features(self, frames_N3HW: Tensor) -> Tensor:
        """[N, F] of frames from -1 to 1 of SIDE pixels."""
        found: Tensor = self.layers(frames_N3HW).mean((2, 3))
        return found

    def forward(self, frames_N3HW: Tensor) -> Tensor:
        logits: Tensor = self.head(F.dropout(self.features(frames_N3HW), 0.2, self.training))
        return logits


class Seen(NamedTuple):
    """What the classifier, and Inception where it is at hand, make of pictures."""

    features: Tensor
    """[N, F]"""
    labels: Tensor
    """Of the classes that it sees, int64 [N]."""
    inception: Tensor | None
    """[N, 2048]"""
    score: tuple[float, float] | None
    """Mean and deviation of the inception score."""


@dataclass(frozen=True)
class Looker:
    """What looks at pictures."""

    classifier: Classifier
    inception: InceptionFeatures | None

    @torch.no_grad()
    def __call__(self, pictures: Pictures) -> Seen:
        device = self.classifier.head.weight.device
        parts = [self.classifier.features(part.to(device)) for part in shrink(pictures.pixels).split(BATCH)]
        features = torch.cat(parts)
        labels = self.classifier.head(features).argmax(-1)
        if self.inception is None:
            return Seen(features.cpu(), labels.cpu(), None, None)
        with exact_convolutions():
            found = torch.cat([self.inception(part.to(device)) for part in pictures.pixels.split(BATCH)])
        # Pictures lie class by class: each part of them for the deviation is to have all classes.
        mixed = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0)).to(device)]
        score = inception_score(self.inception.logits(mixed))
        return Seen(features.cpu(), labels.cpu(), found.cpu(), score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--tokenizer", default="default")
    parser.add_argument("--train", nargs="+", required=True, help="shards that the generator learnt from")
    parser.add_argument("--validation", nargs="+", required=True)
    parser.add_argument("--per-class", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, nargs="+", default=[0.0, 2.0], help="one line of the table for each")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--noise", type=float, default=4.0)
    parser.add_argument("--inception", type=Path, help="weights of Inception (docs/evaluation.md): adds FID and IS")
    parser.add_argument("--epochs", type=int, default=30, help="of the classifier")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path("synthesis"), help="folder for the table and the pictures")
    given = parser.parse_args()

    generator = build_generator(read_generator(given.weights), device=given.device)
    tokenizer = from_pretrained(given.tokenizer, device=given.device)
    classes, size = generator.config.classes, tokenizer.config.image_size
    train, validation = (read_pictures(shards, size) for shards in (given.train, given.validation))
    print(f"{len(train.labels):,} training pictures, {len(validation.labels):,} validation pictures")
    inception = None if given.inception is None else load_inception(given.inception).to(given.device)
    classifier = train_classifier(train, len(classes), epochs=given.epochs, seed=given.seed, device=given.device)
    look = Looker(classifier, inception)

    table = Table(real := look(validation), learnt := look(train))
    table.add("training, real", learnt, train.labels)
    table.add("validation, real", real, validation.labels)
    decoded = Pictures(through(tokenizer, validation), validation.labels)
    table.add("validation, decoded tokens", look(decoded), decoded.labels)
    labels = torch.arange(len(classes)).repeat_interleave(given.per_class)
    given.out.mkdir(parents=True, exist_ok=True)
    for guidance in given.guidance:
        options = SamplingOptions(
            steps=given.steps, guidance=guidance, temperature=given.temperature, noise=given.noise
        )
        bits = sample_tokens(generator, labels.tolist(), given.seed, options)
        made = Pictures(decode(tokenizer, bits), labels)
        name = f"generated, guidance {guidance:g}"
        table.add(name, seen := look(made), labels)
        places = nearest(seen.features, learnt.features).places
        sheet = draw_pairs(name, made, train, places, classes, given.per_class)
        (given.out / f"guidance-{guidance:g}.png").write_bytes(sheet)
        print(table.lines[-1])
    text = "\n".join(table.lines)
    (given.out / "synthesis.md").write_text(text + "\n", encoding="utf-8")
    print(text)


def read_pictures(shards: Sequence[str], size: int) -> Pictures:
    """The labelled pictures of shards: their middle squares."""
    limits = LimitsSpec()
    decoder = Decoder(PreprocessSpec(size=size), ClipSpec(clip_frames=1), limits)
    pixels, labels = [], []
    for url in expand_shards(shards):
        with open_shard(url) as stream:
            for sample in group_samples(read_members(stream, limits), limits):
                label = read_sidecars(sample.members, ("label",), limits).label
                if sample.media is not None and label is not None:
                    pixels.append(next(decoder.views(sample.key, sample.media)).frames_TCHW[0])
                    labels.append(label)
    return Pictures(torch.stack(pixels), torch.tensor(labels))


def train_classifier(train: Pictures, num_classes: int, *, epochs: int, seed: int, device: str) -> Classifier:
    """A classifier of real pictures, shown mirrored and shifted ones."""
    torch.manual_seed(seed)
    classifier = Classifier(num_classes).to(device)
    steps = epochs * (len(train.labels) // BATCH)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(1, steps))
    frames = shrink(train.pixels)
    for _ in range(epochs):
        order = torch.randperm(len(frames))
        for batch in order[: len(order) // BATCH * BATCH].view(-1, BATCH):
            shown = F.pad(frames[batch], (4, 4, 4, 4), mode="reflect")
            top, left = torch.randint(0, 9, (2,)).tolist()
            shown = shown[:, :, top : top + SIDE, left : left + SIDE]
            flipped = torch.where(torch.rand(len(batch), 1, 1, 1) < 0.5, shown.flip(-1), shown)
            logits = classifier(flipped.to(device))
            loss = F.cross_entropy(logits, train.labels[batch].to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def shrink(pixels_N3HW: Tensor) -> Tensor:
    """Frames of SIDE pixels from -1 to 1."""
    shrunk = [F.interpolate(part.float(), (SIDE, SIDE), mode="area") for part in pixels_N3HW.split(BATCH)]
    return torch.cat(shrunk) / 127.5 - 1


@torch.no_grad()
def through(tokenizer: BSQViT, pictures: Pictures) -> Tensor:
    """What the tokens of pictures decode to."""
    device = next(tokenizer.parameters()).device
    frames = pictures.pixels.permute(0, 2, 3, 1).unsqueeze(1)
    bits = torch.cat([tokenizer.encode(part.contiguous().to(device)) for part in frames.split(BATCH)])
    return decode(tokenizer, bits[:, 0])


def decode(tokenizer: BSQViT, bits_NhwL: Tensor) -> Tensor:
    """uint8 [N, 3, S, S]."""
    frames = torch.cat([tokenizer.decode(part.unsqueeze(1))[:, 0] for part in bits_NhwL.split(BATCH)])
    return to_uint8(frames).cpu().permute(0, 3, 1, 2)


class Nearest(NamedTuple):
    """The nearest of other features, by cosine."""

    distances: Tensor
    places: Tensor


def nearest(features_NF: Tensor, others_MF: Tensor) -> Nearest:
    """For each of N the nearest of M."""
    cosines = F.normalize(features_NF, dim=1) @ F.normalize(others_MF, dim=1).T
    highest = cosines.max(1)
    return Nearest(1 - highest.values, highest.indices)


class Table:
    """Lines of Markdown, one for each kind of pictures."""

    def __init__(self, real: Seen, learnt: Seen) -> None:
        """`real` is what is seen in the validation, `learnt` in the training pictures."""
        self.real, self.learnt = real, learnt
        self.near = nearest(real.features, learnt.features).distances.quantile(NEAR)
        titles = ["pictures", "agreement", "Fréchet distance to validation"]
        titles += [f"nearer to training than {100 * (1 - NEAR):.0f} % of validation"]
        if real.inception is not None:
            titles += ["FID to validation", "IS"]
        self.lines = [_line(titles), _line(["---"] * len(titles)).replace(" ", "")]

    def add(self, name: str, seen: Seen, labels: Tensor) -> None:
        """What is seen in pictures of these labels."""
        near = nearest(seen.features, self.learnt.features).distances < self.near
        cells = [
            f"{name}, {len(labels):,}",
            f"{100 * float((seen.labels == labels).float().mean()):.0f} %",
            f"{_distance(seen.features, self.real.features):.3f}",
            "" if seen is self.learnt else f"{100 * float(near.float().mean()):.0f} %",
        ]
        if seen.inception is not None and self.real.inception is not None and seen.score is not None:
            cells += [f"{_distance(seen.inception, self.real.inception):.1f}", "{:.2f} ± {:.2f}".format(*seen.score)]
        self.lines.append(_line(cells))


def _line(cells: Sequence[str]) -> str:
    return "|" + "".join(f" {cell} |" if cell else " |" for cell in cells)


def _distance(first_NF: Tensor, second_MF: Tensor) -> float:
    """Fréchet distance of features; 0 of features to themselves."""
    if first_NF is second_MF:
        return 0.0
    statistics = FeatureStatistics(), FeatureStatistics()
    for each, features in zip(statistics, (first_NF, second_MF), strict=True):
        each.add(features)
    return frechet_distance(*statistics)


def draw_pairs(
    title: str, made: Pictures, train: Pictures, places: Tensor, classes: Sequence[str], per_class: int
) -> bytes:
    """A line for each class: samples, and below them the nearest training pictures."""
    columns = min(8, per_class)
    tiles = [
        Tile(
            [np.ascontiguousarray(each.permute(1, 2, 0).numpy()) for each in (made.pixels[n], train.pixels[places[n]])],
            [classes[int(made.labels[n])], f"below: nearest, {classes[int(train.labels[places[n]])]}"],
        )
        for first in range(0, len(made.labels), per_class)
        for n in range(first, first + columns)
    ]
    return png_bytes(draw_sheet(title, tiles, columns=columns))


if __name__ == "__main__":
    main()
