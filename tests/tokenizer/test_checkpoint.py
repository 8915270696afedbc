from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from schemas.errors import CheckpointError
from tokenizer import checkpoint
from tokenizer.bsqvit import BSQViT
from tokenizer.checkpoint import from_pretrained, read_checkpoint, save_checkpoint, weight_sha256
from tokenizer.config import PRESETS

TINY = "untrained:vit-tiny-32-l18"


@pytest.fixture
def saved(tiny, tmp_path):
    save_checkpoint(tiny, tmp_path / "saved")
    return tmp_path / "saved"


def test_a_saved_model_comes_back_equal(tiny, saved, generator):
    loaded = from_pretrained(saved)
    frames = torch.randint(0, 256, (2, 3, 32, 32, 3), dtype=torch.uint8, generator=generator)
    assert loaded.config == tiny.config
    assert not loaded.training
    assert torch.equal(loaded.encode(frames), tiny.encode(frames))
    assert weight_sha256(loaded) == weight_sha256(tiny) == read_checkpoint(saved).weight_sha256()
    assert all(each.requires_grad for each in loaded.parameters())
    assert sorted(each.name for each in saved.iterdir()) == ["config.json", "model.safetensors"]


def test_a_folder_is_found_by_path_and_by_url(saved, monkeypatch):
    monkeypatch.chdir(saved.parent)
    hashes = {
        read_checkpoint(source).weight_sha256()
        for source in (saved, str(saved), "saved", "./saved/", f"file://{saved}", f"file://{saved}/")
    }
    assert len(hashes) == 1


def test_a_checkpoint_in_an_object_store_is_read(saved):
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in saved.iterdir():
        memory.pipe_file(f"/bucket/tok/{file.name}", file.read_bytes())
    assert from_pretrained("memory://bucket/tok").config == PRESETS["vit-tiny-32-l18"]


def test_bfloat16_halves_the_file_and_loads_as_fp32(tiny, saved, tmp_path):
    save_checkpoint(tiny, tmp_path / "half", dtype=torch.bfloat16, trained=True, card="# Card\n")
    loaded = from_pretrained(tmp_path / "half")
    assert (tmp_path / "half" / "card.md").read_text() == "# Card\n"
    assert loaded.config == dataclasses.replace(tiny.config, trained=True)
    assert {each.dtype for each in loaded.parameters()} == {torch.float32}
    small, large = ((folder / "model.safetensors").stat().st_size for folder in (tmp_path / "half", saved))
    assert small < 0.52 * large


def test_the_default_is_an_untrained_model_until_weights_are_shipped(monkeypatch, tiny, tmp_path):
    monkeypatch.setattr(checkpoint, "SHIPPED", tmp_path)
    assert read_checkpoint("default").where == "untrained:vit-small-128-l18"
    assert not read_checkpoint("default").config().trained

    save_checkpoint(tiny, tmp_path / checkpoint.DEFAULT, trained=True)
    save_checkpoint(tiny, tmp_path / "other", trained=True)
    assert read_checkpoint("default").config().trained
    assert read_checkpoint("other").config().trained
    assert checkpoint.shipped_names() == ["other", "vit-small-128-l18"]


def test_untrained_weights_are_the_same_everywhere():
    """A golden vector: a change to the initialisation changes the fingerprint of jobs that use it."""
    assert read_checkpoint(TINY).weight_sha256() == "3cc4445d4bb704aabff84c0dd25a3cff6de1b5df337d37222ba88bfc0c730858"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("defualt", r"no tokenizer 'defualt'. Did you mean 'default'\?"),
        ("untrained:vit-tiny-23-l18", r"Did you mean 'vit-tiny-32-l18'\?"),
        ("vit-b8-256-l18", "'untrained:vit-b8-256-l18' gives that model with random weights"),
        ("./nowhere", r"\./nowhere: no weights can be read here \(config\.json: No such file"),
        ("memory://nowhere", "memory://nowhere: the checkpoint cannot be read"),
        ("nosuch://u:secret@host/x?sig=secret", r"nosuch://host/x: the checkpoint cannot be read \(ValueError\)"),
    ],
)
def test_an_unknown_source_is_explained_in_one_line(source, words):
    with pytest.raises(CheckpointError, match=words) as caught:
        from_pretrained(source)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def rewrite_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


