"""A loader's order, its batches and its epochs: the same for every number of ranks, every sample exactly once."""

import gc
import threading
from itertools import islice

import numpy as np
import pytest
import torch

from pipeline import Mixture, Pack, SequenceFormat, TokenDataset, TokenLoader
from pipeline.sample_stream import DatasetStream
from schemas.errors import BsqError, SpecError
from tests.token_datasets import TokenDatasetWriter


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """203 pictures in six files, one of them empty, in 15 row groups."""
    folder = tmp_path_factory.mktemp("images")
    return TokenDatasetWriter(url=str(folder), clips_of_file=[50, 0, 33, 70, 41, 9], row_group_rows=16).write()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """150 clips of 1 to 4 frames, with two views each."""
    folder = tmp_path_factory.mktemp("clips")
    return TokenDatasetWriter(
        url=str(folder),
        clips_of_file=[60, 45, 45],
        views=2,
        frames=lambda file, clip: 1 + (file + clip) % 4,
        caption=lambda file, clip: None if clip % 5 == 0 else f"clip {clip}",
        label=lambda file, clip: None if clip % 4 == 0 else clip % 7,
        row_group_rows=16,
    ).write()


def samples(loader):
    return [batch["sample"].tolist() for batch in loader]


def flat(batches):
    return [sample for batch in batches for sample in batch]


def test_the_order_is_frozen(images):
    """A golden vector: the order of a dataset of these sizes, on any machine, for ever."""
    loader = TokenLoader(TokenDataset(images.url), 29, seed=5, window=48)
    assert [batch[:7] for batch in samples(loader)] == GOLDEN
    assert [batch[:7] for batch in samples(loader)] == GOLDEN_OF_EPOCH_1


GOLDEN = [
    [177, 154, 166, 5, 6, 1, 151],
    [0, 155, 147, 13, 156, 14, 150],
    [138, 63, 131, 26, 25, 140, 146],
    [30, 60, 19, 139, 61, 16, 50],
    [127, 196, 66, 129, 195, 121, 115],
    [185, 194, 190, 81, 202, 192, 193],
    [97, 112, 99, 103, 109, 98, 105],
]
GOLDEN_OF_EPOCH_1 = [
    [118, 150, 87, 26, 96, 128, 91],
    [16, 23, 89, 31, 21, 83, 152],
    [76, 75, 68, 45, 66, 46, 48],
    [42, 191, 189, 185, 78, 72, 37],
    [11, 1, 105, 12, 106, 62, 55],
    [113, 140, 141, 182, 184, 176, 146],
    [156, 132, 180, 181, 173, 159, 155],
]


def test_the_order_of_a_mixture_and_of_packs_is_frozen(images, clips):
    """Of images and of clips with captions: source, sample and view; where sequences end in packs of 60 ids."""
    captioned = TokenDataset(clips.url, ["view"], filters=[("caption", "present")])
    mixture = Mixture({"images": (TokenDataset(images.url, ["view"]), 0.7), "clips": (captioned, 0.3)}, stop="all")
    batches = list(islice(TokenLoader(mixture, 25, seed=5, window=48, tail="carry"), 14))
    for number, golden in GOLDEN_OF_A_MIXTURE.items():
        rows = zip(*(batches[number][name].tolist() for name in ("source", "sample", "view")), strict=True)
        assert list(rows)[:8] == golden
    packing = {"format": SequenceFormat(bos=1, id_offset=10), "pack": Pack(seq_len=60, lanes=3)}
    packs = list(islice(TokenLoader(mixture, 1, seed=5, window=48, **packing), 60))
    for number, golden in GOLDEN_PACKS.items():
        assert packs[number]["cu_seqlens"].tolist() == golden
    assert packs[59]["state"]["packing"] == {"oldest": 118, "lanes": "BAAAAAQAAAAA", "turn": 0}


GOLDEN_OF_A_MIXTURE = {
    0: [(0, 198, 0), (1, 21, 1), (0, 176, 0), (0, 89, 0), (0, 97, 0), (1, 8, 1), (0, 87, 0), (0, 199, 0)],
    13: [(1, 78, 0), (0, 195, 0), (0, 103, 0), (1, 83, 0), (0, 186, 0), (0, 152, 0), (1, 82, 0), (0, 111, 0)],
}
GOLDEN_PACKS = {
    0: [0, 7, 14, 21, 28, 35, 60],
    1: [0, 25, 32, 39, 46, 53, 60],
    3: [0, 13, 32, 39, 46, 53, 60],
    59: [0, 25, 32, 39, 46, 53, 60],
}


