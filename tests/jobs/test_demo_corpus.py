from __future__ import annotations

import hashlib
import io
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import av
import pytest
import webdataset
from PIL import Image

from jobs import demo_corpus
from jobs.demo import run_demo
from jobs.demo_corpus import CLIP_RATE, DemoCorpus, build_demo_corpus, find_photos
from schemas.errors import OutputNotOurs, SpecError

IMAGE_EXTENSIONS = {"jpg", "jpeg", "png", "webp"}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> DemoCorpus:
    return build_demo_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def samples(corpus) -> list[dict]:
    urls = [str(path) for path in corpus.shards]
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def media(sample: dict) -> str:
    (extension,) = {name for name in sample if not name.startswith("__")} - {"txt", "cls", "json"}
    return extension


def test_webdataset_reads_every_sample_with_its_members(corpus, samples):
    kinds = Counter(media(sample) for sample in samples)
    assert sum(kinds[name] for name in IMAGE_EXTENSIONS) == corpus.num_images >= 40
    assert kinds["mp4"] == corpus.num_clips == 4
    assert set(kinds) == IMAGE_EXTENSIONS | {"mp4"}
    assert len({sample["__key__"] for sample in samples}) == len(samples)
    for sample in samples:
        assert re.fullmatch(r"[a-z0-9_-]+", sample["__key__"])
        assert sample["txt"].decode()
        assert int(sample["cls"]) in range(len(find_photos()))
        assert json.loads(sample["json"])["photo"]


def test_the_folder_holds_the_shards_and_nothing_else(corpus):
    assert [path.name for path in corpus.shards] == [
        "clips-000000.tar",
        "photos-000000.tar",
        "photos-000001.tar",
        "photos-000002.tar",
    ]
    assert corpus.num_bytes == sum(path.stat().st_size for path in corpus.shards)
    assert sorted(path.name for path in corpus.shards[0].parent.iterdir()) == [path.name for path in corpus.shards]


def test_pictures_are_big_enough_and_really_what_their_extension_says(samples):
    formats = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
    modes = set()
    for sample in samples:
        extension = media(sample)
        if extension in formats:
            image = Image.open(io.BytesIO(sample[extension]))
            image.load()
            modes.add(image.mode)
            assert image.format == formats[extension]
            assert min(image.size) >= 128
            assert max(image.size) <= 640
    assert modes == {"L", "RGB"}


def test_clips_are_h264_and_as_long_as_they_say(samples):
    for sample in samples:
        if "mp4" in sample:
            with av.open(io.BytesIO(sample["mp4"])) as container:
                stream = container.streams.video[0]
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            assert stream.codec_context.name == "h264"
            assert len(frames) == json.loads(sample["json"])["seconds"] * CLIP_RATE
            assert abs(frames[0].astype(int) - frames[-1]).mean() > 5  # the camera has moved


def test_the_same_bytes_come_in_another_process(corpus, tmp_path):
    code = "import sys, pathlib; from jobs.demo_corpus import *; build_demo_corpus(pathlib.Path(sys.argv[1]))"
    root = Path(demo_corpus.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=root)
    for path in corpus.shards:
        again = tmp_path / path.name
        assert hashlib.sha256(again.read_bytes()).digest() == hashlib.sha256(path.read_bytes()).digest(), path.name


def test_nothing_that_could_download_is_imported(tmp_path):
    code = (
        "import sys, pathlib; from jobs.demo_corpus import *; build_demo_corpus(pathlib.Path(sys.argv[1]));"
        "assert not {'skimage', 'sklearn', 'pooch'} & set(sys.modules)"
    )
    root = Path(demo_corpus.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=root)


def test_missing_packages_are_named_with_the_remedy(monkeypatch):
    monkeypatch.setattr(demo_corpus, "_PACKAGES", {"no_such_package_here": ("scikit-none", [])})
    with pytest.raises(
        SpecError, match=r"scikit-none, not installed here. Install them with: pip install 'bsqtok\[demo\]'"
    ):
        find_photos()


def test_the_demo_replaces_no_folder_that_is_not_its_own(tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "mine.txt").write_text("precious")
    with pytest.raises(OutputNotOurs, match="Name another folder with --out"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["tokens", "mine.txt"]