class TestDamage:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda w: w.pop("to_latents.bias"), "missing to_latents.bias"),
            (lambda w: w.update(extra=torch.zeros(1)), "unexpected extra"),
            (lambda w: w.update({"to_latents.bias": torch.zeros(17)}), r"has shape \[17\] instead of \[18\]"),
            (lambda w: w.update({"to_latents.bias": torch.zeros(18, dtype=torch.int64)}), "is I64; weights are F32"),
            (lambda w: [w.pop(name) for name in list(w) if ".blocks.1." in name], "missing .* and 20 more"),
        ],
    )
    def test_every_weight_must_fit(self, saved, change, words):
        rewrite_weights(saved, change)
        with pytest.raises(CheckpointError, match=words) as caught:
            from_pretrained(saved)
        assert str(saved) in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("{", "Expecting"),
            ("[]", "expected an object"),
            ("[" * 100_000, "recursion"),
            ("{}", "'image_size' is missing"),
        ],
    )
    def test_a_config_that_cannot_be_used(self, saved, content, words):
        (saved / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=words):
            from_pretrained(saved)

    def test_a_config_that_asks_for_more_than_the_file_holds_allocates_nothing(self, saved):
        config = json.loads((saved / "config.json").read_text())
        config["encoder"] = {**config["encoder"], "width": 16384, "layers": 256, "heads": 1}
        (saved / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="the weights do not fit the config"):
            from_pretrained(saved)

    def test_a_huge_config_is_not_read(self, saved):
        with (saved / "config.json").open("wb") as file:
            file.truncate(1 << 40)
        with pytest.raises(CheckpointError, match="1,099,511,627,776 bytes; at most 1,048,576"):
            from_pretrained(saved)

    def test_a_truncated_model_is_refused(self, saved):
        content = (saved / "model.safetensors").read_bytes()
        (saved / "model.safetensors").write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match="the tensors end at byte"):
            from_pretrained(saved)

    def test_a_checkpoint_half_written_is_none(self, tiny, saved, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(checkpoint.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            save_checkpoint(tiny, saved)
        assert sorted(each.name for each in saved.iterdir()) == ["model.safetensors"]


class TestAdapting:
    def test_an_image_tokenizer_starts_a_video_one(self, tmp_path, generator):
        image_model = BSQViT(dataclasses.replace(PRESETS["vit-tiny-32-l18"], max_frames=1)).eval()
        save_checkpoint(image_model, tmp_path)
        video_model = from_pretrained(tmp_path, max_frames=4)
        clip = torch.randint(0, 256, (1, 4, 32, 32, 3), dtype=torch.uint8, generator=generator)
        assert torch.equal(video_model.encode(clip)[:, :1], image_model.encode(clip[:, :1]))

    def test_fewer_and_more_frames_keep_the_learned_positions(self, tiny, saved):
        with torch.no_grad():
            tiny_copy = from_pretrained(saved)
            tiny_copy.encoder.transformer.temporal.normal_()
        save_checkpoint(tiny_copy, saved)
        learned = tiny_copy.encoder.transformer.temporal
        assert torch.equal(from_pretrained(saved, max_frames=3).encoder.transformer.temporal, learned[:3])
        more = from_pretrained(saved, max_frames=10).encoder.transformer.temporal
        assert torch.equal(more[:8], learned)
        assert not more[8:].any()
        assert from_pretrained(saved, max_frames=1).encoder.transformer.temporal is None

    def test_positions_are_interpolated_on_request_only(self, saved):
        larger = from_pretrained(saved, image_size=64)
        assert larger.config.grid == (8, 8)
        assert larger.encode(torch.zeros(1, 1, 64, 64, 3, dtype=torch.uint8)).shape == (1, 1, 8, 8, 18)
        ramp = torch.arange(4.0)[:, None].expand(4, 4).reshape(16, 1).expand(16, 64).contiguous()
        rewrite_weights(saved, lambda w: w.update({"encoder.transformer.position": ramp}))
        plane = from_pretrained(saved, image_size=64).encoder.transformer.position.reshape(8, 8, 64)
        # Rows stay rows: the ramp runs down, and every column is the same.
        assert (plane[1:, :, 0] > plane[:-1, :, 0]).all()
        torch.testing.assert_close(plane, plane[:, :1].expand_as(plane), rtol=0, atol=1e-5)


def test_a_checkpoint_copied_as_bytes_is_the_same(saved, tmp_path):
    files = read_checkpoint(saved)
    shutil.rmtree(saved)
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "config.json").write_bytes(files.config_json)
    (copy / "model.safetensors").write_bytes(files.model_safetensors)
    assert read_checkpoint(copy).weight_sha256() == files.weight_sha256()
