"""A dataset as samples: every view of the tokens, columns, filters, keys, and refusals in one clear line."""

import pickle

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import TokenDataset
from schemas.errors import BsqError, FingerprintDiffers, SpecError
from schemas.manifest import manifest_table
from tests.token_datasets import TokenDatasetWriter
from tokenizer.codes import indices_to_bits


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five files of pictures, one of them empty."""
    folder = tmp_path_factory.mktemp("images")
    return TokenDatasetWriter(url=str(folder), clips_of_file=[50, 0, 33, 70, 41], row_group_rows=16).write()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Three files with clips of 1 to 5 frames, three views of each."""
    folder = tmp_path_factory.mktemp("clips")
    return TokenDatasetWriter(
        url=str(folder),
        clips_of_file=[20, 31, 17],
        views=3,
        frames=lambda file, clip: 1 + (3 * file + clip) % 5,
        caption=lambda file, clip: None if clip % 3 == 0 else f"{clip}",
        label=lambda file, clip: None if clip % 4 == 0 else clip % 7,
        row_group_rows=12,
    ).write()


def same_tokens(sample, writer, row):
    return np.array_equal(sample["index"].numpy(), writer.indices(row))


def test_every_row_is_there_in_the_order_of_the_manifest(images, clips):
    for writer in (images, clips):
        dataset = TokenDataset(writer.url, columns=["key", "view", "frames", "caption", "label"], views="all")
        assert len(dataset) == len(writer.rows)
        for sample, row in zip(dataset.__getitems__(range(len(dataset))), writer.rows, strict=True):
            assert sample["index"].dtype == torch.int64 and same_tokens(sample, writer, row)
            assert (sample["key"], sample["view"], sample["frames"]) == (row.key, row.view, row.frames)
            assert sample["caption"] == row.caption
            assert sample["label"] == (-1 if row.label is None else row.label)


def test_samples_come_in_any_order_from_the_end_and_again(images):
    dataset = TokenDataset(images.url)
    wanted = [193, 0, 51, -1, 51, 100, -194]
    for sample, number in zip(dataset.__getitems__(wanted), wanted, strict=True):
        assert same_tokens(sample, images, images.rows[number])
    assert same_tokens(dataset[7], images, images.rows[7])
    for outside in (194, -195):
        with pytest.raises(IndexError, match=r"the dataset has 194"):
            dataset[outside]
    assert dataset.__getitems__([]) == []


def test_iterating_a_dataset_ends(images):
    assert sum(1 for _ in TokenDataset(images.url)) == 194


@pytest.mark.parametrize("groups", [(9, 9), (6, 12), (1, 17), (2, 2, 2, 2, 2, 2, 2, 2, 2)])
def test_views_of_a_token_agree(images, groups):
    rows = range(0, 194, 13)
    index = torch.stack([sample["index"] for sample in TokenDataset(images.url).__getitems__(rows)])
    bits = torch.stack([sample["bits"] for sample in TokenDataset(images.url, view="bits").__getitems__(rows)])
    assert bits.dtype == torch.bool and torch.equal(bits, indices_to_bits(index, 18))
    shown = TokenDataset(images.url, view=("groups", groups)).__getitems__(rows)
    shown = torch.stack([sample["groups"] for sample in shown])
    joined = torch.zeros_like(index)
    for group, width in enumerate(groups):
        joined = (joined << width) + shown[..., group]
        assert shown[..., group].max() < 1 << width
    assert torch.equal(joined, index)
    packed = TokenDataset(images.url, view="packed").__getitems__(rows)
    assert [sample["packed"].numpy().tobytes() for sample in packed] == [images.rows[row].tokens for row in rows]
    packed = torch.stack([sample["packed"] for sample in packed])
    dataset = TokenDataset(images.url)
    assert torch.equal(dataset.unpack(packed), index)
    assert torch.equal(dataset.unpack(packed, ("groups", groups)), shown)


