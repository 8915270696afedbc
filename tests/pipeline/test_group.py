"""Grouping: one sample for every occurrence of a key, tokenizable or with the reason why not."""

import gzip
import io
import json
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset.tariterators import base_plus_ext, tarfile_to_samples

from pipeline.byte_stream import open_shard
from pipeline.group import MAX_MEMBERS, GroupCounts, group_samples, split_name
from pipeline.sample import Member
from pipeline.tar import read_members
from schemas.errors import ArchiveError, GzipCorrupt, ShardError, TarCorrupt, TarTruncated
from schemas.jobspec import LimitsSpec

SHARED = Path(os.environ.get("BSQTOK_SHARED", Path(__file__).parents[3] / "shared" / "data"))
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


def member(name, kind="file", payload=b"x", size=None):
    return Member(name, kind, len(payload or b"") if size is None else size, 0, payload)


def outcomes(samples):
    return [(sample.key, type(sample.failure).__name__ if sample.failure else "ok") for sample in samples]


def group(*names):
    return outcomes(group_samples([member(name) for name in names]))


def read_shard(path):
    """Return samples, and the error that ended the reading or None."""
    samples = []
    try:
        with open_shard(str(path)) as stream:
            samples.extend(group_samples(read_members(stream)))
    except (ArchiveError, ShardError) as error:
        return samples, error
    return samples, None


def write_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, payload in files:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.jpg", ("a", "jpg")),
        ("a.seg.PNG", ("a", "seg.PNG")),
        ("x.y/a.b.jpg", ("x.y/a", "b.jpg")),
        ("./000.jpg", ("./000", "jpg")),
        ("a.", ("a", "")),
        ("README", None),
        ("x.y/noext", None),
        (".hidden.jpg", None),
        ("sub/._a.jpg", None),
        ("__MACOSX/a.jpg", None),
        ("x/__MACOSX/a.jpg", None),
        ("x__MACOSX/a.jpg", ("x__MACOSX/a", "jpg")),
        ("__meta__/a.jpg", None),
        ("", None),
        ("a.jpg/", None),
    ],
)
def test_names_split_into_key_and_extension(name, expected):
    assert split_name(name) == expected


@given(st.text(st.sampled_from("ab./_é"), max_size=12))
def test_the_key_rule_is_that_of_webdataset(name):
    """Except for dot files, which webdataset gives the key of their folder."""
    expected = base_plus_ext(name)
    if name.rpartition("/")[2].startswith(".") or name.startswith("__"):
        return
    assert split_name(name) == (expected if expected[0] is not None else None)


def test_neighbours_of_one_key_are_a_sample():
    samples = list(
        group_samples([member("a.jpg"), member("a.txt"), member("b.PNG"), member("c.json"), member("c.mp4")])
    )
    assert outcomes(samples) == [("a", "ok"), ("b", "ok"), ("c", "ok")]
    assert [sample.position for sample in samples] == [0, 1, 2]
    assert list(samples[1].members) == ["PNG"] and samples[2].media.name == "c.mp4"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # The same key again, whole: a second sample of that name.
        (["a.jpg", "b.jpg", "a.jpg"], [("a", "ok"), ("b", "ok"), ("a", "KeyDuplicated")]),
        # Interleaved: what comes later belongs to the first, which is tokenized without it.
        (["a.jpg", "b.jpg", "a.txt", "b.txt"], [("a", "ok"), ("b", "ok"), ("a", "KeySplit"), ("b", "KeySplit")]),
        (["a.jpg", "b.jpg", "a.txt", "b.txt", "a.txt"], [("a", "ok"), ("b", "ok"), ("a", "KeySplit"),
                                                         ("b", "KeySplit"), ("a", "KeyDuplicated")]),
        # Dot files between the members of a sample do not split it.
        (["a.jpg", "._a.jpg", "a.txt"], [("a", "ok")]),
        (["a.jpg", "a.JPG"], [("a", "AmbiguousMedia")]),
        (["a.jpg", "a.jpg", "b.jpg"], [("a", "AmbiguousMedia"), ("b", "ok")]),
        (["a.jpg", "a.mp4"], [("a", "AmbiguousMedia")]),
        (["a.jpg", "a.txt", "a.TXT"], [("a", "KeyDuplicated")]),
        (["a.txt", "a.json"], [("a", "NoMedia")]),
        (["a.xyz"], [("a", "NoMedia")]),
    ],
)  # fmt: skip
def test_every_occurrence_of_a_key_is_accounted_for(names, expected):
    assert group(*names) == expected


