"""A run learns, resumes on the same losses, and says what goes wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from schemas.errors import CheckpointError, Interrupted, SpecError
from tests.tiny_training import CPU, FULL, frames, losses, settings, train
from tokenizer.checkpoint import from_pretrained, save_checkpoint
from tokenizer.losses import ms_ssim
from tokenizer.train_loop import TrainingDiverged
from tokenizer.train_state import find_states, load_state
from tokenizer.train_step import CodeUsage, Learner, starting_model
from tokenizer.trainer import Trainer, held_batches

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_small_recipe_learns(tmp_path):
    config = settings(optimizer={"steps": 60, "batch_images": 8, "learning_rate": 3e-3}, run={"log_every": 10})
    reports = []
    train(config, tmp_path, [frames(16, 1)], reports=reports, validation=[torch.from_numpy(frames(4, 1, 32, seed=2))])
    values = [report.values for report in reports if "psnr" in report.values]
    assert values[-1]["mse"] < 0.6 * values[0]["mse"]
    assert values[-1]["psnr"] > values[0]["psnr"] + 2
    validated = [report.values["val_psnr"] for report in reports if "val_psnr" in report.values]
    assert validated and validated[-1] > 10
    assert (tmp_path / "pictures" / "step-00000060.png").exists()
    words = [text.text for text in ElementTree.parse(tmp_path / "curve.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {word.split()[0] for word in words} >= {"PSNR,", "psnr", "val_psnr"}
    for name in ("tokenizer", "best"):
        assert from_pretrained(tmp_path / name).config.trained


@pytest.mark.parametrize("recipe", ["small-cpu", "no-lpips"])
@pytest.mark.parametrize("killed_after", [1, 3, 4])
def test_a_run_that_is_resumed_goes_on_with_equal_losses(tmp_path, recipe, killed_after):
    config = settings(recipe, **(FULL if recipe == "no-lpips" else {}))
    whole = train(config, tmp_path / "whole")
    out = tmp_path / "resumed"
    with pytest.raises(Interrupted, match=f"Saved after step {killed_after} of 6.*--resume"):
        train(config, out, stop_after=killed_after)
    resumed = train(config, out, resume=True)
    assert losses(out) == losses(tmp_path / "whole") and len(losses(out)) == 6
    states = [load_state(find_states(folder / "states")[-1]) for folder in (out, tmp_path / "whole")]
    assert states[0].tensors.keys() == states[1].tensors.keys()
    assert all(torch.equal(states[0].tensors[name], value) for name, value in states[1].tensors.items())
    assert whole.learner.average.num_updates == resumed.learner.average.num_updates == 6


@pytest.mark.parametrize("killed_after", [3, 5])
def test_a_run_that_is_interrupted_within_a_log_interval_logs_what_one_logs_that_is_not(tmp_path, killed_after):
    config = settings(run={"log_every": 4})
    train(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(config, tmp_path / "parts", stop_after=killed_after)
    train(config, tmp_path / "parts", resume=True)
    logs = []
    for name in ("whole", "parts"):
        lines = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        logs.append([{**line, "samples_per_second": None} for line in lines])
    assert logs[0] == logs[1] and [line["step"] for line in logs[0]] == [4, 6]
    assert {"loss", "code_usage", "channel_bits"} < logs[0][0].keys()


def test_the_log_counts_the_updates_of_an_interval_that_were_left_out(tmp_path):
    config = settings(run={"log_every": 3})
    trainer = Trainer(config, held_batches(config, [frames(5, 1)], CPU), tmp_path)
    trainer.begin(resume=False)
    update, autoencode = trainer.learner.update, trainer.learner._autoencode

    def poisoned_twice(batch, step):
        bad = step in (0, 2)
        trainer.learner._autoencode = (lambda each: _poisoned(trainer.learner.model, each)) if bad else autoencode
        return update(batch, step)

    trainer.learner.update = poisoned_twice
    trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"]) for line in lines] == [(3, 2), (6, 0)]
    assert all(np.isfinite(line["loss"]) for line in lines)


def test_steps_after_the_last_state_are_done_again_and_logged_once(tmp_path):
    config = settings()
    train(config, tmp_path / "whole")
    out = tmp_path / "killed"
    with pytest.raises(Interrupted):
        train(config, out, stop_after=5)
    find_states(out / "states")[-1].unlink()  # as if killed before it was written: the one of step 4 is there
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    train(config, out, resume=True)
    assert losses(out) == losses(tmp_path / "whole")


def test_a_folder_with_a_run_is_refused_without_resume_and_with_other_settings(tmp_path):
    train(settings(optimizer={"steps": 2}), tmp_path)
    with pytest.raises(SpecError, match=r"holds a run\. Add --resume"):
        train(settings(optimizer={"steps": 2}), tmp_path)
    with pytest.raises(SpecError, match=r"begun with optimizer.learning_rate 0.001, now it is 0.5"):
        train(settings(optimizer={"steps": 2, "learning_rate": 0.5}), tmp_path, resume=True)
    with pytest.raises(SpecError, match="begun with frames of shapes"):
        train(settings(optimizer={"steps": 4}), tmp_path, [frames(3, 1)], resume=True)
    assert train(settings(optimizer={"steps": 4}), tmp_path, resume=True).step == 4


def test_only_the_last_states_are_kept_and_a_damaged_one_is_named(tmp_path):
    (tmp_path / "states").mkdir()
    (tmp_path / "states" / ".state-00000003.safetensors.tmp").write_bytes(b"of a run that was killed")
    train(settings(run={"save_every": 1, "keep_last": 2}), tmp_path)
    kept = find_states(tmp_path / "states")
    assert [path.name for path in kept] == ["state-00000005.safetensors", "state-00000006.safetensors"]
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == [path.name for path in kept]
    kept[-1].write_bytes(kept[-1].read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"state-00000006.safetensors: .* Remove it to use the one before"):
        train(settings(), tmp_path, resume=True)


def test_the_adversarial_loss_reaches_both_and_r1_is_lazy(tmp_path):
    config = settings("no-lpips", losses={"adversarial_start": 2, "r1_every": 2})
    reports = []
    trainer = train(config, tmp_path, reports=reports)
    values = [report.values for report in reports if "loss" in report.values]
    assert ["generator" in each for each in values] == [False, False, True, True, True, True]
    assert ["r1" in each for each in values] == [False, False, True, False, True, False]
    fresh = Learner(config, starting_model(config, CPU), CPU)
    assert not torch.equal(fresh.discriminator.from_rgb.weight, trainer.learner.discriminator.from_rgb.weight)


def test_the_quantizer_loss_counts_although_the_discriminator_waits():
    """The reference leaves it out until its discriminator begins."""
    gradients = []
    for weight in (0.0, 10.0):
        config = settings("no-lpips", losses={"adversarial_start": 9, "entropy_weight": weight})
        learner = Learner(config, starting_model(config, CPU), CPU)
        batch = torch.from_numpy(frames(4, 1, 32))
        learner._tokenizer_gradients(batch, batch.flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1, 0)
        gradients.append(learner.model.to_latents.weight.grad.clone())
    assert not torch.allclose(gradients[0], gradients[1])


@pytest.mark.parametrize(("made", "real"), [(128, 131), (20, 23), (230, 226)])
def test_the_ms_ssim_that_is_learnt_is_the_metric_of_the_same_pictures(made, real, generator):
    """Also of grey, whose mean is about 0 where pixels go from -1 to 1."""
    noise = torch.randint(-4, 5, (2, 2, 3, 128, 128), generator=generator)
    pair = [level + each.float() for level, each in zip((made, real), noise, strict=True)]
    config = settings("no-lpips", losses={"adversarial_weight": 0.0})
    learner = Learner(config, starting_model(config, CPU), CPU)
    total, metrics = learner._similarity(*(each / 127.5 - 1 for each in pair))
    expected = 1 - float(ms_ssim(*pair, data_range=255.0, taps=7).mean())
    assert float(total - metrics["l1"]) == pytest.approx(0.1 * expected, abs=1e-5)


def test_recomputed_activations_give_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        config = settings(run={"checkpoint_blocks": recompute})
        learner = Learner(config, starting_model(config, CPU), CPU)
        output = learner.model.autoencode(torch.from_numpy(frames(2, 2, 32)))
        output.unclamped.square().mean().backward()
        gradients.append([each.grad for each in learner.model.parameters()])
        assert learner.model.state_dict().keys() == starting_model(config, CPU).state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.longest
def test_compiled_code_learns_the_same(tmp_path):
    """Of pictures and of clips, with a discriminator and its penalty."""
    curves = []
    for compiled in (False, True):
        config = settings("no-lpips", **FULL, run={"compile": compiled})
        train(config, tmp_path / str(compiled))
        curves.append(losses(tmp_path / str(compiled)))
    assert len(curves[0]) == 6
    for plain, fast in zip(*curves, strict=True):
        assert fast == pytest.approx(plain, rel=1e-3)


def test_under_bf16_the_quantizer_stays_in_fp32_and_training_works(tmp_path):
    config = settings(run={"dtype": "bfloat16"}, optimizer={"steps": 2})
    model = starting_model(config, CPU)
    quantized = model.autoencode(torch.from_numpy(frames(1, 1, 32))).quantized
    assert {quantized.codes.dtype, *(each.dtype for each in quantized.losses)} == {torch.float32}
    assert torch.allclose(quantized.codes.abs(), torch.full_like(quantized.codes, 18**-0.5))
    train(config, tmp_path)


def test_gradients_that_are_no_numbers_change_nothing_and_end_the_run_when_they_persist(tmp_path):
    config = settings(optimizer={"steps": 50})
    reports = []
    trainer = Trainer(config, held_batches(config, [frames(5, 1)], CPU), tmp_path, observer=reports.append)
    trainer.begin(resume=False)
    before = {name: value.clone() for name, value in trainer.learner.model.state_dict().items()}
    trainer.learner._autoencode = lambda batch: _poisoned(trainer.learner.model, batch)
    with pytest.raises(TrainingDiverged, match=r"No finite gradient in 20 updates.*learning_rate"):
        trainer.run()
    assert all(torch.equal(before[name], value) for name, value in trainer.learner.model.state_dict().items())
    lines = [report.line for report in reports if report.line]
    assert len(lines) == 1 and "not finite" in lines[0] and "learning_rate" in lines[0]


def _poisoned(model, batch):
    output = model.autoencode(batch)
    return output._replace(unclamped=output.unclamped * float("nan"))


def test_a_channel_that_stands_still_is_reported_with_what_to_do(tmp_path):
    config = settings(optimizer={"steps": 6, "warmup_steps": 0, "learning_rate": 0.0})
    reports = []
    trainer = Trainer(config, held_batches(config, [frames(5, 1)], CPU), tmp_path, observer=reports.append)
    with torch.no_grad():
        trainer.learner.model.to_latents.bias[4] = 100.0
    trainer.begin(resume=False)
    trainer.run()
    (line,) = [report.line for report in reports if report.line]
    assert "almost constant" in line and " (" in line and "4" in line and "entropy_weight" in line


def test_code_usage_by_hand():
    config = settings(model={"bits_per_token": 4, "group_size": 2}).model_config()
    usage = CodeUsage(config, CPU)
    usage.add(torch.tensor([[[1, 0, 1, 1], [0, 0, 1, 1]], [[1, 0, 1, 1], [0, 0, 1, 0]]], dtype=torch.bool))
    channel_bits, used = usage.take()
    quarter = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert channel_bits == pytest.approx([1, 0, 0, quarter], abs=1e-6)
    assert used == (2 + 2) / 8
    assert usage.take()[1] == 0  # begun anew


def test_a_video_run_starts_from_an_image_tokenizer_with_its_output_unchanged(tmp_path, generator):
    image = starting_model(settings(model={"max_frames": 1}), CPU)
    with torch.no_grad():
        for parameter in image.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_checkpoint(image, tmp_path / "image")
    config = settings(model={"preset": "vit-tiny-32-l18", "init_from": str(tmp_path / "image"), "max_frames": 3})
    video = starting_model(config, CPU)
    picture = torch.from_numpy(frames(2, 1, 32))
    assert torch.equal(video.eval()(picture), image.eval()(picture))
    assert video.config.losses == config.losses.quantizer
    trained = train(config, tmp_path / "video", [frames(4, 4)])
    assert trained.learner.model.encoder.transformer.temporal.abs().sum() > 0
    larger = replace(config, model=replace(config.model, image_size=40))
    assert starting_model(larger, CPU).config.grid == (5, 5)


@pytest.mark.parametrize(
    ("name", "value", "has"),
    [("width", 64, 32), ("layers", 2, 1), ("heads", 4, 2), ("head_width", 32, 64), ("bits_per_token", 36, 18)],
)
def test_a_size_that_the_first_weights_have_otherwise_is_refused(tmp_path, name, value, has):
    save_checkpoint(starting_model(settings(), CPU), tmp_path / "first")
    config = settings(model={"init_from": str(tmp_path / "first"), name: value})
    with pytest.raises(SpecError, match=rf"model.{name} is {value}, but the model of model.init_from has {has}"):
        starting_model(config, CPU)


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_a_deeper_decoder_begins_as_the_same_function_and_learns_alone(tmp_path, method):
    arrays = [frames(10, 1), frames(5, 4, seed=1)]
    train(settings(), tmp_path / "first", arrays)
    first = from_pretrained(tmp_path / "first" / "tokenizer")
    part = {"preset": "vit-tiny-32-l18", "init_from": str(tmp_path / "first" / "tokenizer"), "decoder_layers": 3}
    config = settings(model=part, optimizer={"learns": "decoder", "method": method, "weight_decay": 0.1})
    picture = torch.from_numpy(frames(2, 2, 32, seed=7))
    deeper = starting_model(config, CPU).eval()
    assert len(deeper.decoder.transformer.blocks) == 3
    assert torch.equal(deeper(picture), first(picture))
    train(config, tmp_path / "second", arrays)
    second = from_pretrained(tmp_path / "second" / "tokenizer")
    assert torch.equal(second.encode(picture), first.encode(picture))
    for half in ("encoder", "to_latents"):
        old, learnt = (getattr(each, half).state_dict() for each in (first, second))
        assert all(torch.equal(learnt[name], value) for name, value in old.items())
    assert not torch.equal(second(picture), first(picture))
    assert second.decoder.transformer.blocks[2].mlp_out.weight.abs().sum() > 0
    with pytest.raises(SpecError, match=r"decoder_layers is 1, but the decoder of model.init_from has 3"):
        starting_model(
            settings(model={**part, "init_from": str(tmp_path / "second" / "tokenizer"), "decoder_layers": 1}), CPU
        )


SCRIPT = """
import sys
sys.modules.update(dict.fromkeys(["pydantic", "pyarrow", "av", "fsspec", "yaml", "ray", "PIL", "tensorboard"]))
import torch
torch.set_num_threads(1)
from tokenizer.trainer import main
sys.exit(main(sys.argv[1:]))
"""


def test_the_script_trains_from_arrays_on_a_bare_machine_and_ends_whole_on_sigterm(tmp_path):
    (tmp_path / "frames").mkdir()
    np.save(tmp_path / "frames" / "images.npy", frames(8, 1))
    np.save(tmp_path / "frames" / "clips.npy", frames(3, 4))
    np.savez(tmp_path / "validation.npz", images=frames(2, 1, 48))
    values = settings(optimizer={"steps": 100_000}).to_json_dict()
    (tmp_path / "config.json").write_text(json.dumps(values))
    command = [sys.executable, "-c", SCRIPT, "--frames", tmp_path / "frames", "--config", tmp_path / "config.json",
               "--validation", tmp_path / "validation.npz", "--out", tmp_path / "out"]  # fmt: skip
    process = subprocess.Popen(command, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if "step 3 of" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stderr.read()
    assert process.wait(60) == 130, rest
    assert "Interrupted: Saved after step" in rest
    (state,) = find_states(tmp_path / "out" / "states")[-1:]
    step = load_state(state).values["step"]
    assert step >= 3
    values["optimizer"]["steps"] = step + 2
    (tmp_path / "config.json").write_text(json.dumps(values))
    done = subprocess.run([*command, "--resume"], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"Going on after step {step}" in done.stderr
    assert [number for number, *_ in losses(tmp_path / "out")] == list(range(1, step + 3))
    assert load_file(tmp_path / "out" / "tokenizer" / "model.safetensors")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_trains_in_bf16_with_everything_on_and_resumes(tmp_path):
    device = torch.device("cuda")
    run = {"device": "cuda", "dtype": "auto", "checkpoint_blocks": True}
    config = settings("no-lpips", **FULL, run=run)
    for steps in (3, 6):
        config = replace(config, optimizer=replace(config.optimizer, steps=steps))
        batches = held_batches(config, [frames(10, 1), frames(5, 4)], device)
        validation = [torch.from_numpy(frames(3, 1, 32))]
        trainer = Trainer(config, batches, tmp_path, device=device, validation=validation)
        trainer.begin(resume=True)
        trainer.run()
    assert trainer.learner.model.compute_dtype == torch.bfloat16
    assert len(losses(tmp_path)) == 6
