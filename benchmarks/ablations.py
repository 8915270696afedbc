"""What the two cheapest ingredients of BSQ are worth: the entropy of the codebook, and latents on the unit sphere.

    python -m benchmarks.ablations --images 'train/*.tar' --validation 'val/*.tar' --out ablations/ --steps 2000

trains the same small tokenizer three times, from the same weights, on the same batches and for as many steps:

    whole         the recipe as it is
    no-entropy    without the term that spreads the codes (gamma 0)
    no-sphere     without the l2-norm before the sign

and measures each on the validation pictures with `bsq evaluate`'s code.  Interrupted, the same command goes on; with
more `--steps` it goes on further.  Writes OUT/ablations.json and prints a table."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from jobs.evaluate import EvaluationOptions, evaluate
from jobs.training_data import TrainingData
from pipeline.training_batches import Complaints
from schemas.errors import BsqError
from schemas.evaluation import EvaluationReport
from schemas.trainspec import TrainSpec
from tokenizer.bsqvit import BSQViT
from tokenizer.checkpoint import save_checkpoint
from tokenizer.metrics import ms_ssim_form
from tokenizer.train_config import TrainConfig, train_config
from tokenizer.train_log import describe_report
from tokenizer.train_loop import stopping_on_signals
from tokenizer.trainer import Trainer, held_batches

VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "no-entropy": {"losses": {"quantizer": {"gamma": 0.0}}},
    "no-sphere": {"l2_norm": False},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", nargs="+", required=True, help="shards whose pictures are learnt from")
    parser.add_argument("--validation", nargs="+", required=True, help="shards whose pictures are measured on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=2000, help="updates of each variant")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each variant is trained once for each")
    parser.add_argument("--batch", type=int, default=16, help="pictures of an update")
    parser.add_argument("--size", type=int, default=128, help="pixels of a picture's side")
    parser.add_argument("--width", type=int, default=96, help="of both halves")
    parser.add_argument("--layers", type=int, default=2, help="of each half")
    parser.add_argument("--views", type=int, default=1, help="crops that are held of each picture")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args()
    try:
        results = {
            f"{variant}-{seed}": run_variant(given, variant, seed) for seed in given.seeds for variant in VARIANTS
        }
    except BsqError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    stored = {name: json.loads(report.model_dump_json(exclude={"results": {"__all__": {"per_item"}}}))
              for name, report in results.items()}  # fmt: skip
    (given.out / "ablations.json").write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
    print(table(results, given))
    return 0


def run_variant(given: argparse.Namespace, variant: str, seed: int) -> EvaluationReport:
    """Train one variant to its last step, or go on with it, and measure it."""
    out = given.out / f"{variant}-{seed}"
    config = settings(given, variant, seed)
    start(given, variant, seed)
    log = out / "log.jsonl"
    last = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["step"] if log.exists() else 0
    if last < given.steps:
        print(f"{variant}, seed {seed}: from step {last}", file=sys.stderr, flush=True)
        device = torch.device("cuda" if given.device != "cpu" and torch.cuda.is_available() else "cpu")
        trainer = Trainer(
            config, held_batches(config, held_frames(given, config), device), out, device=device, observer=tell
        )
        trainer.begin(resume=True)
        with stopping_on_signals(trainer):
            trainer.run()
    report = out / "evaluation" / "evaluation.json"
    if not report.exists() or last < given.steps:
        options = EvaluationOptions(codecs=False, dtype="float32")
        evaluate(str(out / "tokenizer"), given.validation, report.parent, options)
    return EvaluationReport.model_validate_json(report.read_bytes())


def settings(given: argparse.Namespace, variant: str, seed: int) -> TrainConfig:
    """The recipe for two CPU cores, with what the variant leaves out; only its end depends on `--steps`."""
    return train_config(
        {
            "recipe": "small-cpu",
            "model": {"init_from": str(given.out / f"start-{variant}-{seed}")},
            "losses": VARIANTS[variant].get("losses", {}),
            # A rate that does not fall lets a run go on further than it was meant to.
            "optimizer": {"steps": given.steps, "batch_images": given.batch, "learning_rate": 1e-3, "cosine_to": 1.0},
            "run": {"seed": seed, "device": given.device, "log_every": 100, "save_every": 200, "keep_last": 1,
                    "picture_every": 1_000_000, "validate_every": 1_000_000},
        }
    )  # fmt: skip


def start(given: argparse.Namespace, variant: str, seed: int) -> None:
    """Save the weights that the variants of a seed begin with: the same ones."""
    folder = given.out / f"start-{variant}-{seed}"
    if (folder / "config.json").exists():
        return
    model = {"preset": "vit-small-128-l18", "image_size": given.size, "width": given.width, "layers": given.layers,
             "heads": max(1, given.width // 64), "head_width": 4 * given.width, "max_frames": 1}  # fmt: skip
    config = train_config({"recipe": "small-cpu", "model": model}).model_config()
    config = dataclasses.replace(config, l2_norm=VARIANTS[variant].get("l2_norm", True))
    save_checkpoint(BSQViT(config, seed=seed), folder)


HELD: list[torch.Tensor] = []


def held_frames(given: argparse.Namespace, config: TrainConfig) -> list[torch.Tensor]:
    """Decoded once for all variants."""
    if not HELD:
        spec = TrainSpec.model_validate({"data": {"images": given.images, "hold_views": given.views}})
        HELD.extend(TrainingData(spec=spec, config=config, tell=print_line).held(Complaints(print_line)))
    return HELD


def tell(report: Any) -> None:
    if report.line or "loss" in report.values:
        print_line(report.line or describe_report(report))


def print_line(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def table(results: dict[str, EvaluationReport], given: argparse.Namespace) -> str:
    """Means over the seeds."""
    similarity = ms_ssim_form(given.size)[0]
    lines = [
        f"{given.size} px, width {given.width}, {given.layers} + {given.layers} layers; {given.steps} updates of "
        f"{given.batch} pictures; seeds {given.seeds}",
        "",
        f"| variant | PSNR | {similarity} | least channel entropy | mean channel entropy | codes used of each group "
        "| entropy of each group, bits |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant in VARIANTS:
        kinds = [results[f"{variant}-{seed}"].results[0] for seed in given.seeds]
        measures = [kind.methods[0].measures for kind in kinds]
        entropies = [kind.codes.channel_entropy_bits for kind in kinds]
        groups = [group for kind in kinds for group in kind.codes.groups]
        cells = [
            variant,
            f"{mean([each['psnr'].mean for each in measures]):.2f}",
            f"{mean([each[similarity].mean for each in measures]):.3f}",
            f"{min(map(min, entropies)):.3f}",
            f"{mean([mean(each) for each in entropies]):.3f}",
            f"{mean([group.used / group.codes for group in groups]):.1%}",
            f"{mean([group.entropy_bits for group in groups]):.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    sys.exit(main())