def test_a_failed_first_occurrence_does_not_free_the_key():
    assert group("a.txt", "b.jpg", "a.jpg") == [("a", "NoMedia"), ("b", "ok"), ("a", "KeySplit")]


@pytest.mark.parametrize("kind", ["link", "device", "sparse"])
def test_members_that_are_never_read_are_named(kind):
    (sample,) = group_samples([member("a.jpg", kind, None), member("a.txt")])
    assert type(sample.failure).__name__ == "NoMedia" and "a.jpg" in str(sample.failure)
    (sample,) = group_samples([member("a.jpg"), member("a.txt", kind, None)])
    assert sample.failure is None


def test_a_member_over_the_limit_says_so_with_both_numbers():
    (sample,) = group_samples([member("a.jpg", payload=None, size=5000)], LimitsSpec(max_member_bytes=4096))
    assert type(sample.failure).__name__ == "MemberTooLarge"
    assert "5,000" in str(sample.failure) and "4,096" in str(sample.failure)


def test_a_picture_with_a_foreign_extension_is_recognised_in_the_message_only():
    (sample,) = group_samples([member("a.xyz", payload=PNG)])
    assert "content of an image" in str(sample.failure)


def test_one_key_cannot_fill_the_memory():
    many = [member(f"a.{number}", payload=b"x" * 1000) for number in range(MAX_MEMBERS + 50)]
    (sample,) = group_samples(many)
    assert type(sample.failure).__name__ == "TooManyMembers" and len(sample.members) == MAX_MEMBERS
    films = [member(f"a.{number}.mp4", payload=b"x" * 1000) for number in range(50)]
    (sample,) = group_samples(films)
    assert sample.num_bytes < 1024 + 2 * 1000


def test_members_without_a_key_are_counted():
    counts = GroupCounts()
    list(group_samples([member("README"), member("._a.jpg"), member("a.jpg")], counts=counts))
    assert (counts.num_samples, counts.num_passed_over) == (1, 2)


def test_long_keys_are_told_apart():
    stem = "k" * 5000
    assert group(f"{stem}a.jpg", f"{stem}b.jpg", f"{stem}a.jpg")[2][1] == "KeyDuplicated"


def test_a_key_that_comes_for_ever_is_remembered_by_few_extensions():
    names = [name for number in range(3000) for name in (f"a.x{number}", f"b{number}.jpg")]
    found = [error for key, error in group(*names) if key == "a"]
    assert found == ["NoMedia"] + ["KeySplit"] * (MAX_MEMBERS - 1) + ["KeyDuplicated"] * (3000 - MAX_MEMBERS)


def test_long_extensions_are_told_apart_and_not_kept():
    pad = "e" * 10_000
    assert group(f"a.{pad}1", "b.jpg", f"a.{pad}2", "c.jpg", f"a.{pad}1")[::2] == [
        ("a", "NoMedia"), ("a", "KeySplit"), ("a", "KeyDuplicated"),
    ]  # fmt: skip
    tracemalloc.start()
    for _ in group_samples(member(f"k{number}.{number}{pad}.jpg") for number in range(1000)):
        pass
    kept = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert kept < 5e6


def damaged(error, *names):
    def members():
        yield from (member(name) for name in names)
        raise error

    samples = []
    with pytest.raises(type(error)):
        samples.extend(group_samples(members()))
    return outcomes(samples)


def test_a_cut_inside_a_member_fails_its_sample_and_keeps_the_one_before():
    error = TarTruncated("cut", offset=9, member="b.jpg", sure=True)
    assert damaged(error, "a.jpg") == [("a", "ok"), ("b", "SampleCutOff")]
    error = TarTruncated("cut", offset=9, member="b.txt", sure=True)
    assert damaged(error, "a.jpg", "b.jpg") == [("a", "ok"), ("b", "SampleCutOff")]


def test_after_a_cut_between_members_a_sample_counts_when_it_has_what_the_others_have():
    def cut():
        return TarTruncated("cut", offset=9)

    assert damaged(cut(), "a.jpg", "a.txt", "b.jpg", "b.txt") == [("a", "ok"), ("b", "ok")]
    assert damaged(cut(), "a.jpg", "a.txt", "b.jpg") == [("a", "ok"), ("b", "SampleCutOff")]
    assert damaged(cut(), "a.jpg") == [("a", "SampleCutOff")], "no other sample to compare with"
    assert damaged(cut()) == []


