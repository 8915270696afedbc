"""A loader inside torch's DataLoader and torchdata's StatefulDataLoader, and a trainer that is killed."""

import json
import os
import pickle
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, default_collate
from torchdata.stateful_dataloader import StatefulDataLoader

from pipeline import Mixture, Pack, SequenceFormat, TokenDataset, TokenLoader
from schemas.errors import BsqError
from tests.batches import content, global_batches
from tests.tiny_corpus import REPOSITORY
from tests.token_datasets import TokenDatasetWriter

FEW_OR_MANY = [0, 2, pytest.param(1, marks=pytest.mark.long), pytest.param(3, marks=pytest.mark.long)]


pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:'set_vital' is deprecated")


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """110 clips of 1 to 3 frames in three files."""
    folder = tmp_path_factory.mktemp("clips")
    return (
        TokenDatasetWriter(
            url=str(folder),
            clips_of_file=[40, 45, 25],
            frames=lambda file, clip: 1 + (file + clip) % 3,
            row_group_rows=8,
        )
        .write()
        .url
    )


def make(url, **options):
    return TokenLoader(TokenDataset(url), 12, **{"window": 20, "tail": "carry", "prefetch": 1} | options)


def make_packed(url, cache_dir=None, **options):
    long = TokenDataset(url, filters=[("frames", ">", 1)], cache_dir=cache_dir)
    mixture = Mixture({"all": (TokenDataset(url), 2), "long": (long, 1)})
    return TokenLoader(
        mixture,
        6,
        window=20,
        format=SequenceFormat(bos=0, eof=1, id_offset=10),
        pack=Pack(seq_len=40, lanes=4),
        repeat=True,
        **options,
    )


@pytest.fixture(scope="module")
def unbroken(url):
    """Three epochs of six windows."""
    loader = make(url)
    assert loader.datasets[0].plan_epoch(0, 0, shuffle=True, window_rows=20).num_windows == 6
    return [[content(batch) for batch in loader] for _ in range(3)]


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_plain_dataloader_gives_the_same_epochs(url, unbroken, num_workers, persistent):
    if persistent and not num_workers:
        pytest.skip("nothing to persist")
    loader = DataLoader(make(url), batch_size=None, num_workers=num_workers, persistent_workers=persistent)
    assert [[content(batch) for batch in loader] for _ in range(3)] == unbroken


@pytest.mark.parametrize("persistent", [False, True])
def test_set_epoch_reaches_the_workers(url, unbroken, persistent):
    loader = make(url)
    dataloader = DataLoader(loader, batch_size=None, num_workers=2, persistent_workers=persistent)
    for epoch in (2, 0, 1):
        loader.set_epoch(epoch)
        assert [content(batch) for batch in dataloader] == unbroken[epoch]
    assert [content(batch) for batch in dataloader] == unbroken[2]


@pytest.mark.parametrize("make_one", [make, make_packed])
def test_every_batch_carries_the_state_behind_it(url, make_one):
    """Stopped and gone on with other numbers of workers and ranks, six times."""
    options = {"repeat": True} if make_one is make else {}
    whole = [content(batch) for batch in islice(make_one(url, **options), 25)]
    found, state = [], None
    for steps, num_workers, world_size in ((3, 2, 1), (1, 3, 2), (6, 0, 3), (9, 1, 1), (2, 2, 2), (4, 3, 1)):
        shares = []
        for rank in range(world_size):
            loader = make_one(url, rank=rank, world_size=world_size, **options)
            if state:
                loader.load_state_dict(json.loads(json.dumps(state)))
            dataloader = DataLoader(loader, batch_size=None, num_workers=num_workers)
            shares.append([content(batch) for batch in islice(dataloader, steps)])
        found += global_batches(shares)
        state = shares[-1][-1]["state"]
    assert found == global_batches([whole])


