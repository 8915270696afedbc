"""A generator learns from labelled datasets, resumes on the same losses, and says what goes wrong."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import yaml

from jobs.cli import run
from jobs.token_training import TokenBatches, open_datasets
from jobs.train_generator import train_generator
from schemas.errors import Interrupted, SpecError
from schemas.trainspec import LabelledTokenDataSpec, read_generator_train_spec
from tests.token_datasets import TokenDatasetWriter
from tokenizer.generator_checkpoint import build_generator, generator_config, read_generator
from tokenizer.generator_train import GeneratorPart, generator_train_config
from tokenizer.token_train import TokenTrainer
from tokenizer.train_state import find_states, load_state
from tokenizer.unmasking import SamplingOptions, sample_tokens

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES = ["dress", "hat", "longsleeve", "outwear", "pants", "shirt", "shoes", "shorts", "skirt", "t-shirt"]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Labelled pictures, some pictures without label, and pictures among clips; all of one tokenizer."""
    folder = tmp_path_factory.mktemp("datasets")
    written = {
        "pictures": {"clips_of_file": [12, 11], "views": 2},
        "unlabelled": {"clips_of_file": [7], "label": lambda file, clip: None},
        "clips": {"clips_of_file": [9], "frames": lambda file, clip: 1 + clip % 2},
    }
    for name, values in written.items():
        TokenDatasetWriter(url=str(folder / name), bits=6, group_size=3, seed=len(name), **values).write()
    return folder


