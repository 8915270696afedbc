"""Settings and frames of training runs that take a moment."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from tokenizer.train_config import TrainConfig, train_config
from tokenizer.trainer import Trainer, held_batches

TINY = {"preset": "vit-tiny-32-l18", "width": 32, "layers": 1, "heads": 2, "head_width": 64, "max_frames": 3}
CPU = torch.device("cpu")


def settings(recipe: str = "small-cpu", **sections: Any) -> TrainConfig:
    """A recipe with a tiny model and six steps; sections win over it."""
    values: dict[str, Any] = {
        "recipe": recipe,
        "model": TINY,
        "optimizer": {"steps": 6, "batch_images": 4, "batch_clips": 2, "warmup_steps": 2, "learning_rate": 1e-3,
                      "per_sample": False},
        "discriminator": {"channels": 4, "max_channels": 8},
        "run": {"device": "cpu", "dtype": "float32", "log_every": 1, "save_every": 2, "picture_every": 100,
                "validate_every": 100},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section} if isinstance(section, dict) else section
    return train_config(values)


def frames(num: int, num_frames: int, size: int = 40, seed: int = 0) -> np.ndarray[Any, Any]:
    """Smooth colours that move, uint8 [N, T, size, size, 3]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(num * num_frames, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (smooth * 255).to(torch.uint8).permute(0, 2, 3, 1).reshape(num, num_frames, size, size, 3).numpy()


def write_train_file(folder: Path, shards: Sequence[Path], *, steps: int = 4, **sections: dict[str, Any]) -> Path:
    """A training file over pictures and clips of shards, the third of which has the clips."""
    values: dict[str, Any] = {
        "recipe": "small-cpu",
        "out": str(folder / "run"),
        "data": {
            "images": [str(shard) for shard in shards],
            "clips": [str(shards[2])],
            "validation_images": [str(shards[1])],
            "validation_clips": [str(shards[2])],
            "validation_items": 4,
            "decode_threads": 1,
        },
        "model": {"preset": "vit-tiny-32-l18", "width": 32, "layers": 1, "heads": 2, "head_width": 64, "max_frames": 3},
        "optimizer": {"steps": steps, "batch_images": 4, "batch_clips": 1, "warmup_steps": 1},
        "run": {"device": "cpu", "dtype": "float32", "log_every": 1, "save_every": 2, "validate_every": 4,
                "picture_every": 4},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def logged_losses(folder: Path) -> list[float]:
    """The losses in the log of a run."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def train(config, out, arrays=None, *, resume=False, validation=(), reports=None, stop_after=None):
    """Begin or resume a run in `out` and take it to its end, or to `stop_after` with a signal's stop."""
    arrays = arrays or [frames(10, 1), frames(5, 4, seed=1)]
    trainer = Trainer(
        config,
        held_batches(config, arrays, CPU),
        out,
        validation=validation,
        observer=lambda report: reports.append(report) if reports is not None else None,
    )
    trainer.begin(resume=resume)
    if stop_after is not None:
        update = trainer.learner.update

        def counted(batch, step):
            if step + 1 == stop_after:
                trainer.stop()
            return update(batch, step)

        trainer.learner.update = counted
    trainer.run()
    return trainer


def losses(out):
    """Step, loss and gradient norm of each line of a run's log."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


FULL = {"losses": {"adversarial_start": 1, "r1_every": 2}}