@pytest.mark.parametrize("bits", [1, 7, 13, 25, 36, 58, 64])
def test_tokens_of_any_width(tmp_path, bits):
    writer = TokenDatasetWriter(
        url=str(tmp_path), clips_of_file=[9], bits=bits, group_size=1, frames=lambda file, clip: 1 + clip % 2
    ).write()
    for sample, row in zip(TokenDataset(tmp_path, view="bits"), writer.rows, strict=True):
        expected = [[int(bit) for bit in f"{int(value):0{bits}b}"] for value in writer.indices(row).flat]
        assert sample["bits"].int().reshape(-1, bits).tolist() == expected
    if bits > 62:
        with pytest.raises(SpecError, match=r"64 bits do not fit int64\. Use 'bits'"):
            TokenDataset(tmp_path)
        halves = TokenDataset(tmp_path, view=("groups", (32, 32)))[0]["groups"]
        assert (int(halves[0, 0, 0, 0]) << 32) + int(halves[0, 0, 0, 1]) == writer.indices(writer.rows[0])[0, 0, 0]
    else:
        for sample, row in zip(TokenDataset(tmp_path), writer.rows, strict=True):
            assert same_tokens(sample, writer, row)


def test_every_view_of_every_clip_is_shown_once_in_as_many_epochs(clips):
    dataset = TokenDataset(clips.url, columns=["key", "view"])
    assert len(dataset) == 68
    shown = []
    for epoch in range(4, 7):
        dataset.set_epoch(epoch)
        samples = dataset.__getitems__(range(68))
        shown += [(sample["key"], int(sample["view"])) for sample in samples]
        rows = {(row.key, row.view): row for row in clips.rows}
        assert all(same_tokens(sample, clips, rows[sample["key"], int(sample["view"])]) for sample in samples)
    assert sorted(shown) == sorted((row.key, row.view) for row in clips.rows)


def test_one_view_alone(clips):
    dataset = TokenDataset(clips.url, columns=["view"], views=2)
    assert {int(sample["view"]) for sample in dataset.__getitems__(range(len(dataset)))} == {2}
    with pytest.raises(SpecError, match=r"views=3: choose 'latin', 'all', or the number of a view from 0 to 2\."):
        TokenDataset(clips.url, views=3)


@pytest.mark.parametrize(
    ("filters", "passes"),
    [
        ([("caption", "present")], lambda row: row.caption is not None),
        ([("label", "missing")], lambda row: row.label is None),
        ([("frames", ">=", 4)], lambda row: row.frames >= 4),
        ([("label", "in", [2, 5]), ("frames", "<", 5)], lambda row: row.label in (2, 5) and row.frames < 5),
        ([("label", "!=", 3)], lambda row: row.label not in (3, None)),
        ([("label", "not in", [1, 2, 3])], lambda row: row.label in (0, 4, 5, 6)),
        ([("key", "==", "0001/000004")], lambda row: row.key == "0001/000004"),
        ([("width", ">", 640)], lambda row: False),
        ([("width", "==", 640), ("flipped", "==", False)], lambda row: True),
        (
            [("key", ">", "0000/000018"), ("caption", "<", "2")],
            lambda row: row.key > "0000/000018" and (row.caption or "z") < "2",
        ),
    ],
)
def test_filters_leave_what_passes_and_nothing_else(clips, tmp_path, filters, passes):
    expected = [row for row in clips.rows if passes(row)]
    for attempt in range(2):  # the second reads what the first kept
        dataset = TokenDataset(clips.url, columns=["key", "view"], views="all", filters=filters, cache_dir=tmp_path)
        found = dataset.__getitems__(range(len(dataset)))
        assert [(each["key"], each["view"]) for each in found] == [(row.key, row.view) for row in expected], attempt
        assert all(same_tokens(sample, clips, row) for sample, row in zip(found, expected, strict=True))
    assert len(TokenDataset(clips.url, filters=filters)) == len(expected) // 3
    assert len(list(tmp_path.rglob("*.bits"))) == 1


