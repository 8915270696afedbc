"""`bsq train`: a training file becomes a tokenizer, a resumed one the same, and mistakes one line."""

from __future__ import annotations

import dataclasses
import io
import shutil
import signal
import subprocess

import numpy as np
import pytest
import yaml
from PIL import Image

from jobs.cli import run
from jobs.train import TrainDisplay, decode_ahead, train
from schemas.errors import SpecError
from schemas.trainspec import TrainDataSpec, parse_train_spec, read_train_spec
from tests.tiny_corpus import BSQ, REPOSITORY, bsq_environment
from tests.tiny_training import logged_losses as losses
from tests.tiny_training import write_train_file as write_config
from tokenizer.checkpoint import from_pretrained, weight_sha256
from tokenizer.train_config import RECIPES, train_config
from tokenizer.train_log import TrainReport, picture_grid, write_png
from tokenizer.train_state import find_states, load_state
from tokenizer.trainer import main as train_from_arrays


@pytest.mark.parametrize("hold", [True, False])
def test_a_training_file_makes_a_tokenizer_and_a_resumed_run_the_same(tmp_path, small_shards, hold):
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    shown = io.StringIO()
    tokenizer = train(write_config(folders[0], small_shards, data={"hold": hold}), stream=shown)
    assert from_pretrained(tokenizer).config.trained
    train(write_config(folders[1], small_shards, steps=2, data={"hold": hold}), stream=io.StringIO())
    # The file's steps are the end of the cosine, so compare only that the run goes on and its data do not repeat.
    train(write_config(folders[1], small_shards, data={"hold": hold}), resume=True, stream=io.StringIO())
    whole, parts = (losses(folder / "run") for folder in folders)
    assert len(whole) == len(parts) == 4 and whole[0] == parts[0]
    states = [load_state(find_states(folder / "run" / "states")[-1]).values["batches"] for folder in folders]
    assert states[0] == states[1]
    text = shown.getvalue()
    assert "step 4 of 4: loss" in text and "val_psnr" in text and "step-00000004.png" in text
    with Image.open(tmp_path / "whole" / "run" / "pictures" / "step-00000004.png") as picture:
        assert picture.size == (4 * 36 - 4, 2 * 32 + 4)


def test_the_command_saves_on_sigterm_and_says_how_to_go_on(tmp_path, small_shards):
    config = write_config(tmp_path, small_shards, steps=100_000)
    command = [*BSQ, "train", str(config)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=bsq_environment(), cwd=REPOSITORY)
    for line in process.stderr:
        if "step 1 of" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "Interrupted: Saved after step" in rest and "--resume" in rest
    assert find_states(tmp_path / "run" / "states")


def test_frames_that_are_decoded_ahead_train_the_same_tokenizer(tmp_path, small_shards, capsys):
    """On a machine without codecs; `torch` and NumPy are enough there."""
    config = write_config(tmp_path, small_shards)
    whole = train(config, stream=io.StringIO())
    decode_ahead(config, tmp_path / "frames", stream=io.StringIO())
    arguments = ["--frames", tmp_path / "frames", "--validation", tmp_path / "frames" / "validation",
                 "--config", tmp_path / "frames" / "config.json", "--out", tmp_path / "bare"]  # fmt: skip
    assert train_from_arrays([str(each) for each in arguments]) == 0, capsys.readouterr().err
    assert losses(tmp_path / "bare") == losses(tmp_path / "run")
    assert weight_sha256(from_pretrained(whole)) == weight_sha256(from_pretrained(tmp_path / "bare" / "tokenizer"))


def test_compact_frames_are_close_fit_their_bytes_and_train_without_our_codecs(tmp_path, small_shards, capsys):
    config = write_config(tmp_path, small_shards)
    told = io.StringIO()
    decode_ahead(config, tmp_path / "frames", stream=io.StringIO())
    # Two kinds of files would be read twice: the earlier ones go.
    decode_ahead(config, tmp_path / "frames", most_bytes=400_000, stream=told)
    names = {path.name for path in (tmp_path / "frames").iterdir()}
    assert names == {"images.npz", "clips.npz", "validation", "config.json"}
    assert "of JPEG at quality" in told.getvalue()
    assert sum(path.stat().st_size for path in (tmp_path / "frames").rglob("*")) < 400_000 + 8_000
    folders = ["--frames", str(tmp_path / "frames"), "--validation", str(tmp_path / "frames" / "validation")]
    settings = ["--config", str(tmp_path / "frames" / "config.json"), "--out", str(tmp_path / "bare")]
    assert train_from_arrays([*folders, *settings]) == 0, capsys.readouterr().err
    assert from_pretrained(tmp_path / "bare" / "tokenizer").config.trained


