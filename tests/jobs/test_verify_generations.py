"""What is wrong in a dataset of several generations, or between the parts of a shard, is found and named."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from jobs.append import append_job
from jobs.retry import retry_job
from jobs.start import start_job
from jobs.verify import verify_dataset
from pipeline.check_files import check_shard_parts
from pipeline.dataset_files import read_ledger, read_manifest, serialise_plan
from pipeline.storage import open_storage
from schemas.errors import BsqError
from schemas.jobspec import parse_spec
from schemas.ledger import Commit
from schemas.manifest import MANIFEST_SCHEMA, serialise_manifest
from tests.tiny_corpus import jpeg, write_tar


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shard 0 of three pictures, two of them won back in generation 1; shard 1 added in generation 2."""
    folder = tmp_path_factory.mktemp("made")
    sizes = [(48, 40), (96, 80), (120, 100)]
    members = [(f"{number}.jpg", jpeg(number, *size)) for number, size in enumerate(sizes)]
    shards = [str(write_tar(folder / f"{number}.tar", members)) for number in range(2)]
    values: dict[str, Any] = {"out": str(folder / "out"), "tokenizer": "stub", "preprocess": {"size": 64}}
    narrow = values | {"shards": shards[:1], "limits": {"max_pixels": 48 * 40}}
    start_job(parse_spec(narrow, source="test"), runner="in-process")
    wide = parse_spec({"limits": {"max_pixels": 1 << 20}}, source="test")
    retry_job(values["out"], "retry-samples", asked=wide, runner="in-process")
    added = parse_spec({"shards": shards[1:], "out": values["out"]}, source="test")
    append_job(added, runner="in-process")
    return folder / "out"


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path / "out")
    return tmp_path / "out"


def commits(out: Path) -> list[Commit]:
    storage = open_storage(str(out))
    return [commit for generation in range(3) for commit in read_ledger(storage, generation).commits.values()]


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def write_other_manifest(out: Path) -> None:
    """What generation 0 is said to have, in a way that its own hash agrees with."""
    manifest = read_manifest(open_storage(str(out)), 0)
    assert manifest is not None
    rows = [row | {"worker": "someone else"} for row in manifest.table.to_pylist()]
    data = serialise_manifest(pa.Table.from_pylist(rows, schema=MANIFEST_SCHEMA))
    (out / "manifest/0000.parquet").write_bytes(data)
    edit_json(out / "manifest/0000.json", manifest_sha256=hashlib.sha256(data).hexdigest())


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "part gone": (lambda out: next(out.glob("tokens/*/*.r1-*")).unlink(), ".r1-"),
    "part of nobody": (
        lambda out: (out / "tokens/0000/0000000.r2-01234567.parquet").write_bytes(b"x"),
        "0000000.r2-01234567.parquet: belongs to no record",
    ),
    "another plan": (
        lambda out: (out / "plan/0002.parquet").write_bytes(serialise_plan(["elsewhere.tar"], [1])),
        "0002.parquet",
    ),
    "another kind": (
        lambda out: edit_json(out / "plan/0001.json", kind="retry"),
        "part 1, which generation 1 does not make",
    ),
    "an earlier manifest": (write_other_manifest, "manifest/0000.parquet: a later manifest does not list the same"),
    "counts of an earlier manifest": (
        lambda out: edit_json(out / "manifest/0000.json", failed=1),
        "manifest/0000.json: failed is 1, but the records give 2",
    ),
    "counts of the last manifest": (
        lambda out: edit_json(out / "manifest/0002.json", parts=0, failed=2),
        "manifest/0002.json: ",
    ),
}


def test_a_dataset_of_several_generations_is_clean_and_its_samples_count_once(out: Path) -> None:
    result = verify_dataset(str(out))
    assert (result.problems, result.finished) == ([], True)
    assert (result.files, result.rows, result.samples, result.failed) == (3, 6, 6, 0)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_and_named(out: Path, change: str) -> None:
    act, words = CHANGES[change]
    act(out)
    result = verify_dataset(str(out))
    assert result.problems, "nothing was found"
    if change != "another plan":
        assert not [problem for problem in result.problems if words not in problem], result.problems
    assert [problem for problem in result.problems if words in problem], result.problems


def test_a_generation_whose_record_is_damaged_ends_it_with_one_line(out: Path) -> None:
    (out / "plan/0001.json").write_text("{}")
    with pytest.raises(BsqError, match=r"plan/0001\.json: no generation of bsqtok"):
        verify_dataset(str(out))


def test_a_row_in_two_parts_and_a_sample_in_none_are_named(out: Path) -> None:
    storage = open_storage(str(out))
    first, second, _ = commits(out)
    assert check_shard_parts(storage, [first, second]) == []
    twice = second.model_copy(update={"file": first.file})
    assert any("a row of shard 0 is in two of its parts" in line for line in check_shard_parts(storage, [first, twice]))
    lost = first.model_copy(update={"failures": None})
    (problem,) = check_shard_parts(storage, [lost])
    assert "1 samples have rows or failures, the shard had 3; position 1 has neither" in problem
    (problem,) = check_shard_parts(storage, [second])
    assert "shard 0 has no part 0" in problem
