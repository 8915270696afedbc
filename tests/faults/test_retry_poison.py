"""Samples that crashed their decoder are tried again where they can do no harm, and come back once that is mended."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.verify import verify_dataset
from pipeline.dataset_files import read_ledger, read_manifest
from pipeline.storage import open_storage
from tests.running_jobs import STUB
from tests.tiny_corpus import RunBsq, photo_members, write_tar

KEY = "000003"


@pytest.mark.longest
def test_a_retry_of_poison_loses_no_worker_and_wins_it_back_from_a_mended_decoder(tmp_path: Path, bsq: RunBsq) -> None:
    shard, out = write_tar(tmp_path / "a.tar", photo_members(0, 8)), tmp_path / "out"
    fault = {"BSQTOK_DECODE_FAULT": f"abort:{KEY}"}
    assert bsq("tokenize", shard, "--out", out, *STUB, "--no-ray", env=fault).returncode == 3
    storage = open_storage(str(out))
    assert read_ledger(storage, 0).failed_attempts != {}
    again = bsq("retry", out, "--samples", "--no-ray", env=fault)
    assert again.returncode == 3 and f"bsq retry {out} --samples --no-ray" in again.stdout
    assert read_ledger(storage, 1).failed_attempts == {}
    assert read_ledger(storage, 1).commits[0, 1].rows == 0
    mended = bsq("retry", out, "--samples", "--no-ray")
    assert mended.returncode == 0, mended.stderr
    manifest = read_manifest(storage)
    assert manifest is not None
    assert (manifest.summary.rows, manifest.summary.failed, manifest.summary.poison) == (8, 0, {})
    assert manifest.table["rows"].to_pylist() == [7, 0, 1]
    assert verify_dataset(str(out)).problems == []