@pytest.mark.parametrize(
    "filters", [[("frames", ">=", 9)], [("frames", "<", 9)], [("caption", "present")], [("label", "==", 8)]]
)
def test_a_filter_that_statistics_decide_reads_no_column(tmp_path, filters):
    """The columns are made unreadable, and are not missed; a filter that needs them says so."""
    writer = TokenDatasetWriter(
        url=str(tmp_path),
        clips_of_file=[40, 30, 35],
        frames=lambda file, clip: 1 + clip % 4,
        label=lambda file, clip: clip % 7,
        row_group_rows=16,
    ).write()
    expected = len(TokenDataset(tmp_path, filters=filters))
    assert expected in (0, 105)
    for commit in writer.commits:
        path = tmp_path / commit.file
        data, metadata = bytearray(path.read_bytes()), pq.ParquetFile(path).metadata
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        for chunk in (group.column(number) for group in groups for number in range(group.num_columns)):
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
        path.write_bytes(data)
    assert len(TokenDataset(tmp_path, filters=filters)) == expected
    with pytest.raises(BsqError, match="gone or altered"):
        TokenDataset(tmp_path, filters=[("frames", ">=", 2)])


def test_a_kept_filter_that_was_damaged_is_made_again(clips, tmp_path):
    def open_dataset():
        return TokenDataset(clips.url, filters=[("frames", "==", 1)], cache_dir=tmp_path)

    expected = len(open_dataset())
    [kept] = tmp_path.rglob("*.bits")
    kept.write_bytes(kept.read_bytes()[:-1] + b"\xff")
    assert len(open_dataset()) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"filters": [("captoin", "present")]}, r"no column 'captoin' .* Did you mean 'caption'\?"),
        ({"filters": [("label", "=", 3)]}, r"no operator '='\. Choose from ==,"),
        ({"filters": [("frames", ">=", "many")]}, r"'many' cannot be compared with 'frames'"),
        ({"filters": [("label", "in", 3)]}, r"needs a list, not 3"),
        ({"filters": [("label", "==", None)]}, r"is asked for with 'missing'"),
        ({"filters": ["label"]}, r"'label' is no condition"),
        ({"columns": ["kee"]}, r"has no 'kee'\. Did you mean 'key'\?"),
        ({"columns": "key"}, r"give a list, such as \['key'\]"),
        ({"view": "indices"}, r"choose from 'index', .* Did you mean 'index'\?"),
        ({"view": ("groups", (9, 8))}, r"these make 17 bits; the tokens have 18"),
        ({"view": ("groups", 9)}, r"view=\('groups', 9\): choose from .* and \('groups', \(9, 9\)\)"),
        ({"check": "crc"}, r"choose 'size' or 'sha256'"),
    ],
)
def test_options_that_cannot_be_are_refused(images, options, message):
    with pytest.raises(SpecError, match=message):
        TokenDataset(images.url, **options)


def test_keys_are_found_in_every_shard_that_has_them(clips, images):
    dataset = TokenDataset(clips.url, columns=["key"], views="all")
    for key in ("0000/000000", "0001/000030", "0002/000016"):
        found = dataset.find(key)
        assert len(found) == 3 and found == sorted(found)
        assert {dataset[number]["key"] for number in found} == {key}
    assert TokenDataset(clips.url).find("0001/000030") == [50]
    filtered = TokenDataset(clips.url, columns=["key"], filters=[("caption", "present")])
    assert [filtered[number]["key"] for number in filtered.find("0001/000001")] == ["0001/000001"]
    assert filtered.find("0001/000003") == []
    assert TokenDataset(images.url).find("nowhere") == []


def test_a_dataset_travels_to_another_process(clips):
    dataset = TokenDataset(clips.url, filters=[("frames", ">", 1)])
    dataset[0]
    copy = pickle.loads(pickle.dumps(dataset))
    assert len(copy) == len(dataset) and torch.equal(copy[5]["index"], dataset[5]["index"])


