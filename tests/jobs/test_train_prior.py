"""A prior learns from datasets, resumes on the same losses, and says what goes wrong."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from jobs.cli import run
from jobs.token_training import TokenBatches, open_datasets, token_kind
from jobs.train_prior import train_prior
from schemas.errors import Interrupted, SpecError
from schemas.trainspec import TokenDataSpec, read_token_train_spec
from tests.token_datasets import TokenDatasetWriter
from tokenizer.prior_checkpoint import build_prior, prior_config, read_prior
from tokenizer.prior_train import PriorLearner, PriorPart, bits_of_tokens, prior_train_config
from tokenizer.token_train import TokenBatch, TokenLearningPart, TokenTrainer
from tokenizer.train_state import find_states, load_state

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Pictures, and clips of two lengths, of one tokenizer; and pictures of another."""
    folder = tmp_path_factory.mktemp("datasets")
    written = {
        "pictures": {"clips_of_file": [9, 8], "views": 2},
        "clips": {"clips_of_file": [5], "frames": lambda file, clip: 2 + clip % 2},
        "stranger": {"clips_of_file": [3], "weight_sha256": "cd" * 32},
    }
    for name, values in written.items():
        TokenDatasetWriter(url=str(folder / name), bits=6, group_size=3, seed=len(name), **values).write()
    return folder


def train_file(folder, datasets, *, steps=6, **sections):
    values = {
        "out": str(folder / "run"),
        "data": {
            "train": {"pictures": {"path": str(datasets / "pictures"), "weight": 2}, "clips": str(datasets / "clips")},
            "validation": {"pictures": str(datasets / "pictures"), "clips": str(datasets / "clips")},
            "validation_clips": 4,
        },
        "model": {"width": 16, "layers": 1, "heads": 2, "head_width": 16},
        "optimizer": {"steps": steps, "batch": 4, "warmup_steps": 1, "learning_rate": 0.01},
        "run": {"device": "cpu", "dtype": "float32", "log_every": 1, "save_every": 2, "validate_every": 3,
                "picture_every": 3},
    }  # fmt: skip
    for name, section in sections.items():
        values[name] = {**values[name], **section}
    folder.mkdir(exist_ok=True)
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def logged(folder, name="loss"):
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line[name]) for line in lines if name in line]


@pytest.mark.parametrize("stop_after", [1, 4])
def test_a_run_that_is_resumed_goes_on_with_equal_losses(datasets, tmp_path, monkeypatch, stop_after):
    train_prior(train_file(tmp_path / "whole", datasets))
    path = train_file(tmp_path / "resumed", datasets)
    update = TokenTrainer._collect

    def counted(self, metrics, num_samples):
        update(self, metrics, num_samples)
        if self.step + 1 == stop_after:
            self.stop()

    with monkeypatch.context() as patched:
        patched.setattr(TokenTrainer, "_collect", counted)
        with pytest.raises(Interrupted, match=f"Saved after step {stop_after} of 6"):
            train_prior(path)
    with pytest.raises(SpecError, match=r"holds a run. Add --resume"):
        train_prior(path)
    train_prior(path, resume=True)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "whole") and len(logged(tmp_path / "whole")) == 6
    assert logged(tmp_path / "resumed", "val_bits") == logged(tmp_path / "whole", "val_bits")
    states = [load_state(find_states(tmp_path / name / "run" / "states")[-1]) for name in ("resumed", "whole")]
    assert states[0].tensors.keys() == states[1].tensors.keys()
    assert all(torch.equal(states[0].tensors[name], value) for name, value in states[1].tensors.items())


def test_a_prior_learns_what_tokens_have_in_common(tmp_path):
    """Tokens of one index take no bits in the end; the best prior is one that ships as a folder."""
    writer = TokenDatasetWriter(url=str(tmp_path / "same"), clips_of_file=[8], bits=6, group_size=3)
    rows_of = writer._rows_of
    writer._rows_of = lambda shard: [
        row.__class__(**{**vars(row), "tokens": rows_of(shard)[0].tokens}) for row in rows_of(shard)
    ]
    writer.write()
    data = {"train": {"same": writer.url}, "validation": {"same": writer.url}}
    path = train_file(
        tmp_path, tmp_path, steps=60, data=data, optimizer={"learning_rate": 0.02, "ema": 0.9, "weight_decay": 0.0},
        model={"dropout": 0.0}, run={"validate_every": 20, "save_every": 60, "picture_every": 20, "log_every": 10},
    )  # fmt: skip
    assert run(["train-prior", str(path)]) == 0
    validated = [value for _, value in logged(tmp_path, "val_bits")]
    assert len(validated) == 3 and validated[-1] == min(validated) < 1
    files = read_prior(tmp_path / "run" / "best")
    config = prior_config(files)
    assert config.trained and config.tokenizer_sha256 == "ab" * 32 and config.grid == (2, 3)
    bits = next(iter(TokenBatches(TokenDataSpec(train=data["train"]), open_datasets(TokenDataSpec(**data), None),
                                  batch=2, seed=0).next_batch().bits))  # fmt: skip
    taken = bits_of_tokens(build_prior(files), TokenBatch(bits[None])).mean()
    assert float(taken) == pytest.approx(validated[-1], abs=0.05)
    curve = (tmp_path / "run" / "curve.svg").read_text()
    assert curve.startswith("<svg") and "val_bits" in curve and "loss" in curve


