"""Two processes learn as one does on the joined batch, resume alike, and refuse together."""

from __future__ import annotations

import multiprocessing
import os
import socket
from dataclasses import replace

import pytest
import torch

from schemas.errors import Interrupted, SpecError
from tests.tiny_training import CPU, FULL, frames, losses, settings, train
from tokenizer.prior_train import PriorLearner, prior_train_config
from tokenizer.ranks import average_gradients, joined_ranks
from tokenizer.token_train import TokenBatch, TokenKind, TokenTrainer
from tokenizer.train_state import find_states, load_state, save_state
from tokenizer.train_step import Learner, starting_model
from tokenizer.trainer import held_batches


def _rank(number, folder):
    config = settings("no-lpips", **FULL, optimizer={"steps": 3, "batch_images": 2, "batch_clips": 1})
    train(config, folder / "two")
    _gradients(config, folder / f"gradients-{number}.pt")


def _gradients(config, path):
    """The averaged gradients of one batch, at given weights."""
    # A weight that makes the code average matter.
    config = replace(config, losses=replace(config.losses, entropy_weight=1.0, adversarial_weight=0.0))
    learner = Learner(config, starting_model(config, CPU), CPU)
    batch = held_batches(config, [frames(10, 1)], CPU).next_batch()
    learner._tokenizer_gradients(batch, batch.flatten(0, 1).permute(0, 3, 1, 2) / 127.5 - 1, 0)
    parameters = list(learner.model.parameters())
    average_gradients(parameters)
    torch.save([each.grad for each in parameters], path)


def _in_two_processes(work, folder):
    """Run `work(number, folder)` in each of two joined processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_join, args=(number, port, work, folder)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def _join(number, port, work, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(number), WORLD_SIZE="2")
    torch.set_num_threads(1)
    with joined_ranks("cpu"):
        work(number, folder)


def test_two_processes_have_the_gradients_and_the_run_of_one_on_the_joined_batch(tmp_path):
    _in_two_processes(_rank, tmp_path)
    joined = settings("no-lpips", **FULL, optimizer={"steps": 3, "batch_images": 4, "batch_clips": 2})
    _gradients(joined, tmp_path / "joined.pt")
    expected = torch.load(tmp_path / "joined.pt")
    for number in range(2):
        for found, wanted in zip(torch.load(tmp_path / f"gradients-{number}.pt"), expected, strict=True):
            assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-6)
    # Without R1's groups of pictures the discriminator sees the same numbers; the tokenizer's first steps show it.
    train(joined, tmp_path / "one")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one[0][2] == pytest.approx(two[0][2], rel=1e-4)
    assert (tmp_path / "two" / "states" / "state-00000003.safetensors").exists()


class _RandomTokens:
    """Clips of another length in each process, so that each draws another number of random values."""

    def __init__(self, number):
        self._number, self._drawn = number, 0

    def next_batch(self):
        generator = torch.Generator().manual_seed(100 * self._number + self._drawn)
        self._drawn += 1
        return TokenBatch(torch.rand(4, 1 + self._number, 2, 3, 6, generator=generator) > 0.5)

    def state(self):
        return {"drawn": self._drawn}

    def load(self, state):
        self._drawn = state["drawn"]


def _dropout_rank(number, folder):
    values = {
        "model": {"width": 16, "layers": 1, "heads": 2, "head_width": 16, "dropout": 0.3},
        "optimizer": {"batch": 4, "warmup_steps": 0, "learning_rate": 0.01},
        "run": {"device": "cpu", "dtype": "float32", "log_every": 1, "save_every": 2, "validate_every": 100,
                "picture_every": 100},
    }  # fmt: skip
    config = prior_train_config({**values, "optimizer": {**values["optimizer"], "steps": 4}})
    for out, stops in (("whole", False), ("parts", True), ("parts", False)):
        learner = PriorLearner(config, TokenKind(6, 3, (2, 3), 2, "ab" * 32), CPU)
        trainer = TokenTrainer(config, learner, _RandomTokens(number), folder / out)
        trainer.begin(resume=True)
        if stops:
            trainer.stop()
            with pytest.raises(Interrupted):
                trainer.run()
        else:
            trainer.run()


def test_each_of_two_processes_goes_on_with_its_own_random_numbers(tmp_path):
    _in_two_processes(_dropout_rank, tmp_path)
    whole, parts = (load_state(find_states(tmp_path / name / "states")[-1]).tensors for name in ("whole", "parts"))
    assert not torch.equal(whole["ranks.0.random.cpu"], whole["ranks.1.random.cpu"])
    assert all(torch.equal(whole[name], value) for name, value in parts.items())


def test_a_state_that_holds_the_generators_of_one_process_is_gone_on_with(tmp_path):
    train(settings(optimizer={"steps": 2}), tmp_path)
    (path,) = find_states(tmp_path / "states")
    state = load_state(path)
    tensors = {name.removeprefix("ranks.0."): value for name, value in state.tensors.items()}
    save_state(path, state._replace(tensors=tensors), keep=1)
    assert train(settings(optimizer={"steps": 4}), tmp_path, resume=True).step == 4


def _own_folder_rank(number, folder):
    train(settings(optimizer={"steps": 2}), folder / str(number), [frames(10, 1)])
    for resume in (False, True):
        with pytest.raises(SpecError) as refusal:
            train(settings(optimizer={"steps": 4}), folder / str(number), [frames(10, 1)], resume=resume)
        (folder / f"{resume}-{number}.txt").write_text(str(refusal.value))


def test_processes_that_do_not_see_one_folder_are_all_refused(tmp_path):
    _in_two_processes(_own_folder_rank, tmp_path)
    for number in range(2):
        for resume in (False, True):
            assert (tmp_path / f"{resume}-{number}.txt").read_text() == (
                f"{tmp_path / str(number)}: the processes do not find the same training state there (process 0 "
                "state-00000002, process 1 none). Name a folder that all of them see, or copy its states to every node."
            )


def _code_config(batch_images):
    return settings(
        losses={"transform_code": True},
        optimizer={"steps": 3, "batch_images": batch_images, "method": "adamw", "warmup_steps": 0},
    )


def _code_rank(number, folder):
    trained = train(_code_config(8), folder / "two", [frames(300, 1)])
    torch.save(trained.learner.tensors(), folder / f"rank-{number}.pt")


def test_two_processes_fit_the_transform_code_that_one_fits_and_learn_it_alike(tmp_path):
    _in_two_processes(_code_rank, tmp_path)
    one = train(_code_config(16), tmp_path / "one", [frames(300, 1)]).learner.tensors()
    both = [torch.load(tmp_path / f"rank-{number}.pt") for number in range(2)]
    for name, found in both[0].items():
        assert torch.equal(found, both[1][name])
        if name.startswith("code."):
            assert torch.equal(found, one[name])
    # A process logs the loss of its own half of the batch; gradients are those of the whole.
    norms = [[norm for _, _, norm in losses(tmp_path / name)] for name in ("two", "one")]
    assert norms[0] == pytest.approx(norms[1], rel=2e-2)