class TestRefused:
    """What cannot be trusted is refused in one line that says what to do."""

    @pytest.fixture
    def written(self, tmp_path):
        return TokenDatasetWriter(url=str(tmp_path / "d"), clips_of_file=[30, 30], row_group_rows=16)

    def first_file(self, writer):
        return next(path for path in sorted((writer.storage.local_path("tokens") / "0000").iterdir()))

    def refused(self, writer, match, error=BsqError, read=True, **options):
        with pytest.raises(error, match=match) as caught:
            dataset = TokenDataset(writer.url, **options)
            if read:
                dataset.__getitems__(range(len(dataset)))
        assert str(caught.value).count("\n") == 0

    def test_no_dataset(self, tmp_path):
        with pytest.raises(BsqError, match=r"there is no dataset here \(no job\.json\)\. Check the path\."):
            TokenDataset(tmp_path)

    def test_not_finished(self, written):
        written.finished = False
        written.write()
        self.refused(written, r"not finished\. Run `bsq resume .*allow_partial=True", read=False)
        partial = TokenDataset(written.url, allow_partial=True, columns=["key"])
        assert len(partial) == 60 and not partial.info.complete and partial.info.generation is None
        assert partial.find("0001/000007") == [37]

    def test_shards_failed(self, written):
        written.failed_shards = 2
        written.write()
        self.refused(written, r"incomplete, 2 shards failed\. Run `bsq status", read=False)
        assert len(TokenDataset(written.url, allow_partial=True)) == 60

    def test_another_fingerprint_than_expected(self, written):
        written.write()
        self.refused(
            written, r"is expected .*made with other settings", FingerprintDiffers, expect_fingerprint="0123456789"
        )
        self.refused(written, "is expected", FingerprintDiffers, expect_fingerprint=written.job.fingerprint[:7])
        assert len(TokenDataset(written.url, expect_fingerprint=written.job.fingerprint[:8])) == 60

    def test_a_generation_that_is_not_there(self, written):
        written.write()
        self.refused(written, r"generation 3 is not finished, or was never begun", generation=3)
        assert TokenDataset(written.url, generation=0).info.generation == 0

    def test_a_manifest_of_another_dataset(self, written, tmp_path):
        written.write()
        other = TokenDatasetWriter(url=str(tmp_path / "other"), clips_of_file=[30, 30], row_group_rows=16, size=64)
        other.write()
        for name in ("manifest/0000.json", "manifest/0000.parquet"):
            (tmp_path / "d" / name).write_bytes((tmp_path / "other" / name).read_bytes())
        self.refused(written, r"its manifest has fingerprint \w{8} and its job\.json \w{8}; .* mixed\. Restore it")

    def test_a_file_of_another_dataset(self, written, tmp_path):
        written.write()
        other = TokenDatasetWriter(url=str(tmp_path / "other"), clips_of_file=[30, 30], row_group_rows=16, size=64)
        other.write()
        self.first_file(written).write_bytes(self.first_file(other).read_bytes())
        self.refused(written, r"its fingerprint is .* a file of another dataset lies here")

    def test_a_file_that_is_gone(self, written):
        written.write()
        self.first_file(written).unlink()
        self.refused(written, r"gone or altered: No such file.*bsq verify")

    @pytest.mark.parametrize("change", [-1, 1, -2000])
    def test_a_file_of_another_size(self, written, change):
        written.write()
        data = self.first_file(written).read_bytes()
        self.first_file(written).write_bytes(data[:change] if change < 0 else data + bytes(change))
        self.refused(written, r"it has [\d,]+ bytes, [\d,]+ are recorded")

    def test_a_file_of_another_shard(self, written):
        written.write()
        files = sorted((written.storage.local_path("tokens") / "0000").iterdir())
        sizes = [commit.bytes for commit in written.commits]
        files[0].write_bytes(files[1].read_bytes())
        match = "its footer is not that of the file" if sizes[0] == sizes[1] else "are recorded"
        self.refused(written, match)

    def test_a_changed_bit_is_found_on_request(self, written):
        written.write()
        path = self.first_file(written)
        data = bytearray(path.read_bytes())
        data[written.commits[0].tokens_offset[0] + 200] ^= 1
        path.write_bytes(data)
        assert len(list(TokenDataset(written.url))) == 60
        self.refused(written, r"its SHA-256 is not the one that is recorded", check="sha256")

    def test_a_manifest_that_contradicts_itself(self, written):
        written.finished = False
        written.write()
        wrong = [commit.model_copy(update={"row_groups": [16, 15]}) for commit in written.commits]
        written.finish(manifest_table((commit, "", 0) for commit in wrong))
        self.refused(written, r"the manifest contradicts itself in its rows")

    def test_a_manifest_whose_rows_are_elsewhere(self, written):
        written.finished = False
        written.write()
        wrong = [commit.model_copy(update={"row_groups": [14, 16]}) for commit in written.commits]
        written.finish(manifest_table((commit, "", 0) for commit in wrong))
        self.refused(written, r"its footer is not that of the file that is recorded")

    def test_other_frames_than_recorded(self, written):
        written.finished = False
        written.frames = lambda file, clip: 1 + clip % 3
        written.write()
        wrong = [commit.model_copy(update={"max_frames": 2}) for commit in written.commits]
        written.finish(manifest_table((commit, "", 0) for commit in wrong))
        self.refused(written, r"its rows have other numbers of frames than recorded")