def test_frames_that_cannot_fit_are_refused_with_what_to_lower(tmp_path, small_shards):
    config = write_config(tmp_path, small_shards)
    with pytest.raises(SpecError, match=r"quality 75, and [\d,]+ are left for them\. Lower data\.hold_views"):
        decode_ahead(config, tmp_path / "frames", most_bytes=30_000, stream=io.StringIO())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--compact", "5"], "SpecError: --compact goes with --decode-to only"),
        (["--cpus-per-worker", "2"], "SpecError: --cpus-per-worker and --ray-address go with --ray-workers only"),
        (["--ray-address", "auto"], "SpecError: --cpus-per-worker and --ray-address go with --ray-workers only"),
    ],
)
def test_options_that_mean_nothing_alone_are_refused(arguments, words, tmp_path, small_shards, capsys):
    assert run(["train", str(write_config(tmp_path, small_shards)), *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(dat=v.pop("data")), r"unknown key 'dat'. Did you mean 'data'\?"),
        (lambda v: v["data"].update(image=[]), r"unknown key 'data.image'. Did you mean 'images'\?"),
        (lambda v: v["data"].update(limits={"max_pixel": 1}), r"'data.limits.max_pixel'. Did you mean 'max_pixels'\?"),
        (lambda v: v["data"].update(images=[], clips=[]), "data names no shards"),
        (lambda v: v["data"].update(hold_views=True), r"data.hold_views must be a valid integer \(found True\)"),
        (lambda v: v["data"].update(hold_views=0), r"data.hold_views must be greater than or equal to 1 \(found 0\)"),
        (lambda v: v["data"].update(fps=-1), "data.fps"),
        (lambda v: v.pop("data"), "'data' is missing"),
        (lambda v: v.update(out=""), "name a local folder for the run"),
        (lambda v: v["optimizer"].update(stepz=1), r"unknown key 'optimizer.stepz'. Did you mean 'steps'\?"),
        (lambda v: v["run"].update(device="tpu9"), "run.device is 'tpu9'"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, small_shards, change, words):
    path = write_config(tmp_path, small_shards)
    values = yaml.safe_load(path.read_text())
    change(values)
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SpecError, match=words) as refusal:
        train(path, stream=io.StringIO())
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_missing_or_no_yaml_is_one_line(tmp_path):
    with pytest.raises(SpecError, match="cannot be read"):
        read_train_spec(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("data: [")
    with pytest.raises(SpecError, match="not valid YAML in line"):
        read_train_spec(tmp_path / "bad.yaml")
    with pytest.raises(SpecError, match="a training file is a mapping"):
        parse_train_spec([], source="x")


def test_the_example_can_be_meant():
    spec = read_train_spec(REPOSITORY / "examples" / "train_small.yaml")
    config = train_config(spec.training())
    model = config.model_config()
    assert (model.encoder.width, model.encoder.layers, model.bits_per_token, model.max_frames) == (192, 4, 18, 16)
    assert config.losses.entropy_weight == 0.002 and config.losses.quantizer.codebook_entropy == "bit"


def test_every_setting_is_in_the_documentation_with_its_default():
    text = (REPOSITORY / "docs" / "training.md").read_text()
    sections = {name: getattr(train_config({"recipe": "no-lpips"}), name) for name in
                ("losses", "discriminator", "optimizer", "sampling", "run", "model")}  # fmt: skip
    recipe = RECIPES["no-lpips"]
    for section, part in sections.items():
        table = text.partition(f"\n### {section}\n")[2].partition("\n### ")[0]
        for field in dataclasses.fields(part):
            changed = field.name in recipe.get(section, {})
            default = "see below" if field.name == "quantizer" else f"`{getattr(part, field.name)!r}`"
            assert f"| `{field.name}` | " in table, f"{section}.{field.name}"
            assert changed or f"| `{field.name}` | {default} |" in table, field.name
    table = text.partition("\n### data\n")[2]
    assert all(f"| `{name}` | " in table for name in TrainDataSpec.model_fields)


def test_lines_are_few_without_a_terminal_and_tell_the_time_left():
    stream = io.StringIO()
    display = TrainDisplay(stream)
    for step in range(1, 50):
        display.observe(TrainReport(step, 100, {"loss": 1.0, "psnr": 20.0}, eta_seconds=100.0 - step))
    display.observe(TrainReport(50, 100, line="A channel is dead."))
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "step 1 of 100: loss 1, psnr 20, 1 min 39 s left" in lines[0] and "dead" in lines[1]


def test_a_run_goes_on_with_data_that_is_decoded_alike_alone(tmp_path, small_shards):
    train(write_config(tmp_path, small_shards, steps=2, data={"hold": False}), stream=io.StringIO())
    for change, words in (
        ({"filter": "lanczos"}, r"begun with data.filter 'bilinear', now it is 'lanczos'"),
        ({"random_scale": [0.5, 1.0]}, r"begun with data.random_scale \[0.6, 1.0\], now it is \[0.5, 1.0\]"),
        ({"limits": {"max_side": 4000}}, r"begun with data.limits.max_side 32768, now it is 4000"),
    ):
        path = write_config(tmp_path, small_shards, steps=3, data={"hold": False, **change})
        with pytest.raises(SpecError, match=words) as refusal:
            train(path, resume=True, stream=io.StringIO())
        assert "\n" not in str(refusal.value)
    (tmp_path / "moved").mkdir()
    moved = [shutil.copy(shard, tmp_path / "moved") for shard in small_shards]
    train(write_config(tmp_path, moved, steps=3, data={"hold": False}), resume=True, stream=io.StringIO())
    assert len(losses(tmp_path / "run")) == 3


def test_tensorboard_gets_the_numbers_and_pictures_where_it_is_installed(tmp_path, small_shards):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train(write_config(tmp_path, small_shards), stream=io.StringIO())
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    names = {"loss", "psnr", "grad_norm", "code_usage", "samples_per_second", "channel_bits/17", "val_psnr"}
    assert names <= set(events.Tags()["scalars"]) and events.Tags()["images"] == ["reconstructions"]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(tmp_path / "run"))


def test_tensorboard_keeps_what_a_run_has_done_before_it_is_prolonged(tmp_path, small_shards):
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (2, 3):
        train(write_config(tmp_path, small_shards, steps=steps), resume=True, stream=io.StringIO())
    events = accumulators.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_pictures_are_png_files_that_others_read(tmp_path):
    generator = np.random.default_rng(0)
    pictures = list(generator.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8))
    write_png(tmp_path / "grid.png", picture_grid(pictures, pictures[::-1]))
    with Image.open(tmp_path / "grid.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (8 + 4 + 8, 3 * 8 + 2 * 4, 3)
    assert np.array_equal(pixels[:8, :8], pictures[0]) and np.array_equal(pixels[12:, :8], pictures[2])
