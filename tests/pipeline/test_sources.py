"""From what a user names to an ordered list of shards."""

import time

import fsspec
import pytest
from braceexpand import braceexpand
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sources import MAX_SHARDS, _count_expansions, expand_shards
from schemas.errors import SpecError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.tar", "a.tar", "c[1].tar", "note.txt", "sub/d.tar"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_ranges_keep_their_zeros_and_order():
    assert expand_shards(["s3://b/x-{008..011}.tar", "memory://b/{q,p}.tar"])[:5] == [
        "s3://b/x-008.tar", "s3://b/x-009.tar", "s3://b/x-010.tar", "s3://b/x-011.tar", "memory://b/q.tar",
    ]  # fmt: skip


def test_local_names_become_absolute_and_globs_are_sorted(folder):
    assert expand_shards(["./sub/../b.tar"]) == [f"{folder}/b.tar"]
    assert expand_shards(["file://" + str(folder / "b.tar")]) == [f"{folder}/b.tar"]
    assert expand_shards(["*.tar"]) == [f"{folder}/{name}" for name in ("a.tar", "b.tar", "c[1].tar")]
    assert expand_shards(["**/*.tar"])[-1] == f"{folder}/sub/d.tar"
    assert expand_shards(["sub", "a.tar"][1:]) == [f"{folder}/a.tar"]


def test_a_file_whose_name_looks_like_a_pattern_is_itself(folder):
    (folder / "x{1..2}.tar").write_bytes(b"")
    assert expand_shards(["c[1].tar", "x{1..2}.tar"]) == [f"{folder}/c[1].tar", f"{folder}/x{{1..2}}.tar"]


def test_a_missing_file_stays_in_the_list(folder):
    assert expand_shards(["missing.tar"]) == [f"{folder}/missing.tar"]


@pytest.mark.parametrize("name", ["x" * 300 + ".tar", "y" * 5000, "z" * 300 + "::x.tar", "~nobody-of-this-name/x.tar"])
def test_a_name_that_no_file_can_have_stays_in_the_list_too(folder, name):
    (folder / "list.txt").write_text(f"a.tar\n{name}\n")
    urls = expand_shards(["@list.txt"])
    assert len(urls) == 2 and urls[1].endswith(name)


def test_lists_hold_patterns_and_comments(folder):
    (folder / "list.txt").write_text("# first\n\n  b.tar \r\ns3://x/{0..1}.tar\n", encoding="utf-8")
    assert expand_shards(["@list.txt", "a.tar"]) == [
        f"{folder}/b.tar", "s3://x/0.tar", "s3://x/1.tar", f"{folder}/a.tar",
    ]  # fmt: skip


def test_globs_in_object_stores_and_chained_urls(folder):
    memory = fsspec.filesystem("memory")
    for name in ("2.tar", "1.tar", "x.txt"):
        memory.pipe_file(f"/shards/{name}", b"")
    assert expand_shards(["memory://shards/*.tar"]) == ["memory://shards/1.tar", "memory://shards/2.tar"]
    assert expand_shards(["simplecache::memory://shards/{1..2}.tar"])[0] == "simplecache::memory://shards/1.tar"
    assert expand_shards(["simplecache::memory://shards/?.tar"])[1] == "simplecache::memory://shards/2.tar"
    assert expand_shards(["zip://a.tar::s3://b/z.zip"]) == ["zip://a.tar::s3://b/z.zip"]


def test_a_query_is_no_glob():
    for url in ("https://h/a.tar?sig=a*b&c[0]=1", "s3://b/a.tar?versionId=abc"):
        assert expand_shards([url]) == [url]


@pytest.mark.parametrize(
    ("patterns", "part"),
    [
        ([], "No shards"),
        (["  "], "empty"),
        (["*.nothing"], "nothing matches"),
        (["memory://nowhere/*.tar"], "nothing matches"),
        (["a.tar", "./a.tar"], "twice"),
        (["{a,a}.tar"], "twice"),
        (["sub"], "folder"),
        (["a\nb.tar"], "holds"),
        (["a\udc80.tar"], "holds"),
        (["a\x7f.tar"], "holds"),
        (["nosuch://b/a.tar"], "nosuch. Give a path, or a URL such as s3://"),
        (["@missing.txt"], "no such file"),
        (["@nested.txt"], "another list"),
        (["@latin.txt"], "UTF-8"),
        (["@control.txt"], "holds"),
        (["a{b"], "braces"),
        (["{0,1}-{000..x27}.tar"], "{000..x27} is no range. Write ranges as {000..127}"),
        (["{0..99999}{0..99999}.tar"], "more than"),
        (["{0..99999999999999999999999}.tar"], "more than"),
        (["{" * 50 + "1..9" + "}" * 50 + "{0..999999}{0..999}"], "more than"),
        (["s3://key:secret@b/{0..99999999}.tar"], "more than"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(folder, patterns, part):
    (folder / "nested.txt").write_text("@other.txt\n", encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"\xe9.tar\n")
    (folder / "control.txt").write_bytes(b"a\x01.tar\n")
    began = time.monotonic()
    with pytest.raises(SpecError) as caught:
        expand_shards(patterns)
    assert part in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert "secret" not in str(caught.value) and time.monotonic() - began < 5


@given(st.text(st.sampled_from("{}{},.ab0123\\"), max_size=16))
def test_expansions_are_never_more_than_counted(pattern):
    bound = _count_expansions(pattern)
    if bound > 5000:
        return
    try:
        num_expansions = len(list(braceexpand(pattern)))
    except ValueError:
        return
    assert num_expansions <= bound


def test_the_largest_job_is_stated():
    assert _count_expansions("{0..9999999}") == MAX_SHARDS