def train_file(folder, datasets, *, steps=6, **sections):
    values = {
        "out": str(folder / "run"),
        "data": {
            "train": {"pictures": {"path": str(datasets / "pictures"), "weight": 2},
                      "unlabelled": str(datasets / "unlabelled")},
            "validation": {"pictures": str(datasets / "pictures")},
            "validation_clips": 6,
            "classes": CLASSES,
        },
        "model": {"width": 16, "layers": 1, "heads": 2, "label_drop": 0.3},
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
    train_generator(train_file(tmp_path / "whole", datasets))
    path = train_file(tmp_path / "resumed", datasets)
    collect = TokenTrainer._collect

    def counted(self, metrics, num_samples):
        collect(self, metrics, num_samples)
        if self.step + 1 == stop_after:
            self.stop()

    with monkeypatch.context() as patched:
        patched.setattr(TokenTrainer, "_collect", counted)
        with pytest.raises(Interrupted, match=f"Saved after step {stop_after} of 6"):
            train_generator(path)
    train_generator(path, resume=True)
    assert logged(tmp_path / "resumed") == logged(tmp_path / "whole") and len(logged(tmp_path / "whole")) == 6
    assert logged(tmp_path / "resumed", "val_bits") == logged(tmp_path / "whole", "val_bits")
    states = [load_state(find_states(tmp_path / name / "run" / "states")[-1]) for name in ("resumed", "whole")]
    assert states[0].tensors.keys() == states[1].tensors.keys()
    assert all(torch.equal(states[0].tensors[name], value) for name, value in states[1].tensors.items())


def test_it_learns_what_the_tokens_of_a_class_are(tmp_path):
    """Every class has tokens of one index: with the label they take few bits, and are what is drawn."""
    writer = TokenDatasetWriter(url=str(tmp_path / "same"), clips_of_file=[12], bits=6, group_size=3,
                                label=lambda file, clip: clip % 2)  # fmt: skip
    rows_of = writer._rows_of
    writer._rows_of = lambda shard: [
        row.__class__(**{**vars(row), "tokens": rows_of(shard)[row.label].tokens}) for row in rows_of(shard)
    ]
    writer.write()
    data = {"train": {"same": writer.url}, "validation": {"same": writer.url}, "classes": ["hat", "shoes"]}
    path = train_file(
        tmp_path, tmp_path, steps=150, data=data, model={"label_drop": 0.1},
        optimizer={"learning_rate": 0.02, "ema": 0.9, "weight_decay": 0.0, "batch": 8},
        run={"validate_every": 50, "save_every": 150, "picture_every": 50, "log_every": 10},
    )  # fmt: skip
    assert run(["train-generator", str(path)]) == 0
    validated = [value for _, value in logged(tmp_path, "val_bits")]
    assert len(validated) == 3 and validated[-1] < 0.1
    config = generator_config(read_generator(tmp_path / "run" / "best"))
    assert config.trained and config.classes == ("hat", "shoes") and config.tokenizer_sha256 == "ab" * 32
    assert (tmp_path / "run" / "curve.svg").read_text().startswith("<svg")

    model = build_generator(read_generator(tmp_path / "run" / "best"))
    spec = LabelledTokenDataSpec(**data)
    batch = TokenBatches(spec, open_datasets(spec, None), batch=12, seed=0).next_batch()
    real = {int(label): bits[0] for label, bits in zip(batch.labels, batch.bits, strict=True)}
    for label, bits in real.items():
        drawn = sample_tokens(model, [label] * 4, 0, SamplingOptions(guidance=0.0))
        assert (drawn == bits).float().mean() > 0.95
        assert (drawn == real[1 - label]).float().mean() < 0.9


def test_labels_come_as_they_are_stored_and_are_dropped_by_share(datasets):
    spec = LabelledTokenDataSpec(train={"pictures": str(datasets / "pictures")}, classes=tuple(CLASSES))
    labels = [TokenBatches(spec, open_datasets(spec, None), batch=46, seed=3, label_drop=drop).next_batch().labels
              for drop in (0.0, 0.5, 1.0)]  # fmt: skip
    assert int(labels[0].min()) == 0 and int(labels[0].max()) == 9
    assert 8 < int((labels[1] == -1).sum()) < 38 and bool((labels[2] == -1).all())
    shown = labels[1] >= 0
    assert torch.equal(labels[1][shown], labels[0][shown])
    nameless = LabelledTokenDataSpec(train={"pictures": str(datasets / "pictures")})
    assert TokenBatches(nameless, open_datasets(nameless, None), batch=4, seed=3).next_batch().labels is None


def test_pictures_among_clips_are_learnt_from_alone(datasets, tmp_path):
    clips = {"path": str(datasets / "clips")}
    data = {"train": {"clips": clips}, "validation": {}}
    with pytest.raises(SpecError, match=r"'clips' has clips of up to 2 frames.*filters: \[\[frames"):
        train_generator(train_file(tmp_path, datasets, data=data))
    data["train"]["clips"]["filters"] = [["frames", "==", 1]]
    train_generator(train_file(tmp_path, datasets, steps=2, data=data))
    assert len(logged(tmp_path)) == 2


def test_mistakes_are_one_line(datasets, tmp_path):
    for sections, message in (
        ({"model": {"widht": 3}}, r"unknown key 'model.widht'.*'width'"),
        ({"model": {"label_drop": 1.5}}, r"model.label_drop is 1.5; it is a share from 0 to 1"),
        ({"model": {"preset": "generator-smal"}}, r"no generator 'generator-smal'.*'generator-small'"),
        ({"data": {"clases": ["hat"]}}, r"unknown key 'data.clases'.*'classes'"),
        ({"data": {"classes": ["hat", "hat"]}}, r"classes names 'hat' twice"),
        ({"data": {"classes": CLASSES[:4]}}, r"a row has label [4-9], but data.classes names 4 classes"),
        ({"optimizer": {"batch": 0}}, r"optimizer.batch is 0; it must be at least 1"),
    ):
        with pytest.raises(SpecError, match=message) as caught:
            train_generator(train_file(tmp_path, datasets, **sections))
        assert "\n" not in str(caught.value)


def test_another_run_is_not_gone_on_with(datasets, tmp_path):
    train_generator(train_file(tmp_path, datasets, steps=2))
    with pytest.raises(SpecError, match=r"begun with classes \['dress'"):
        path = train_file(tmp_path, datasets, steps=4, data={"classes": [*CLASSES, "sock"]})
        train_generator(path, resume=True)
    best = str(tmp_path / "run" / "best")
    train_generator(train_file(tmp_path / "next", datasets, steps=1, model={"init_from": best}))
    assert generator_config(read_generator(tmp_path / "next" / "run" / "generator")).width == 16
    with pytest.raises(SpecError, match=r"model.layers is 2, but the model of model.init_from has 1"):
        train_generator(train_file(tmp_path / "deeper", datasets, model={"init_from": best, "layers": 2}))
    with pytest.raises(SpecError, match=r"init_from: .* in 10 classes; the data has 6"):
        path = train_file(tmp_path / "other", datasets, model={"init_from": best}, data={"classes": [*CLASSES, "sock"]})
        train_generator(path)


def test_the_example_can_be_meant():
    spec = read_generator_train_spec(REPOSITORY / "examples" / "train_generator.yaml")
    config = generator_train_config(spec.training(), spec.data.classes)
    assert config.model.preset == "generator-small" and list(config.classes) == CLASSES


def test_every_setting_is_in_the_documentation_with_its_default():
    text = (REPOSITORY / "docs" / "synthesis.md").read_text()
    for section, values, names in (
        ("model", GeneratorPart(), [each.name for each in fields(GeneratorPart)]),
        ("data", LabelledTokenDataSpec(train={"a": "b"}), LabelledTokenDataSpec.model_fields),
    ):
        table = text.partition(f"\n### {section}\n")[2].partition("\n### ")[0].partition("\n## ")[0]
        for name in names:
            shown = f"`{getattr(values, name)!r}`" if name not in ("train", "validation", "classes") else ""
            assert f"| `{name}` | {shown}" in table, f"{section}.{name}"
