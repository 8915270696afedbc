"""A dataset that is to be made in one arithmetic is."""

from pathlib import Path

import pytest

from jobs.arithmetic import OneArithmetic, describe_arithmetic
from schemas.errors import ArithmeticDiffers
from tests.tiny_corpus import RunBsq, dataset_files

TINY = ["--tokenizer", "untrained:vit-tiny-32-l18", "--no-ray"]
OTHER_KERNELS = {"ATEN_CPU_CAPABILITY": "default"}
"""PyTorch's plainest kernels, which the arithmetic of a record tells from those for wide vectors."""


@pytest.mark.long
def test_another_arithmetic_is_refused_where_one_is_asked_for_and_commits_nothing(
    small_shards: list[Path], tmp_path: Path, bsq: RunBsq
) -> None:
    out = tmp_path / "out"
    assert bsq("tokenize", *small_shards[:2], "--out", out, *TINY, "--strict-arithmetic").returncode == 0
    append = ["tokenize", small_shards[3], "--out", out, *TINY, "--append"]
    refused = bsq(*append, "--strict-arithmetic", env=OTHER_KERNELS)
    assert refused.returncode == 4, refused.stderr
    assert "another arithmetic" in refused.stderr and "DEFAULT" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert not (out / "manifest" / "0001.json").exists()
    assert bsq(*append, "--no-strict-arithmetic", env=OTHER_KERNELS).returncode == 0
    assert bsq("verify", out).returncode == 0
    assert len([name for name in dataset_files(out) if name.startswith("tokens/")]) == 3


def test_the_first_shard_decides() -> None:
    one, other = {"device": "H100", "dtype": "bfloat16"}, {"device": "H200", "dtype": "bfloat16"}
    arithmetic = OneArithmetic({})
    arithmetic.check("aa", one, worker="gpu0", dataset="out")
    arithmetic.check("aa", one, worker="gpu1", dataset="out")
    with pytest.raises(ArithmeticDiffers, match=r"gpu2.*H200, bfloat16.*H100, bfloat16"):
        arithmetic.check("bb", other, worker="gpu2", dataset="out")


def test_an_arithmetic_in_words() -> None:
    value = {"device": "H100", "dtype": "bfloat16", "batches": [[256, 1], [16, 16]], "torch": "2.13", "cuda": "13.0"}
    assert describe_arithmetic(value) == "H100, bfloat16, torch 2.13, cuda 13.0, batches of 256 x 1, 16 x 16"
    assert describe_arithmetic({}) == "not recorded"
