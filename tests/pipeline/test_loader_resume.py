"""Going on: exact, in chains, on other numbers of ranks and workers, and refused where the order would differ."""

import functools
import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import Mixture, Pack, SequenceFormat, TokenDataset, TokenLoader
from pipeline.packing import MAX_LOOK_AHEAD, Cursor, write_cursors
from schemas.errors import SpecError
from tests.batches import content, global_batches
from tests.token_datasets import TokenDatasetWriter

FORMAT = SequenceFormat(
    bos=0, boi=1, eol=2, eof=3, eoi=4, eos=5, id_offset=1000, label_offset=10, null_label=30, null_text=(99,), drop=0.2
)


def tokenize(caption):
    return [300 + ord(letter) for letter in caption]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    return TokenDatasetWriter(url=str(folder), clips_of_file=[60, 0, 47, 70, 33], row_group_rows=16).write().url


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four files of clips of 1 to 4 frames with two views, some without captions or labels."""
    folder = tmp_path_factory.mktemp("clips")
    return (
        TokenDatasetWriter(
            url=str(folder),
            clips_of_file=[50, 35, 40, 25],
            views=2,
            frames=lambda file, clip: 1 + (file + clip) % 4,
            caption=lambda file, clip: None if clip % 5 == 0 else "c" * (clip % 13),
            label=lambda file, clip: None if clip % 4 == 0 else clip % 7,
            row_group_rows=16,
            seed=1,
        )
        .write()
        .url
    )


KINDS = [
    "images",
    "clips",
    "filtered",
    "carried",
    "sequences",
    "mixture",
    "endless mixture",
    "packed",
    "packed mixture",
]


@pytest.fixture(scope="module", params=KINDS)
def make_loader(request, photos, clips):
    """Builds one and the same loader again and again; its datasets have three files and five windows or more."""

    def make(**options):
        columns = ["key", "view"]
        present = [("caption", "present")]
        mixed = {
            "photos": (TokenDataset(photos, columns), 0.7),
            "clips": (TokenDataset(clips, columns, filters=present), 0.3),
        }
        source, kind = {
            "images": (lambda: TokenDataset(photos, columns), {"window": 40, "tail": "pad"}),
            "clips": (lambda: TokenDataset(clips, columns), {"window": 40}),
            "filtered": (lambda: TokenDataset(clips, columns, filters=present), {"window": 40}),
            "carried": (lambda: TokenDataset(clips, columns), {"window": 40, "tail": "carry"}),
            "sequences": (lambda: TokenDataset(clips, columns), SEQUENCES | {"tail": "carry"}),
            "mixture": (lambda: Mixture(mixed, stop="all"), {"window": 32, "tail": "carry"}),
            "endless mixture": (lambda: Mixture(mixed, stop="never"), {"window": 32, "tail": "carry"}),
            "packed": (lambda: TokenDataset(clips), PACKED),
            "packed mixture": (lambda: Mixture(mixed), PACKED),
        }[request.param]
        loader = TokenLoader(source(), 12, seed=3, **kind | options)
        for dataset in loader.datasets:
            plan = dataset.plan_epoch(3, 0, shuffle=True, window_rows=kind["window"])
            assert dataset.info.files >= 3 and plan.num_windows >= 5
        return loader

    make.packed = request.param.startswith("packed")
    make.has_epochs = request.param != "endless mixture"
    return make


SEQUENCES = {"window": 32, "format": FORMAT, "tokenize": tokenize}
PACKED = SEQUENCES | {"pack": Pack(seq_len=64, lanes=8)}


def take(loader, count):
    """The next `count` batches, over the edges of epochs, and the epoch that each belongs to."""
    taken = []
    while len(taken) < count:
        before = len(taken)
        for batch in loader:
            taken.append(content(batch))
            if len(taken) == count:
                break
        assert len(taken) > before or loader.epoch < 50
    return taken


STEPS = 40


@pytest.fixture(scope="module")
def unbroken(make_loader):
    return take(make_loader(), STEPS)


def test_a_chain_of_resumes_gives_the_unbroken_run(make_loader, unbroken):
    """Twelve resumes: at no steps, twice at one place, in the middle, at and around the edges of epochs."""
    loader = make_loader()
    edges = []
    epoch = 0
    for step, batch in enumerate(unbroken):
        if batch["state"]["epoch"] != epoch:
            edges += [step - 1, step, step + 1]
            epoch = batch["state"]["epoch"]
    assert epoch >= 1 or not make_loader.has_epochs
    stops = sorted({0, 1, 7, 8, *edges[:6], 29, STEPS - 1})
    state = json.loads(json.dumps(loader.state_dict()))
    found = []
    for number, (start, stop) in enumerate(zip([0, *stops], [*stops, STEPS], strict=True)):
        loader = make_loader(prefetch=number % 3)
        loader.load_state_dict(state)
        found += take(loader, stop - start) if stop > start else []
        if number % 2 and found:
            assert found[-1]["state"] == loader.state_dict()
        state = json.loads(json.dumps(loader.state_dict()))
    assert found == unbroken


def test_states_are_small_and_the_same_on_every_rank(make_loader, unbroken):
    ranks = [make_loader(rank=rank, world_size=4) for rank in range(4)]
    states = [[batch["state"] for batch in take(loader, STEPS)] for loader in ranks]
    assert states[0] == states[1] == states[2] == states[3] == [batch["state"] for batch in unbroken]
    assert max(len(json.dumps(state)) for state in states[0]) < 1000


def test_going_on_with_other_numbers_of_ranks(make_loader, unbroken):
    """From one rank to four, to two, to eight, to three, to one; every value of every row is compared."""
    state = make_loader().state_dict()
    found = []
    for world_size, steps in ((1, 5), (4, 9), (2, 0), (2, 8), (8, 6), (3, 7), (1, 5)):
        ranks = [make_loader(rank=rank, world_size=world_size) for rank in range(world_size)]
        for loader in ranks:
            loader.load_state_dict(state)
        if steps:
            found += global_batches([take(loader, steps) for loader in ranks])
        states = [loader.state_dict() for loader in ranks]
        assert all(each == states[0] for each in states)
        state = states[0]
    assert found == global_batches([unbroken])


def test_every_sample_comes_once_before_any_comes_again(make_loader):
    """Over the epochs, whatever the batch size, the mixture or the packing."""
    if make_loader.packed:
        pytest.skip("see test_packing_loses_nothing")
    loader = make_loader()
    sources = [len(dataset) for dataset in loader.datasets]
    seen = [[] for _ in sources]
    for batch in take(loader, STEPS):
        valid = batch.get("valid", ([True] * 12,))[0]
        places = batch.get("source", ([0] * 12,))[0]
        for source, sample, real in zip(places, batch["sample"][0], valid, strict=True):
            if real:
                seen[source].append(sample)
    for samples, length in zip(seen, sources, strict=True):
        step = length - length % 12 if loader.state_dict()["tail"] == "drop" else length
        assert len(samples) > length
        for first in range(0, len(samples) - step + 1, step):
            assert len(set(samples[first : first + step])) == step


def test_packing_loses_nothing(clips):
    """Every code of every clip is in the packs of an epoch once, and so are all special ids."""
    dataset = TokenDataset(clips)
    plain = SequenceFormat(bos=0, boi=1, eol=2, eof=3, eoi=4, eos=5, id_offset=1000)
    expected = []
    for batch in TokenLoader(dataset, 15, tail="pad", window=32, format=plain):
        rows = zip(batch["ids"], batch["lengths"], batch["valid"], strict=True)
        expected += [ids[:length].tolist() for ids, length, valid in rows if valid]
    loader = TokenLoader(dataset, 5, window=32, format=plain, pack=Pack(seq_len=70, lanes=4, pad=7))
    found = []
    for batch in loader:
        bounds = batch["cu_seqlens"].tolist()
        flat = batch["ids"].reshape(-1)
        found += [flat[start:stop].tolist() for start, stop in pairwise(bounds)]
    found = [ids for ids in found if ids[0] != 7]
    assert loader.epoch == 1
    missing = Counter(map(tuple, expected)) - Counter(map(tuple, found))
    assert not missing
    # The last packs of an epoch may hold the first sequences of the next one.
    assert len(found) < len(expected) + 100


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    samples=st.integers(1, 60),
    batch=st.integers(1, 25),
    tail=st.sampled_from(["drop", "pad", "carry"]),
    stops=st.lists(st.integers(0, 6), min_size=3, max_size=6),
    world_sizes=st.lists(st.integers(1, 4), min_size=3, max_size=6),
    window=st.integers(1, 40),
)
def test_any_sizes_resume_exactly(tmp_path_factory, samples, batch, tail, stops, world_sizes, window):
    url = written(tmp_path_factory.getbasetemp() / f"any-{samples}", samples)
    dataset = TokenDataset(url)
    if tail == "drop" and samples < batch:
        return
    batch = max(batch, *world_sizes)
    if tail == "drop" and samples < batch:
        return

    def make(**options):
        return TokenLoader(dataset, batch, seed=samples, tail=tail, window=window, repeat=True, prefetch=0, **options)

    unbroken = [content(each) for each in islice(make(), sum(stops))]
    state, found = make().state_dict(), []
    for stop, world_size in zip(stops, world_sizes, strict=False):
        ranks = [make(rank=rank, world_size=world_size) for rank in range(world_size)]
        for loader in ranks:
            loader.load_state_dict(state)
        found += global_batches([[content(each) for each in islice(loader, stop)] for loader in ranks])
        state = ranks[-1].state_dict()
    assert found == global_batches([unbroken])[: len(found)]


@functools.cache
def written(folder: Path, samples: int) -> str:
    sizes = [samples // 2, samples // 3, samples - samples // 2 - samples // 3]
    writer = TokenDatasetWriter(
        url=str(folder), clips_of_file=sizes, frames=lambda file, clip: 1 + (file + clip) % 3, row_group_rows=7
    )
    return writer.write().url


class TestRefused:
    """A state that belongs to another order is refused by the names of what differs."""

    def refused(self, state, loader, match):
        with pytest.raises(SpecError, match=match):
            loader.load_state_dict(state)

    def test_another_seed_batch_size_or_window(self, photos):
        dataset = TokenDataset(photos)
        state = TokenLoader(dataset, 12).state_dict()
        self.refused(state, TokenLoader(dataset, 12, seed=4), r"seed is 0 in the state and 4 here")
        self.refused(state, TokenLoader(dataset, 24), r"global_batch_size is 12 in the state and 24 here")
        other = TokenLoader(dataset, 12, window=64, shuffle=False, tail="pad")
        self.refused(state, other, r"shuffle is True .* window is 32768 .* tail is 'drop'")

    def test_another_dataset(self, photos, clips, tmp_path):
        state = TokenLoader(TokenDataset(photos), 12).state_dict()
        self.refused(state, TokenLoader(TokenDataset(clips), 12), r"dataset\.fingerprint is '\w{12}' in the state")
        longer = TokenDatasetWriter(url=str(tmp_path), clips_of_file=[60, 0, 47, 70, 33, 1], row_group_rows=16).write()
        self.refused(
            state, TokenLoader(TokenDataset(longer.url), 12), r"order of samples: dataset\.manifest is '\w{12}'"
        )

    def test_other_filters_or_views(self, clips):
        state = TokenLoader(TokenDataset(clips), 12).state_dict()
        filtered = TokenDataset(clips, filters=[("frames", "<", 4)])
        self.refused(state, TokenLoader(filtered, 12), r"dataset\.filters is None in the state and '\w{12}' here")
        self.refused(state, TokenLoader(TokenDataset(clips, views=0), 12), r"dataset\.views is 'latin' .* and 0 here")
        state = TokenLoader(filtered, 12).state_dict()
        same = TokenDataset(clips, view="packed", columns=["key"], filters=[("frames", "<", 4)])
        TokenLoader(same, 12, prefetch=0).load_state_dict(state)

    def test_another_mixture_format_or_packing(self, photos, clips):
        def mixture(weight, stop="first"):
            return Mixture({"photos": (TokenDataset(photos), weight), "clips": (TokenDataset(clips), 1)}, stop=stop)

        packed = {"format": FORMAT, "pack": Pack(seq_len=64)}
        state = TokenLoader(mixture(1), 12, **packed).state_dict()
        self.refused(
            state, TokenLoader(mixture(2), 12, **packed), r"sources\.photos\.weight is 1 in the state and 2 here"
        )
        self.refused(state, TokenLoader(mixture(1, "all"), 12, **packed), r"stop is 'first' in the state")
        longer = {"format": FORMAT, "pack": Pack(seq_len=65)}
        self.refused(state, TokenLoader(mixture(1), 12, **longer), r"pack\.seq_len is 64 in the state and 65 here")
        other = {"format": SequenceFormat(bos=0, id_offset=1000), "pack": Pack(seq_len=64)}
        self.refused(state, TokenLoader(mixture(1), 12, **other), r"format is '\w{12}' in the state")

    @pytest.mark.parametrize("state", [{}, {"epoch": 1}, None, 3])
    def test_no_state(self, photos, state):
        self.refused(state, TokenLoader(TokenDataset(photos), 12), "no state of a TokenLoader")

    def test_a_damaged_state(self, photos):
        loader = TokenLoader(TokenDataset(photos), 12)
        self.refused(loader.state_dict() | {"step": -1}, loader, "the state is damaged: epoch 0, step -1")
        self.refused(loader.state_dict() | {"version": 9}, loader, "version 9, and this bsqtok reads 1")
        packed = TokenLoader(TokenDataset(photos), 12, format=FORMAT, pack=Pack(seq_len=64))
        state = packed.state_dict()
        self.refused(state | {"packing": {"oldest": 0, "lanes": "AAA!"}}, packed, "the packing state is damaged")
        self.refused(state | {"packing": {"oldest": 0, "lanes": "AAAA"}}, packed, "it has 1 lanes")

    @pytest.mark.parametrize("lanes", [1, 16, 64])
    @pytest.mark.parametrize("num_sources", [1, 2, 20])
    def test_a_state_stays_small_when_lanes_have_drifted_far_apart(self, photos, lanes, num_sources):
        sources = {f"source number {number}": (TokenDataset(photos), 1 + number) for number in range(num_sources)}
        pack = Pack(seq_len=1 << 16, lanes=lanes, split=True)
        loader = TokenLoader(Mixture(sources), 8192, seed=1 << 40, format=FORMAT, pack=pack)
        furthest = Cursor(10**12 + (1 << 21) - 1, (1 << MAX_LOOK_AHEAD) - 1, (1 << 14) - 1)
        packing = write_cursors([Cursor(10**12), *[furthest] * (lanes - 1)]) | {"turn": lanes - 1}
        state = loader.state_dict() | {"epoch": 12_345, "step": 10**9, "packing": packing}
        loader.load_state_dict(json.loads(json.dumps(state)))
        assert loader.state_dict() == state and len(json.dumps(state)) < 1000

    def test_a_state_with_many_sources_stays_small(self, photos):
        sources = {f"source number {number}": (TokenDataset(photos), 1 + number) for number in range(20)}
        loader = TokenLoader(Mixture(sources), 12, format=FORMAT, pack=Pack(seq_len=64, lanes=64))
        state = loader.state_dict()
        assert len(json.dumps(state)) < 1000
        other = dict(sources, more=sources["source number 3"])
        self.refused(
            state, TokenLoader(Mixture(other), 12, format=FORMAT, pack=Pack(seq_len=64, lanes=64)), "sources is"
        )