def test_columns_of_every_type(clips):
    names = [name for name in clips_columns() if name != "tokens"]
    dataset = TokenDataset(clips.url, columns=names, views="all")
    sample = dataset[50]
    row = clips.rows[50]
    assert (sample["key"], sample["caption"], sample["metadata"]) == (row.key, row.caption, None)
    assert sample["crop"].tolist() == [80, 0, 480, 480] and sample["flipped"].item() is False
    assert sample["position"].item() == 50 // 3 and sample["width"].item() == 640
    image = next(number for number, row in enumerate(clips.rows) if row.frames == 1)
    assert torch.isnan(dataset[image]["start"]) and dataset[image]["frame_times"] is None


def clips_columns():
    from schemas.tokenfile import token_schema

    return token_schema(("caption", "label", "metadata")).names


def test_an_empty_dataset_has_no_samples(tmp_path):
    TokenDatasetWriter(url=str(tmp_path), clips_of_file=[0, 0]).write()
    dataset = TokenDataset(tmp_path, columns=["key"])
    assert len(dataset) == 0 and dataset.__getitems__([]) == [] and dataset.find("a") == []


def test_the_writer_of_these_tests_packs_as_the_project_does(images):
    # So that both sides of the comparisons above cannot share one mistake.
    from tokenizer.codes import pack_indices

    for row in images.rows[:20]:
        assert pack_indices(images.indices(row).reshape(1, -1), 18).tobytes() == row.tokens


def test_a_manifest_of_many_files_opens_without_opening_one(tmp_path):
    """The path that `benchmarks.loading` takes with a million files, here with twenty thousand."""
    from benchmarks.loading import open_in_a_fresh_process, write_simulated_manifest

    write_simulated_manifest(tmp_path, 20_000)
    found = open_in_a_fresh_process(tmp_path)
    assert found["samples"] == 200_000_000 and found["windows"] > 6000
    # A million files may take 1 GB: 50 times what these take, beside the imports.
    assert found["opened_mb"] - found["imports_mb"] < 100
    assert not (tmp_path / "tokens").exists()
    dataset = TokenDataset(tmp_path)
    plan = dataset.plan_epoch(1, 2, shuffle=True, window_rows=32_768)
    assert sorted(plan.units.tolist()) == list(range(200_000))