def test_the_order_depends_on_seed_epoch_and_window_only(images):
    def order(**options):
        return samples(TokenLoader(TokenDataset(images.url, **options.pop("dataset", {})), 29, **options))

    plain = order(window=48)
    assert order(window=48, prefetch=0) == order(window=48, dataset={"view": "packed", "columns": ["key"]}) == plain
    for other in (order(window=48, seed=1), order(window=200), order(window=48, shuffle=False)):
        assert other != plain
    assert order(shuffle=False) == [list(range(29 * step, 29 * step + 29)) for step in range(7)]


def test_shuffling_reaches_beyond_row_groups_and_files(images):
    first = samples(TokenLoader(TokenDataset(images.url), 48, window=64))[0]
    assert len({sample // 16 for sample in first}) > 3
    assert np.abs(np.diff(first)).min() >= 1 and np.abs(np.diff(first)).mean() > 20


@pytest.mark.parametrize("tail", ["drop", "pad", "carry"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_ranks_share_the_same_global_batches(images, tail, world_size):
    """Rank r has rows r, r + R, ... of each batch, and all ranks have equally many steps."""
    dataset = TokenDataset(images.url)
    alone = TokenLoader(dataset, 24, tail=tail, window=64, prefetch=0)
    whole = [batch for _ in range(3) for batch in alone]
    for rank in range(world_size):
        loader = TokenLoader(dataset, 24, tail=tail, window=64, rank=rank, world_size=world_size, prefetch=rank % 3)
        mine = [batch for _ in range(3) for batch in loader]
        assert len(mine) == len(whole)
        for part, batch in zip(mine, whole, strict=True):
            for name in ("sample", "index", *(["valid"] if tail == "pad" else [])):
                assert torch.equal(part[name], batch[name][rank::world_size])
            assert part["state"] == batch["state"]


def test_ranks_that_do_not_divide_the_batch_differ_by_one(images):
    shares = [samples(TokenLoader(TokenDataset(images.url), 10, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(share[0]) for share in shares] == [4, 3, 3]
    assert len({len(share) for share in shares}) == 1


def test_every_sample_comes_exactly_once_an_epoch(images):
    loader = TokenLoader(TokenDataset(images.url), 24, tail="pad", window=64)
    assert len(loader) == 9
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == 9 and all(len(batch["sample"]) == 24 for batch in batches)
        real = [sample for batch in batches for sample in batch["sample"][batch["valid"]].tolist()]
        assert sorted(real) == list(range(203))
        assert all(batch["valid"].all() for batch in batches[:-1])
    dropped = TokenLoader(TokenDataset(images.url), 24, tail="drop", window=64)
    assert len(dropped) == 8 and len(set(flat(samples(dropped)))) == 8 * 24


def test_what_is_carried_comes_first_in_the_next_epoch(images):
    loader = TokenLoader(TokenDataset(images.url), 24, tail="carry", window=64)
    lengths, seen = [], []
    for epoch in range(5):
        assert loader.epoch == epoch
        expected = len(loader)
        batches = samples(loader)
        assert len(batches) == expected
        lengths.append(expected)
        seen += flat(batches)
    assert sum(lengths) == 5 * 203 // 24
    for epoch in range(len(seen) // 203):
        assert sorted(seen[203 * epoch : 203 * epoch + 203]) == list(range(203))


def test_a_batch_larger_than_the_dataset(images):
    dataset = TokenDataset(images.url)
    with pytest.raises(SpecError, match=r"203 samples, fewer than global_batch_size=500, .* tail='pad' or 'carry'"):
        TokenLoader(dataset, 500)
    [batch] = TokenLoader(dataset, 500, tail="pad")
    assert batch["valid"].sum() == 203
    carrying = TokenLoader(dataset, 500, tail="carry")
    assert [len(samples(carrying)) for _ in range(5)] == [0, 0, 1, 0, 1]


def test_repeating_goes_through_the_epochs(images):
    dataset = TokenDataset(images.url)
    loader = TokenLoader(dataset, 24, repeat=True, window=64)
    repeated = [batch["sample"].tolist() for batch, _ in zip(loader, range(20), strict=False)]
    single = TokenLoader(dataset, 24, window=64)
    assert repeated == (samples(single) + samples(single) + samples(single))[:20]
    with pytest.raises(TypeError):
        len(loader)


def test_set_epoch_goes_there_and_stays(images):
    dataset = TokenDataset(images.url)
    loader = TokenLoader(dataset, 24, window=64)
    epochs = [samples(loader) for _ in range(3)]
    loader.set_epoch(1)
    assert samples(loader) == epochs[1] and loader.epoch == 2
    loader.set_epoch(0)
    taken = [next(iter(loader))["sample"].tolist()]
    loader.set_epoch(0)
    assert taken + samples(loader) == epochs[0]


def test_a_break_loses_nothing(images):
    loader = TokenLoader(TokenDataset(images.url), 24, window=64)
    unbroken = samples(TokenLoader(TokenDataset(images.url), 24, window=64))
    found = []
    while loader.epoch == 0:
        for number, batch in enumerate(loader):
            found.append(batch["sample"].tolist())
            if number == 2:
                break
    assert found == unbroken


def test_threads_end_with_their_iteration(images):
    loader = TokenLoader(TokenDataset(images.url), 24, window=64)
    for _ in range(4):
        iterator = iter(loader)
        next(iterator)
        iterator.close()
    list(loader)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("token-")]


def test_two_iterations_at_once_are_refused(images):
    loader = TokenLoader(TokenDataset(images.url), 24, window=64)
    first = iter(loader)
    next(first)
    next(iter(loader))
    with pytest.raises(BsqError, match="iterated again"):
        next(first)


@pytest.mark.parametrize("prefetch", [0, 3])
def test_a_file_that_goes_missing_ends_the_iteration_with_its_name(tmp_path, prefetch):
    writer = TokenDatasetWriter(url=str(tmp_path), clips_of_file=[40, 40, 40], row_group_rows=16).write()
    (tmp_path / writer.commits[1].file).unlink()
    with pytest.raises(BsqError, match=r"0000001-.*gone or altered.*bsq verify"):
        list(TokenLoader(TokenDataset(tmp_path), 8, window=16, prefetch=prefetch))


def test_videos_are_padded_with_a_mask(clips):
    dataset = TokenDataset(clips.url, columns=["key", "view"], views="all")
    rows = {(row.key, row.view): row for row in clips.rows}
    seen = 0
    for batch in TokenLoader(dataset, 16, tail="pad", window=64):
        assert batch["index"].shape == (16, 4, 2, 3) and batch["mask"].shape == (16, 4)
        assert torch.equal(batch["mask"].sum(1), batch["frames"])
        for key, view, tokens, mask in zip(batch["key"], batch["view"], batch["index"], batch["mask"], strict=True):
            row = rows[key, int(view)]
            assert np.array_equal(tokens[mask].numpy(), clips.indices(row))
            assert not tokens[~mask].any()
        seen += int(batch["valid"].sum())
    assert seen == len(clips.rows)


@pytest.mark.parametrize("view", ["bits", "packed", ("groups", (9, 9))])
def test_other_views_hold_the_same_batches(clips, view):
    name = view if isinstance(view, str) else view[0]
    dataset = TokenDataset(clips.url, view=view)
    for batch, shown in zip(
        TokenLoader(TokenDataset(clips.url), 16, window=64), TokenLoader(dataset, 16, window=64), strict=True
    ):
        assert torch.equal(batch["sample"], shown["sample"])
        if name == "packed":
            assert torch.equal(dataset.unpack(shown["packed"]), batch["index"])
        elif name == "groups":
            assert torch.equal(shown["groups"][..., 0] << 9 | shown["groups"][..., 1], batch["index"])
        else:
            weights = 1 << torch.arange(17, -1, -1)
            assert torch.equal((shown["bits"] * weights).sum(-1), batch["index"])


def test_packed_rows_of_a_mixture_unpack_with_any_of_its_datasets(images, clips):
    """Though their longest rows differ."""

    def first_batch(**options):
        sources = {"images": (TokenDataset(images.url, **options), 1), "clips": (TokenDataset(clips.url, **options), 1)}
        return next(iter(TokenLoader(Mixture(sources), 16, window=64)))

    packed, index = first_batch(view="packed")["packed"], first_batch()["index"]
    for url in (images.url, clips.url):
        assert torch.equal(TokenDataset(url).unpack(packed), index)


def test_pinned_batches_hold_the_same_and_unpack_on_the_device(clips):
    """Page-locked where there is a GPU; anywhere else the option changes nothing."""
    has_gpu = torch.cuda.is_available()
    pinned = TokenLoader(TokenDataset(clips.url, view="packed"), 16, window=64, pin_memory=True)
    plain = TokenLoader(TokenDataset(clips.url), 16, window=64)
    for batch, other in zip(pinned, plain, strict=True):
        assert all(values.is_pinned() == has_gpu for values in batch.values() if isinstance(values, torch.Tensor))
        assert torch.equal(batch["sample"], other["sample"])
        packed = batch["packed"].to("cuda" if has_gpu else "cpu", non_blocking=True)
        assert torch.equal(pinned.datasets[0].unpack(packed).cpu(), other["index"])
    workers = torch.utils.data.DataLoader(pinned, batch_size=None, num_workers=1, multiprocessing_context="fork")
    assert [batch["sample"].tolist() for batch in workers] == samples(plain)


def test_sequences_do_not_depend_on_how_tokens_are_shown(clips):
    form = SequenceFormat(bos=0, eof=1, id_offset=10)
    for options in ({}, {"pack": Pack(seq_len=40, lanes=4)}):
        batches = [
            next(iter(TokenLoader(TokenDataset(clips.url, view=view), 16, window=64, format=form, **options)))
            for view in ("index", "packed", "bits")
        ]
        assert all(torch.equal(batch["ids"], batches[0]["ids"]) for batch in batches)
    ids, lengths = batches[0]["ids"], batches[0]["cu_seqlens"].diff()
    assert ids.shape == (16, 40) and lengths.sum() == 16 * 40


def test_latin_views_show_every_view_once(clips):
    loader = TokenLoader(TokenDataset(clips.url, columns=["key", "view"]), 15, tail="pad", window=64)
    shown = []
    for _ in range(2):
        for batch in loader:
            pairs = zip(batch["key"], batch["view"].tolist(), batch["valid"].tolist(), strict=True)
            shown += [(key, view) for key, view, valid in pairs if valid]
    assert sorted(shown) == sorted((row.key, row.view) for row in clips.rows)


def test_filters_hold_in_order_and_epochs(clips):
    dataset = TokenDataset(clips.url, columns=["key"], filters=[("caption", "present"), ("frames", ">=", 2)])
    expected = sorted({row.key for row in clips.rows if row.caption is not None and row.frames >= 2})
    found = []
    for batch in TokenLoader(dataset, 7, tail="pad", window=48):
        assert [dataset[int(number)]["key"] for number in batch["sample"]] == batch["key"]
        found += [key for key, valid in zip(batch["key"], batch["valid"], strict=True) if valid]
    assert sorted(found) == expected


def test_labels_are_dropped_by_sample_and_epoch(clips):
    def drops(**options):
        dataset = TokenDataset(clips.url, columns=["label", "caption"])
        loader = TokenLoader(dataset, 30, window=64, label_drop=0.3, null_label=1000, **options)
        return list(loader) + list(loader)

    plain = TokenLoader(TokenDataset(clips.url, columns=["label", "caption"]), 30, window=64)
    batches = drops()
    dropped = torch.stack([batch["dropped"] for batch in batches])
    assert 0.2 < dropped.float().mean() < 0.4
    for batch, whole in zip(batches, [*plain, *plain], strict=True):
        gone = batch["dropped"]
        assert (batch["label"][gone] == 1000).all()
        kept = torch.where(whole["label"] == -1, 1000, whole["label"])
        assert torch.equal(batch["label"][~gone], kept[~gone])
        captions = [None if drop else text for drop, text in zip(gone, whole["caption"], strict=True)]
        assert batch["caption"] == captions
    parts = [drops(rank=rank, world_size=2) for rank in range(2)]
    assert all(
        torch.equal(part["dropped"], batch["dropped"][0::2]) for part, batch in zip(parts[0], batches, strict=True)
    )
    assert not torch.equal(dropped[:5], dropped[5:])


def test_memory_holds_a_few_windows_whatever_the_number_of_files(tmp_path):
    """Counted where windows are read and let go, over an epoch of 40 windows."""
    writer = TokenDatasetWriter(url=str(tmp_path), clips_of_file=[160] * 4, row_group_rows=16).write()
    loader = TokenLoader(TokenDataset(writer.url), 8, window=16, prefetch=2)
    most = 0
    for number, _ in enumerate(loader):
        if number == 0:
            [stream] = open_streams()
        most = max(most, len(stream._windows))
    assert number == 79 and 2 <= most <= 3
    assert not stream._windows


def open_streams():
    # By type: isinstance asks objects of torch that warn.
    return [each for each in gc.get_objects() if type(each) is DatasetStream and each._windows]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch_size": 2, "rank": 0, "world_size": 4}, "at least one for each of 4 ranks"),
        ({"tail": "keep"}, r"tail='keep': choose from drop, pad, carry"),
        ({"rank": 2, "world_size": 2}, "rank is 2 and world_size 2"),
        ({"rank": 0}, "give both rank and world_size"),
        ({"window": 0}, "window is 0"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"label_drop": 0.1}, r"columns=\['label'\]"),
        ({"label_drop": 2}, "label_drop is 2"),
    ],
)
def test_options_that_cannot_be_are_refused(images, options, message):
    with pytest.raises(SpecError, match=message):
        TokenLoader(TokenDataset(images.url), **{"global_batch_size": 8} | options)


def test_a_dataset_without_samples_is_refused(images):
    with pytest.raises(SpecError, match=r"no samples\. Check its filters"):
        TokenLoader(TokenDataset(images.url, filters=[("width", "<", 1)]), 1)


def test_ranks_come_from_the_environment_of_torchrun(images, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    loader = TokenLoader(TokenDataset(images.url), 8)
    assert (loader.rank, loader.world_size) == (3, 4)