def test_padding_of_a_batch_counts_and_costs_nothing(datasets):
    spec = TokenDataSpec(train={"clips": str(datasets / "clips")})
    batch = TokenBatches(spec, open_datasets(spec, None), batch=5, seed=0).next_batch()
    assert batch.mask is not None and batch.num_tokens == int(batch.mask.sum()) * 6
    config = prior_train_config({"model": {"width": 16, "layers": 1, "heads": 2, "head_width": 16, "dropout": 0.0}})
    learner = PriorLearner(config, token_kind(open_datasets(spec, None)), torch.device("cpu"))
    seen = []
    log_prob = learner.model.log_prob
    learner.model.log_prob = lambda bits: seen.append(bits.shape[:2]) or log_prob(bits)
    loss = float(learner.losses(batch)["loss"].detach())
    assert sum(clips * frames for clips, frames in seen) == int(batch.mask.sum())
    alone = [TokenBatch(bits[mask][None]) for bits, mask in zip(batch.bits, batch.mask, strict=True)]
    with torch.no_grad():
        total = sum(float(bits_of_tokens(learner.model, clip).sum()) for clip in alone)
    assert loss == pytest.approx(total / batch.num_tokens, rel=1e-5)
    assert learner.measure(batch) == (pytest.approx(total, rel=1e-5), batch.num_tokens)


def test_mistakes_are_one_line(datasets, tmp_path):
    for sections, message in (
        ({"model": {"widht": 3}}, r"unknown key 'model.widht'.*'width'"),
        ({"model": {"dropout": 1.0}}, r"model.dropout is 1.0; it must be from 0 to below 1"),
        ({"optimizer": {"batch": 0}}, r"optimizer.batch is 0; it must be at least 1"),
        ({"optimizer": {"method": "sgd"}}, r"optimizer.method is 'sgd'; valid: adamw, muon"),
        ({"data": {"trian": {}}}, r"unknown key 'data.trian'.*'train'"),
        ({"data": {"train": {}}}, r"data.train names no dataset"),
        ({"data": {"validation": {"other": str(datasets / "stranger")}}}, r"different tokenizers or grids"),
        ({"model": {"max_frames": 1}}, r"a clip has [23] frames; this prior takes 1 to 1"),
    ):
        with pytest.raises(SpecError, match=message) as caught:
            train_prior(train_file(tmp_path, datasets, **sections))
        assert "\n" not in str(caught.value)
    mixed = {"train": {name: str(datasets / name) for name in ("pictures", "stranger")}}
    with pytest.raises(SpecError, match="have tokens of different tokenizers"):
        train_prior(train_file(tmp_path, datasets, data=mixed))
    with pytest.raises(SpecError, match=r"cannot be read.*Name an existing training file"):
        train_prior(tmp_path / "absent.yaml")


def test_another_run_is_not_gone_on_with(datasets, tmp_path):
    train_prior(train_file(tmp_path, datasets, steps=2))
    with pytest.raises(SpecError, match=r"begun with model.layers 1, now it is 2"):
        train_prior(train_file(tmp_path, datasets, steps=4, model={"layers": 2}), resume=True)
    best = str(tmp_path / "run" / "best")
    path = train_file(tmp_path / "next", datasets, steps=1, model={"init_from": best})
    train_prior(path)
    assert prior_config(read_prior(tmp_path / "next" / "run" / "prior")).width == 16
    with pytest.raises(SpecError, match=r"model.width is 32, but the model of model.init_from has 16"):
        train_prior(train_file(tmp_path / "wider", datasets, model={"init_from": best, "width": 32}))


def test_the_example_can_be_meant():
    spec = read_token_train_spec(REPOSITORY / "examples" / "train_prior.yaml")
    config = prior_train_config(spec.training())
    assert config.model.preset == "prior-small" and config.optimizer.method == "muon"


def test_every_setting_is_in_the_documentation_with_its_default():
    text = (REPOSITORY / "docs" / "compression.md").read_text()
    for section, values in (("model", PriorPart()), ("data", TokenDataSpec(train={"a": "b"}))):
        table = text.partition(f"\n### {section}\n")[2].partition("\n### ")[0]
        names = TokenDataSpec.model_fields if section == "data" else [each.name for each in fields(PriorPart)]
        for name in names:
            shown = f"`{getattr(values, name)!r}`" if name not in ("train", "validation") else ""
            assert f"| `{name}` | {shown}" in table, f"{section}.{name}"
    learning = TokenLearningPart()
    assert (learning.method, learning.steps, learning.learning_rate, learning.warmup_steps) == (
        "muon",
        20_000,
        1e-3,
        200,
    )
    assert (learning.batch, learning.weight_decay, learning.cosine_to) == (32, 0.05, 0.0)
