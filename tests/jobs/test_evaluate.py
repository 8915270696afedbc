"""`bsq evaluate`: numbers that hold when computed again, codecs beside them, pictures, and mistakes in one line."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest
import scipy.special
import skimage.metrics
import torch
from PIL import Image

from jobs.cli import run
from jobs.evaluate import EvaluationOptions, clip_reader, evaluate, reconstruct
from jobs.evaluation_sheet import describe_report
from pipeline.training_batches import Complaints
from schemas.errors import CheckpointError
from schemas.evaluation import EvaluationReport
from tests.tiny_corpus import jpeg, photo_members, write_tar
from tokenizer import from_pretrained
from tokenizer.checkpoint import save_checkpoint
from tokenizer.codes import pack_bits

TINY = "untrained:vit-tiny-32-l18"
ONE_THREAD = {"device": "cpu", "threads": 1}


@pytest.fixture(scope="module")
def evaluated(small_shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("evaluated")
    shown = io.StringIO()
    report = evaluate(
        TINY, [str(small_shards[2])], out, EvaluationOptions(batch=3, clips_per_video=2, **ONE_THREAD), stream=shown
    )
    return report, out, shown.getvalue()


def originals(shards, **options):
    """What is measured, read again: uint8 [T, H, W, 3] each."""
    config = from_pretrained(TINY).config
    reader = clip_reader([str(shard) for shard in shards], config, EvaluationOptions(**ONE_THREAD, **options))
    return [clip.frames_TCHW.permute(0, 2, 3, 1) for clip in reader.read(Complaints(lambda line: None))]


def test_the_file_is_the_report_and_names_every_setting(evaluated, small_shards):
    report, out, _ = evaluated
    stored = json.loads((out / "evaluation.json").read_text())
    assert EvaluationReport.model_validate(stored) == report
    assert stored["format"] == "bsqtok-evaluation" and stored["format_version"] == 1
    assert stored["shards"] == [str(small_shards[2])]
    assert stored["tokenizer"]["weight_sha256"] and stored["tokenizer"]["config"]["trained"] is False
    assert (report.filter, report.engine, report.crop, report.fps, report.clip_frames) == (
        "lanczos", "torch", "center", "source", 8)  # fmt: skip
    assert {method.filter for result in report.results for method in result.methods} == {"lanczos"}
    assert report.arithmetic["dtype"] == "float32" and report.left_out == 0 and report.networks == {}


def test_the_numbers_of_the_tokens_hold_when_they_are_computed_again(evaluated, small_shards):
    report, _, _ = evaluated
    model = from_pretrained(TINY)
    clips = originals([small_shards[2]], clips_per_video=2)
    kinds = {"images": [clip for clip in clips if len(clip) == 1], "clips": [clip for clip in clips if len(clip) > 1]}
    assert [len(clip) for clip in kinds["clips"]] == [5, 8, 3] and len(kinds["images"]) == 8
    assert [result.kind for result in report.results] == ["images", "clips"]
    for result in report.results:
        expected, bits = [], []
        for clip in kinds[result.kind]:
            made = ((model(clip[None])[0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
            bits.append(model.encode(clip[None]).reshape(-1, 18).numpy())
            pairs = zip(clip.numpy(), made, strict=True)
            expected.append(np.mean([skimage.metrics.peak_signal_noise_ratio(a, b, data_range=255) for a, b in pairs]))
        tokens = result.methods[0]
        assert tokens.method == "tokens" and tokens.equal is None
        assert [item.measures["psnr"] for item in result.per_item] == pytest.approx(expected, abs=1e-4)
        assert tokens.measures["psnr"].mean == pytest.approx(np.mean(expected), abs=1e-4)
        assert tokens.measures["psnr"].std == pytest.approx(np.std(expected), abs=1e-4)
        assert set(tokens.measures) == {"psnr", "ssim", "ms_ssim_w7_s3", "ms_ssim_w7_s3_db"}
        ones = np.concatenate(bits).mean(0)
        entropy = (scipy.special.entr(ones) + scipy.special.entr(1 - ones)) / np.log(2)
        assert result.codes.channel_entropy_bits == pytest.approx(entropy.tolist(), abs=1e-6)
        assert result.codes.least_channel_entropy_bits == min(result.codes.channel_entropy_bits)
        first = np.concatenate(bits)[:, :9] @ (1 << np.arange(9))
        assert result.codes.groups[0].used == len(np.unique(first)) and result.codes.groups[0].codes == 512
        assert result.codes.tokens == len(first)
        assert (result.items, result.frames) == (len(expected), sum(map(len, kinds[result.kind])))


def test_bytes_of_the_tokens_are_those_that_a_dataset_stores(evaluated):
    report, _, _ = evaluated
    tokens = report.results[0].methods[0]
    assert tokens.payload_bytes_per_frame == pack_bits(torch.zeros(1, 16, 18, dtype=torch.bool)).shape[1] == 36
    assert tokens.payload_bits_per_pixel == tokens.file_bits_per_pixel == 18 / 64


def test_codecs_stand_beside_at_equal_payload_and_at_equal_file_size(evaluated):
    report, _, _ = evaluated
    images, clips = report.results
    by_way = {way: {each.method: each for each in images.methods if each.equal == way} for way in ("payload", "file")}
    assert set(by_way["payload"]) == set(by_way["file"]) >= {"jpeg", "jpeg2000", "webp"}
    for method in by_way["payload"].values():
        assert method.payload_bytes_per_frame < method.file_bytes_per_frame
        assert method.payload_bits_per_pixel == pytest.approx(method.payload_bytes_per_frame * 8 / 32**2)
        assert method.measures["psnr"].mean > 10 and set(method.measures) == set(images.methods[0].measures)
    assert by_way["payload"]["jpeg"].payload_bytes_per_frame == pytest.approx(36, abs=3)
    assert [each.method for each in clips.methods] == ["tokens", "x264", "x264"]


def test_the_pictures_and_the_words_show_the_same_items_and_numbers(evaluated):
    report, out, shown = evaluated
    for result in report.results:
        with Image.open(out / result.picture) as picture:
            assert picture.format == "PNG" and picture.width > 300 and picture.height > 300
    text = describe_report(report)
    assert "random weights (it was never trained)" in text and "32 px by lanczos (torch)" in text
    row = next(line for line in text.splitlines() if line.split()[:1] == ["tokens"])
    assert f"{report.results[0].methods[0].measures['psnr'].mean:.2f} ±" in row
    assert "at equal file size:" in text and "least channel entropy" in text
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert shown == "" or "images, PSNR" in shown  # a line every ten seconds


def test_the_size_of_batches_changes_no_number(evaluated, small_shards, tmp_path):
    report, _, _ = evaluated
    options = EvaluationOptions(batch=64, clips_per_video=2, codecs=False, device="cpu", threads=3)
    other = evaluate(TINY, [str(small_shards[2])], tmp_path, options, stream=io.StringIO())
    for first, second in zip(report.results, other.results, strict=True):
        assert first.codes == second.codes and first.per_item == second.per_item
        assert first.methods[0] == second.methods[0] and len(second.methods) == 1


def test_a_tokenizer_for_images_takes_the_frames_of_clips_one_by_one(small_shards, tmp_path):
    save_checkpoint(from_pretrained(TINY, max_frames=1), tmp_path / "image")
    options = EvaluationOptions(codecs=False, **ONE_THREAD)
    report = evaluate(str(tmp_path / "image"), [str(small_shards[2])], tmp_path / "out", options, stream=io.StringIO())
    clips = report.results[1]
    assert report.clip_frames == 16 and clips.frames == 5 + 11
    model = from_pretrained(tmp_path / "image")
    frames = next(clip for clip in originals([small_shards[2]]) if len(clip) == 5)
    made, bits = reconstruct(model, frames[None])
    assert torch.equal(bits[0], torch.cat([model.encode(frame[None, None])[0] for frame in frames]))
    assert made.shape == (1, 5, 32, 32, 3) and made.dtype == torch.uint8


def test_samples_that_cannot_be_read_are_counted_told_and_end_with_3(tmp_path, capsys):
    shard = write_tar(tmp_path / "bad.tar", [*photo_members(0, 2), ("cut.jpg", jpeg(9)[:400])])
    assert run(["evaluate", TINY, str(shard), "--out", str(tmp_path / "out"), "--no-codecs"]) == 3
    captured = capsys.readouterr()
    assert "bad.tar: cut: left out" in captured.err and "1 samples or shards could not be read" in captured.out
    stored = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert stored["left_out"] == 1 and stored["results"][0]["items"] == 2


def test_the_command_writes_where_it_says_and_only_there(small_shards, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["evaluate", TINY, str(small_shards[0]), "--limit", "2", "--no-codecs", "--filter", "bicubic"]
    assert run(arguments) == 0
    assert sorted(path.name for path in (tmp_path / "evaluation").iterdir()) == ["evaluation.json", "images.png"]
    out = capsys.readouterr().out
    assert "2 images, 32 px by bicubic" in out and "Wrote evaluation/evaluation.json, evaluation/images.png" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["untraind:vit-tiny-32-l18", "x.tar"], r"CheckpointError: There is no tokenizer .* Did you mean"),
        ([TINY, "/nowhere/*.tar"], r"SpecError: .*nowhere"),
        (
            [TINY, "{shard}", "--fps", "fast"],
            r"SpecError: --fps is 'fast'; give frames per second, such as 8, or source",
        ),
        (
            [TINY, "{shard}", "--lpips", "/nowhere"],
            r"CheckpointError: /nowhere/vgg16.safetensors: .*nothing is fetched",
        ),
        ([TINY, "{shard}", "--inception", "/nowhere/i.pth"], r"CheckpointError: /nowhere/i.pth: .*nothing is fetched"),
        ([TINY, "{shard}", "--i3d", "/nowhere/i3d.pt"], r"CheckpointError: /nowhere/i3d.pt: .*nothing is fetched"),
        ([TINY, "{shard}", "--device", "cuda"], r"SpecError: .*GPU"),
        ([TINY, "{words}"], r"SpecError: .*no picture or video of 1 shards could be measured"),
    ],
)
def test_a_mistake_is_one_line_and_ends_with_2(arguments, line, small_shards, tmp_path, capsys):
    if "--device" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    words = write_tar(tmp_path / "words.tar", [("a.txt", b"no picture")])
    filled = [each.format(shard=small_shards[0], words=words) for each in arguments]
    assert run(["evaluate", *filled, "--out", str(tmp_path / "out")]) == 2
    errors = [each for each in capsys.readouterr().err.splitlines() if "Error: " in each]
    assert len(errors) == 1 and re.match(line, errors[0]), errors
    assert not (tmp_path / "out").exists()


def test_weights_that_make_no_numbers_are_refused(small_shards, tmp_path):
    model = from_pretrained(TINY)
    with torch.no_grad():
        model.decoder.transformer.position.fill_(float("nan"))
    save_checkpoint(model, tmp_path / "broken")
    with pytest.raises(CheckpointError, match="NaN or infinity"):
        evaluate(str(tmp_path / "broken"), [str(small_shards[0])], tmp_path / "out",
                 EvaluationOptions(codecs=False, **ONE_THREAD), stream=io.StringIO())  # fmt: skip


@pytest.mark.shared
@pytest.mark.long
def test_codecs_on_the_shared_photographs_are_where_they_were_measured_before(shared, tmp_path):
    """192 photographs at 128 px: PSNR and MS-SSIM of each codec at 576 bytes of payload."""
    untrained = "untrained:vit-small-128-l18"
    shards = [str(shared / "data" / "val-photos" / "*.tar")]
    report = evaluate(untrained, shards, tmp_path, stream=io.StringIO())
    expected = {"jpeg": (24.0, 0.895), "jpeg2000": (25.0, 0.911), "webp": (25.1, 0.913), "avif": (26.4, 0.941)}
    for method in report.results[0].methods:
        if method.equal == "payload" and method.method in expected:
            psnr, similarity = expected[method.method]
            assert method.measures["psnr"].mean == pytest.approx(psnr, abs=0.15), method.method
            assert method.measures["ms_ssim_w7"].mean == pytest.approx(similarity, abs=0.002), method.method
            assert method.payload_bytes_per_frame == pytest.approx(576, rel=0.02), method.method