def test_damage_behind_the_end_of_the_archive_costs_no_sample():
    assert damaged(GzipCorrupt("crc", offset=9, sure=True), "a.jpg") == [("a", "ok")]


def test_a_damaged_header_fails_the_sample_that_it_names():
    error = TarCorrupt("bad", offset=9, member="c.jpg")
    assert damaged(error, "a.jpg", "a.txt", "b.jpg", "b.txt") == [("a", "ok"), ("b", "ok"), ("c", "SampleCutOff")]


def test_a_shard_cut_at_any_byte_gives_a_prefix_and_never_a_shortened_sample(tmp_path):
    files = [(f"{key}.{extension}", bytes([number]) * 300) for number, key in enumerate("abc")
             for extension in ("jpg", "txt")]  # fmt: skip
    whole = write_tar(tmp_path / "a.tar", files).read_bytes()
    path = tmp_path / "b.tar"
    for length in range(512, len(whole), 64):
        path.write_bytes(whole[:length])
        samples, error = read_shard(path)
        good = [sample for sample in samples if sample.failure is None]
        assert [sample.key for sample in good] == list("abc"[: len(good)])
        assert all(set(sample.members) == {"jpg", "txt"} for sample in good)
        assert error is not None or len(good) == 3


def test_a_gzip_shard_cut_at_any_byte_gives_a_prefix(tmp_path):
    files = [(f"{number}.jpg", os.urandom(700)) for number in range(6)]
    whole = gzip.compress(write_tar(tmp_path / "a.tar", files).read_bytes())
    path = tmp_path / "b.tar.gz"
    for length in range(20, len(whole), 37):
        path.write_bytes(whole[:length])
        samples, error = read_shard(path)
        good = [(sample.media.name, sample.media.payload) for sample in samples if sample.failure is None]
        assert error is not None and good == files[: len(good)]


def test_samples_are_those_of_webdataset_on_a_good_shard(tmp_path):
    files = [
        (f"d.{n % 3}/{n:03d}.{extension}", os.urandom(50)) for n in range(40) for extension in ("jpg", "cls", "x.y")
    ]
    path = write_tar(tmp_path / "a.tar", files)
    expected = [
        (sample["__key__"], {name: value for name, value in sample.items() if not name.startswith("__")})
        for sample in tarfile_to_samples()([{"url": str(path)}])
    ]
    samples, error = read_shard(path)
    assert error is None
    assert [(s.key, {name: m.payload for name, m in s.members.items()}) for s in samples] == expected


def nasty_tars():
    if not (SHARED / "nasty").is_dir():
        return []
    expected = json.loads((SHARED / "nasty" / "expected.json").read_text())
    return [(name, shard, [case for case in expected["cases"] if case["shard"] == name])
            for name, shard in expected["shards"].items()]  # fmt: skip


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "nasty").is_dir(), reason="shared test data is absent")
@pytest.mark.parametrize(
    ("name", "shard", "cases"), nasty_tars(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_the_nasty_shards_give_what_is_expected_of_them(name, shard, cases):
    samples, error = read_shard(SHARED / "nasty" / name)
    if shard["expect"] != "either":
        assert (error is not None) == (shard["expect"] == "fail")
    for case in cases:
        keys = {case["key"], *case.get("key_allowed", [])}
        if "key_bytes_hex" in case:
            keys = {bytes.fromhex(case["key_bytes_hex"]).decode("utf-8", "backslashreplace")}
        found = [sample for sample in samples if sample.key in keys]
        absent_allowed = case.get("may_be_absent") or "covered by the shard failure" in case.get("note", "")
        if not found:
            assert absent_allowed and error is not None, case
            continue
        sample = found[case.get("occurrence", 1) - 1]
        if sample.failure is None:
            # What only decoding can find is not expected of grouping.
            later = {"decode", "limit", "sidecar"}.intersection(case.get("fail", {}).get("stage", []))
            assert case["expect"] != "fail" or later, case
            if case["expect"] == "ok" and len(sample.members) == len(case.get("members", [])):
                assert [[m.name, m.size] for m in sample.members.values()] == case["members"]
        else:
            assert case["expect"] != "ok", (case, sample.failure)
            assert sample.failure.stage in case["fail"]["stage"], (case, sample.failure)
    if "bulk" in shard:
        bulk = [sample for sample in samples if sample.key != "zz-last"]
        assert len(bulk) == shard["bulk"]["count"]
        assert {type(sample.failure).__name__ for sample in bulk} == {"NoMedia"}