def test_the_main_process_does_not_guess_how_far_workers_are(url):
    loader = make(url)
    state = next(iter(DataLoader(loader, batch_size=None, num_workers=1)))["state"]
    with pytest.raises(BsqError, match=r"Save batch\['state'\] of the last batch"):
        loader.state_dict()
    loader.load_state_dict(state)
    assert loader.state_dict() == state


def test_an_epoch_that_was_left_early_is_not_begun_again_by_chance(url, unbroken):
    """With workers every iteration of a DataLoader is an epoch; a state goes on inside one."""
    loader = make(url)
    dataloader = DataLoader(loader, batch_size=None, num_workers=2)
    first = next(iter(dataloader))
    assert content(first) == unbroken[0][0]
    assert [content(batch) for batch in dataloader] == unbroken[1]
    loader.load_state_dict(first["state"])
    assert [content(batch) for batch in dataloader] == unbroken[0][1:]
    assert [content(batch) for batch in dataloader] == unbroken[1]


@pytest.mark.parametrize("num_workers", FEW_OR_MANY)
@pytest.mark.parametrize("stops", [(3, 1, 4), (0, 2, 9), (8, 1, 17), pytest.param((9, 9, 9), marks=pytest.mark.long)])
def test_a_stateful_dataloader_goes_on_exactly(url, unbroken, num_workers, stops):
    """Saved inside epochs, at their edges, at the very beginning, and by loaders that were themselves resumed."""
    whole = [batch for epoch in unbroken for batch in epoch]
    assert [len(epoch) for epoch in unbroken] == [9, 9, 9]
    found, state = [], None
    for stop in stops:
        dataloader = StatefulDataLoader(make(url), batch_size=None, num_workers=num_workers)
        if state is not None:
            dataloader.load_state_dict(state)
        while stop:
            for batch in dataloader:
                found.append(content(batch))
                stop -= 1
                if not stop:
                    break
        state = pickle.loads(pickle.dumps(dataloader.state_dict()))
    assert found == whole[: len(found)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_dataloader_saved_between_epochs(url, unbroken, num_workers):
    """After the end of an epoch was heard of, not only after its last batch."""
    state = None
    for epoch in range(3):
        dataloader = StatefulDataLoader(make(url), batch_size=None, num_workers=num_workers)
        if state is not None:
            dataloader.load_state_dict(state)
        assert [content(batch) for batch in dataloader] == unbroken[epoch]
        state = dataloader.state_dict()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_dataloader_of_packs(url, num_workers):
    """What rank 0 saved goes on with other numbers of ranks."""
    whole = [content(batch) for batch in islice(make_packed(url), 19)]
    found, state = [], None
    for steps, world_size in ((5, 1), (1, 2), (7, 3), (6, 1)):
        shares, states = [], []
        for rank in range(world_size):
            loader = make_packed(url, rank=rank, world_size=world_size)
            dataloader = StatefulDataLoader(loader, batch_size=None, num_workers=num_workers)
            if state is not None:
                dataloader.load_state_dict(state)
            shares.append([content(batch) for batch in islice(dataloader, steps)])
            states.append(dataloader.state_dict())
        found += global_batches(shares)
        state = states[0]
    assert found == global_batches([whole])


def test_packs_run_on_into_the_next_epoch_of_a_dataloader(url):
    """Without repeat=True: an epoch's last packs hold the first samples of the next one, which begins behind them."""

    def make_one():
        options = {"format": SequenceFormat(bos=0, id_offset=10), "pack": Pack(seq_len=40, lanes=4)}
        return TokenLoader(TokenDataset(url), 6, window=32, **options)

    loader = make_one()
    epochs = [[content(batch) for batch in loader] for _ in range(3)]
    dataloader = DataLoader(make_one(), batch_size=None, num_workers=2)
    assert [[content(batch) for batch in dataloader] for _ in range(3)] == epochs


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_map_style_dataset_in_a_dataloader(tmp_path, num_workers):
    writer = TokenDatasetWriter(url=str(tmp_path), clips_of_file=[20, 13]).write()
    dataset = TokenDataset(tmp_path, columns=["key"])
    dataset[0]
    loader = DataLoader(dataset, batch_size=8, num_workers=num_workers, collate_fn=default_collate)
    batches = list(loader)
    assert [key for batch in batches for key in batch["key"]] == [row.key for row in writer.rows]
    tokens = torch.cat([batch["index"] for batch in batches])
    assert all((tokens[row].numpy() == writer.indices(writer.rows[row])).all() for row in range(33))


@pytest.mark.long
def test_a_dataloader_that_spawns(url, unbroken):
    loader = DataLoader(make(url), batch_size=None, num_workers=2, multiprocessing_context="spawn")
    assert [[content(batch) for batch in loader] for _ in range(2)] == unbroken[:2]


TRAINER = """
import json, os, sys
from tests.batches import content
from tests.pipeline.test_loader_workers import make_packed
from torch.utils.data import DataLoader
url, cache, state_path, log_path, num_workers = sys.argv[1:]
loader = make_packed(url, cache_dir=cache)
if os.path.exists(state_path):
    loader.load_state_dict(json.load(open(state_path)))
with open(log_path, "a") as log:
    for batch in DataLoader(loader, batch_size=None, num_workers=int(num_workers)):
        log.write(json.dumps(content(batch), default=str) + "\\n")
        log.flush()
        with open(state_path + ".new", "w") as file:
            json.dump(batch["state"], file)
        os.replace(state_path + ".new", state_path)
        print(batch["state"]["step"], flush=True)
"""


@pytest.mark.parametrize("num_workers", [pytest.param(0, marks=pytest.mark.long), 2])
def test_a_killed_trainer_leaves_nothing_that_hinders_the_next(url, tmp_path, num_workers):
    """Killed twice after some batches, its workers with it, then gone on with by two ranks.  What was seen is the
    unbroken run; a batch that was logged but not yet in the state may come twice."""
    before = set(Path("/dev/shm").iterdir())
    log = tmp_path / "log"
    arguments = [url, tmp_path / "cache", tmp_path / "state", log, num_workers]
    for _ in range(2):
        trainer = subprocess.Popen(
            [sys.executable, "-c", TRAINER, *map(str, arguments)],
            stdout=subprocess.PIPE,
            cwd=REPOSITORY,
            start_new_session=True,
        )
        try:
            for _ in range(4):
                assert trainer.stdout.readline()
        finally:
            os.killpg(trainer.pid, signal.SIGKILL)
            trainer.wait()
            trainer.stdout.close()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    found = [line for number, line in enumerate(lines) if not number or line != lines[number - 1]]
    assert len(found) >= 7
    unbroken = [content(batch) for batch in islice(make_packed(url), len(found) + 12)]
    assert found == json.loads(json.dumps(unbroken[: len(found)], default=str))
    state = json.loads((tmp_path / "state").read_text())
    [behind] = [number for number, batch in enumerate(unbroken) if batch["state"] == state]
    shares = []
    for rank in range(2):
        loader = make_packed(url, cache_dir=tmp_path / "cache", rank=rank, world_size=2)
        loader.load_state_dict(state)
        shares.append([content(batch) for batch in islice(loader, 11)])
    assert global_batches(shares) == global_batches([unbroken[behind + 1 : behind + 12]])
    # torch names a segment for the instant in which a worker hands it over: a kill may hit that, once for each worker.
    assert len(set(Path("/dev/shm").iterdir()) - before) <= 2 * num_workers


def test_a_trainer_that_ends_in_the_middle_ends(url):
    """A thread that reads ahead must not keep the interpreter."""
    code = """
import sys
from pipeline import TokenDataset, TokenLoader
kept = iter(TokenLoader(TokenDataset(sys.argv[1]), 4, window=16, prefetch=2))
next(kept)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, url], cwd=REPOSITORY, timeout=60, capture_output=True, check=True
    )
    assert done.stderr == b""
