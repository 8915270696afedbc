"""Ray Train starts the processes of a run; what they make is what torchrun's make, and nothing is lost with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.cli import run
from tests.tiny_corpus import BSQ, bsq_environment
from tests.tiny_training import logged_losses, write_train_file
from tokenizer.train_state import find_states, load_state

SECONDS = 600
"""For a cluster to start and a run to end, on a machine that does other things."""


def write(folder, shards, steps):
    """A training file whose paths are relative: they count from where the command is given."""
    path = write_train_file(folder, shards, steps=steps)
    text = path.read_text().replace(str(folder / "run"), "run")
    path.write_text(text)
    return path


@pytest.fixture
def command():
    """Starts `bsq train` with two processes; what is left of it is killed after the test."""
    started = []

    def start(folder, *arguments):
        process = subprocess.Popen(
            [*BSQ, "train", "train.yaml", "--ray-workers", "2", "--cpus-per-worker", "1", *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=bsq_environment(),
            cwd=folder,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def end(process):
    out, err = process.communicate(timeout=SECONDS)
    assert "Traceback" not in err
    return process.returncode, out, err


def training_processes(pid):
    """Ray's workers that run a training function, among the descendants of a process."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except (OSError, ValueError):
            continue

    def descends(number):
        while number in parents and number != pid:
            number = parents[number]
        return number == pid

    return [number for number, name in names.items() if name.startswith("ray::RayTrainWorker") and descends(number)]


needs_two_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")


@pytest.mark.longest
@needs_two_cpus
def test_two_processes_train_as_under_torchrun(tmp_path, small_shards, command):
    folders = [tmp_path / name for name in ("ray", "torchrun")]
    for folder in folders:
        folder.mkdir()
        write(folder, small_shards, 6)
    script = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    bsq = ["-c", "from jobs.entry import main; main()", "train", "train.yaml"]
    subprocess.run(
        [*script, "--no-python", sys.executable, *bsq], cwd=folders[1], env=bsq_environment({"OMP_NUM_THREADS": "1"}),
        check=True, capture_output=True, timeout=SECONDS,
    )  # fmt: skip
    code, out, err = end(command(folders[0]))
    assert code == 0, err
    assert "Starting 2 processes with Ray, 1 CPU each" in err and "step 6 of 6: loss" in err and "val_psnr" in err
    assert "Wrote" in out and "bsq tokenize" in out
    assert logged_losses(folders[0] / "run") == pytest.approx(logged_losses(folders[1] / "run"), rel=1e-5)
    states = [load_state(find_states(folder / "run" / "states")[-1]) for folder in folders]
    assert states[0].values["batches"] == states[1].values["batches"] and len(states[0].values["batches"]) == 2


@needs_two_cpus
@pytest.mark.longest
@pytest.mark.parametrize("what", ["signal", "worker"])
def test_a_run_goes_on_after_a_signal_to_the_command_and_after_a_process_was_killed(
    tmp_path, small_shards, command, what
):
    write(tmp_path, small_shards, 100_000)
    process = command(tmp_path)
    log = tmp_path / "run" / "log.jsonl"
    states = tmp_path / "run" / "states"
    deadline = time.monotonic() + SECONDS
    while not find_states(states):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    if what == "worker":
        victim = training_processes(process.pid)[1]
        before = load_state(find_states(states)[-1]).values["step"]
        os.kill(victim, signal.SIGKILL)
        while not (standing := set(training_processes(process.pid)) - {victim}) or len(standing) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
        while not find_states(states) or load_state(find_states(states)[-1]).values["step"] <= before + 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, _, err = end(process)
    assert code == 130 and "Interrupted: Saved after step" in err and "--resume" in err
    if what == "worker":
        assert "Going on after step" in err
    step = load_state(find_states(states)[-1]).values["step"]
    steps = [line.partition(",")[0] for line in log.read_text().splitlines() if '"loss"' in line]
    assert len(steps) == len(set(steps)) == step  # every step once
    write(tmp_path, small_shards, step + 2)
    code, _, err = end(command(tmp_path, "--resume"))
    assert code == 0 and f"Going on after step {step:,}" in err
    assert len(logged_losses(tmp_path / "run")) == step + 2


@needs_two_cpus
def test_what_cannot_be_is_one_line_before_anything_is_written(tmp_path, small_shards, bsq):
    write(tmp_path, small_shards, 4)
    done = bsq("train", "train.yaml", "--ray-workers", 500, cwd=tmp_path, timeout=SECONDS)
    assert (
        done.returncode == 2
        and "500 workers of 0 GPU and 1 CPU each were asked for, but there is room for" in done.stderr
    )
    assert len(done.stderr.strip().splitlines()) == 1 and not (tmp_path / "run").exists()


def test_a_folder_with_a_run_is_refused_without_starting_ray(tmp_path, small_shards, capsys, monkeypatch):
    path = write(tmp_path, small_shards, 2)
    monkeypatch.chdir(tmp_path)
    assert run(["train", str(path)]) == 0
    assert run(["train", str(path), "--ray-workers", "1"]) == 2
    assert "holds a run. Add --resume to go on" in capsys.readouterr().err
    import ray

    assert not ray.is_initialized()
