"""The report names what was made to go wrong, shows hostile strings as text, and loads nothing but itself."""

from __future__ import annotations

import io
import itertools
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import html5lib
import numpy as np
import pytest
from PIL import Image

from jobs.report import Report, write_report
from jobs.start import start_job
from pipeline.storage import open_storage
from schemas.errors import BsqError, SpecError
from schemas.jobspec import parse_spec
from schemas.ledger import Attempt
from tests.browser import visit
from tests.range_server import RangeServer, serve_ranges
from tests.tiny_corpus import jpeg, mp4, write_tar

TINY = "untrained:vit-tiny-32-l18"
SHARDS, SAMPLES = 14, 12
DRIFTING, LOSSY, SLOW = 5, 3, (9, 12)
SCRIPT = '<script>alert("key")</script>'
IMAGE = "\"><img src=x onerror=alert('name')>"
RIGHT_TO_LEFT = "שלום \u202egnp.exe"
LONG = "long-" * 400
SECRETS = ("s3cr3t-of-nobody", "0badc0de5ig")


def dark(seed: int) -> bytes:
    """A picture as of a camera with its cap on."""
    noise = np.random.default_rng(seed).integers(0, 12, (80, 96, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(noise).save(sink, "JPEG", quality=92)
    return sink.getvalue()


def members_of(shard: int) -> Iterator[tuple[str, bytes]]:
    for number in range(SAMPLES):
        key, seed = f"{shard:02d}/{number:04d}", 100 * shard + number
        picture = dark(seed) if shard == DRIFTING else jpeg(seed)
        if shard == LOSSY and number % 2:
            picture = picture[: len(picture) // 2]
        if shard == 0:
            key = {1: f"00/{SCRIPT}", 2: f"00/{RIGHT_TO_LEFT}", 3: f"00/{LONG}", 4: f"00/{IMAGE}"}.get(number, key)
            picture = b"<svg onload=alert(2)>" if number in (1, 2, 3) else picture
        yield f"{key}.jpg", picture
        yield f"{key}.txt", b"<b>caption</b>" if number != 7 else b"\xff\xfe"
    if shard == 1:
        yield "01/walk.mp4", mp4(1, 11)


@dataclass
class Troubled:
    """A dataset with something wrong of every kind, and its report."""

    out: str
    page: Path
    report: Report
    server: RangeServer

    @property
    def html(self) -> str:
        return self.page.read_text(encoding="utf-8")

    @property
    def text(self) -> str:
        """What a reader sees, without style and tags."""
        body = html5lib.parse(self.html, namespaceHTMLElements=False).find("body")
        return " ".join("".join(body.itertext()).split())


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Troubled]:
    folder = tmp_path_factory.mktemp("troubled")
    urls = []
    with serve_ranges(folder, delay_seconds=0.3) as server:
        for shard in range(SHARDS):
            # A name that would break out of an attribute.
            name = f"{shard:02d}{IMAGE if shard == 1 else ''}.tar"
            path = folder / name
            with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
                for member_name, payload in members_of(shard):
                    member = tarfile.TarInfo(member_name)
                    member.size = len(payload)
                    archive.addfile(member, io.BytesIO(payload))
            with_secrets = f"http://someone:{SECRETS[0]}@{server.host}/{name}?sig={SECRETS[1]}"
            urls.append(with_secrets if shard in SLOW else str(path))
        urls.append(str(folder / "missing.tar"))
        spec = {"shards": urls, "out": str(folder / "tokens"), "tokenizer": TINY, "run": {"workers": 1}}
        assert start_job(parse_spec(spec, source="test"), runner="in-process").exit_code == 3
        report = write_report(str(spec["out"]), str(folder / "report.html"))
        yield Troubled(str(spec["out"]), folder / "report.html", report, server)


def titles(report: Report) -> list[str]:
    return [finding.title for finding in report.findings]


# --- what it names


def test_what_was_made_to_go_wrong_is_named_and_nothing_else(troubled):
    assert sorted(titles(troubled.report)) == sorted(
        [
            "1 shard given up",
            "Samples fail with MediaTruncated",
            "Samples fail with MediaUnsupported",
            f"Shard {LOSSY} loses 50% of its samples",
            "Shard 0 loses 25% of its samples",
            f"Storage http://***@{troubled.server.host} is slow",
            f"Shard {DRIFTING} drifts",
            "The tokenizer was never trained",
        ]
    )


def test_each_finding_says_the_figure_that_it_rests_on(troubled):
    details = {finding.title.partition(" ")[0]: finding.detail for finding in troubled.report.findings}
    assert re.search(r"The first is shard 14 after 1 attempt: .*missing\.tar: there is no such shard", details["1"])
    drift = next(each.detail for each in troubled.report.findings if "drifts" in each.title)
    assert re.match(
        r"Its tokens lie [\d.]+ times as far from the rest as chance would put them, the median shard [\d.]+ times\. "
        r"Most in channel \d+: [\d.]+% ones here, [\d.]+% elsewhere\.$",
        drift,
    )
    assert re.match(r"It delivers [\d.]+ kB/s, others [\d.]+ MB/s\. Reading takes \d+% of the time", details["Storage"])
    truncated = next(each.detail for each in troubled.report.findings if "MediaTruncated" in each.title)
    assert truncated.startswith(f"6 samples (decode), 3.6% of all, most of them in shard {LOSSY}. The first: ")


def test_the_command_prints_what_it_found(troubled, bsq, tmp_path):
    done = bsq("report", troubled.out, "--out", tmp_path / "again.html")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Wrote {tmp_path}/again.html" in done.stdout
    assert f"- Shard {DRIFTING} drifts: " in done.stdout
    assert not any(secret in done.stdout for secret in SECRETS)


def test_the_same_seed_gives_the_same_page(troubled, tmp_path):
    write_report(troubled.out, str(tmp_path / "again.html"))
    written = re.compile(r"Written [\d: -]+UTC")
    assert written.sub("", (tmp_path / "again.html").read_text()) == written.sub("", troubled.html)


def test_originals_are_shown_where_they_can_be_read_and_missed_where_not(troubled):
    page = html5lib.parse(troubled.html, namespaceHTMLElements=False)
    pictures = page.findall(".//img")
    assert len(pictures) >= 12
    for picture in pictures:
        assert picture.get("src").startswith("data:image/webp;base64,") and picture.get("alt")
    assert "dB" in troubled.text


def test_sources_that_are_gone_are_said_plainly(tmp_path):
    shard = write_tar(tmp_path / "a.tar", [(f"{number}.jpg", jpeg(number)) for number in range(5)])
    spec = {"shards": [str(shard)], "out": str(tmp_path / "tokens"), "tokenizer": TINY}
    start_job(parse_spec(spec, source="test"), runner="in-process")
    shard.unlink()
    write_report(str(spec["out"]), str(tmp_path / "r.html"))
    page = (tmp_path / "r.html").read_text()
    assert "5 originals out of reach:" in page and "there is no such shard" in page
    assert page.count('<span class="gone">no original</span>') == 5
    assert page.count("<img ") == 5
    assert "too few shards to compare" in page


# --- what it must never do


def test_nothing_hostile_is_markup(troubled):
    page = html5lib.parse(troubled.html, namespaceHTMLElements=False)
    assert page.findall(".//script") == []
    for element in page.iter():
        assert not [name for name in dict(element.attrib) if str(name).startswith("on")], element
    # They are there all the same, as text.
    assert SCRIPT in troubled.text
    assert "onerror=alert('name')" in troubled.text
    assert "\\u202egnp.exe" in troubled.text and "\u202e" not in troubled.html


def test_credentials_are_nowhere(troubled):
    for secret in SECRETS:
        assert secret not in troubled.html


def test_the_page_is_valid_html(troubled):
    html5lib.HTMLParser(strict=True).parse(troubled.html)


def test_every_table_chart_and_link_can_be_understood_without_eyes(troubled):
    page = html5lib.parse(troubled.html, namespaceHTMLElements=False)
    identifiers = {element.get("id") for element in page.iter() if element.get("id")}
    for link in page.findall(".//a"):
        assert link.get("href")[1:] in identifiers
    for chart in page.findall(".//div[@role='img']"):
        assert len(chart.get("aria-label")) > 20
    for table in page.findall(".//table"):
        assert table.find("thead") is not None
        assert all(cell.get("scope") for cell in table.findall(".//th"))
    headings = [int(element.tag[1]) for element in page.iter() if re.fullmatch(r"h[1-6]", str(element.tag))]
    assert headings[0] == 1 and headings.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(headings))
    assert page.get("lang") == "en"


QUESTIONS = [
    "document.documentElement.scrollWidth - innerWidth",
    "[...document.images].filter(each => !each.naturalWidth).length",
    "[...document.querySelectorAll('section > *')].filter(each => each.getBoundingClientRect().right > innerWidth)"
    ".map(each => each.outerHTML.slice(0, 80))",
    "document.querySelectorAll('.chart path, .chart polyline').length > 10",
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_asks_for_nothing_and_runs_nothing(troubled, scheme):
    seen = visit(troubled.page, QUESTIONS, widths=(1200, 360), scheme=scheme)
    own = troubled.page.as_uri()
    assert {url for url in seen.requests if not url.startswith("data:")} == {own}
    assert (seen.dialogs, seen.complaints) == ([], [])
    assert seen.answers == [0, 0, [], True] * 2  # nothing is wider than the window, and every picture is there
    shots = [np.asarray(Image.open(io.BytesIO(shot)).convert("L"), np.float64) for shot in seen.screenshots]
    assert all(shot.std() > 10 for shot in shots)
    assert (np.median(shots[0]) < 60) == (scheme == "dark")


def test_the_browser_would_notice(tmp_path):
    page = tmp_path / "bad.html"
    page.write_text("<img src='http://127.0.0.1:9/x.png'><script>alert('hello')</script>")
    seen = visit(page, ["document.images[0].naturalWidth"])
    assert "http://127.0.0.1:9/x.png" in seen.requests
    assert seen.dialogs == ["hello"]
    assert seen.complaints and seen.answers == [0]


# --- any dataset


def page_of(dataset: Any, tmp_path: Path) -> tuple[Report, str]:
    target = tmp_path / "page.html"
    report = write_report(dataset.url, str(target), storage_options=dataset.storage_options)
    html5lib.HTMLParser(strict=True).parse(target.read_text())
    return report, target.read_text()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_shards": 0}, {"given_up": (0, 1, 2)}, {"views": 3, "frames": lambda position: 1 + 2 * position}],
    ids=["images", "no-shards", "all-given-up", "clips-views"],
)
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
def test_every_kind_of_dataset_has_a_page(write_dataset, tmp_path, options, finished):
    report, page = page_of(write_dataset(finished=finished, **options), tmp_path)
    assert "Not finished" not in titles(report)  # every shard is committed or given up
    assert "bsqtok report" in page


def test_an_interrupted_job_says_what_is_left(write_dataset, tmp_path):
    dataset = write_dataset(num_shards=5, finished=False)
    for segment in sorted(dataset.path("ledger/0000").iterdir())[3:]:
        segment.unlink()
    report, page = page_of(dataset, tmp_path)
    assert "3 shards still to be tokenized. Nobody is at work; `bsq resume` goes on." in page.replace("&#39;", "'")
    assert "of 5 committed" in page
    assert "Not finished" in titles(report)


def test_attempts_are_told_with_their_errors(write_dataset, tmp_path):
    dataset = write_dataset(given_up=(2,), finished=False)
    for number, shard in enumerate((0, 0, 2), start=50):
        attempt = Attempt(
            shard=shard,
            attempt=number - 49,
            stage="open",
            error="ShardUnreadable",
            message=f"<i>no answer</i> {SCRIPT}",
            worker="w",
            at="2026-01-01T00:00:00Z",
        )
        dataset.append(number - 46, attempt.to_line())
    report, page = page_of(dataset, tmp_path)
    assert "1 shard took several attempts" in titles(report)
    assert "&lt;i&gt;no answer&lt;/i&gt;" in page and "<i>no" not in page
    assert "ShardUnreadable: 3 failed attempts." in page


def test_the_cost_is_bounded_and_said(write_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("jobs.report.drift.MAX_FILES", 6)
    _, page = page_of(write_dataset(num_shards=20), tmp_path)
    assert "one row group each of 6 of 20 token files" in page
    assert "8 rows to decode; rows by chance, seed 0." in page


def test_files_that_are_gone_or_damaged_are_a_finding(write_dataset, tmp_path):
    dataset = write_dataset(num_shards=6)
    dataset.path(dataset.commits[1].file).unlink()
    dataset.path(dataset.commits[2].failures.file).write_bytes(b"PAR1nothing")
    report, _ = page_of(dataset, tmp_path)
    assert "2 files gone or damaged" in titles(report)


def test_a_dataset_in_an_object_store_has_a_page_there(write_dataset, object_store):
    dataset = write_dataset(url=f"{object_store.url}/dataset", storage_options=object_store.storage_options)
    target = f"{object_store.url}/pages/r.html"
    report = write_report(dataset.url, target, storage_options=dataset.storage_options)
    assert report.url == target
    page = open_storage(f"{object_store.url}/pages", object_store.storage_options).read_bytes("r.html").decode()
    assert "s3://bucket/dataset" in page
    assert object_store.storage_options["secret"] not in page


@pytest.mark.parametrize(
    ("out", "target", "message"),
    [
        ("nothing", "r.html", "there is no dataset here"),
        ("dataset", "folder/", "this is a folder. Name the file to write"),
        ("dataset", "dataset", "dataset"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(write_dataset, tmp_path, monkeypatch, out, target, message):
    write_dataset()
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SpecError, BsqError), match=message) as caught:
        write_report(str(tmp_path / out), target)
    assert "\n" not in str(caught.value)
