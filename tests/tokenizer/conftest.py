"""Golden files of the reference, and small models."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tokenizer.bsqvit import BSQViT
from tokenizer.checkpoint import from_pretrained
from tokenizer.reference_import import import_reference_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]
SHIPPED = REPOSITORY / "tests" / "data" / "official"
SHARED = Path(os.environ.get("BSQTOK_SHARED", REPOSITORY.parent / "shared")) / "fixtures" / "official"

CASES = {
    "image_l18_analytical": ("expected", "expected_no_ema"),
    "image_l18_asym": ("expected", "expected_no_ema"),
    "image_l18_nonorm_defaultffn": ("expected",),
    "image_l36_group": ("expected", "expected_no_ema"),
    "video_l18_blockcausal": ("expected", "expected_no_ema", "expected_t1", "expected_t3"),
}


class GoldenCase(NamedTuple):
    """A model imported from the reference, the frames it is given, and what must come out."""

    name: str
    outputs: str
    model: BSQViT
    frames: Tensor
    expected: dict[str, Tensor]


def _find(name: str) -> Path:
    for folder in (SHIPPED, SHARED):
        if (folder / name).exists():
            return folder / name
    pytest.skip(f"{name} is not in tests/data/official, and {SHARED} does not exist (set BSQTOK_SHARED)")


@pytest.fixture(scope="session")
def official() -> Callable[[str], Path]:
    """Path of a golden file; skips the test where only the shared folder would have it."""
    return _find


def _params() -> list[object]:
    params = []
    for case, files in CASES.items():
        for outputs in files:
            shipped = (SHIPPED / case / f"{outputs}.safetensors").exists()
            marks = () if shipped else (pytest.mark.shared,)
            params.append(pytest.param((case, outputs), id=f"{case}-{outputs}", marks=marks))
    return params


@pytest.fixture(scope="session", params=_params())
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GoldenCase:
    """Every case of the reference, with averaged and with plain weights, and clips of 1, 3 and 5 frames."""
    case, outputs = request.param
    expected = load_file(_find(f"{case}/{outputs}.safetensors"))
    whole = load_file(_find(f"{case}/expected.safetensors"))
    folder = tmp_path_factory.mktemp(case)
    import_reference_checkpoint(
        _find(f"{case}/reference.pt"), _find(f"{case}/config.yaml"), folder, use_ema=outputs != "expected_no_ema"
    )
    frames = whole["frames_uint8"]
    frames_BTHWC = frames if frames.ndim == 5 else frames[:, None]
    if "_t" in outputs:
        frames_BTHWC = frames_BTHWC[:, : int(outputs[-1])]
    # A file without inputs takes those of the whole case, as far as its frames go.
    x = whole["x"][:, :, : frames_BTHWC.shape[1]] if frames.ndim == 5 else whole["x"]
    expected = {"x": x, "probe": whole["probe"][:, : expected["latents"].shape[1]], **expected}
    return GoldenCase(case, outputs, from_pretrained(folder), frames_BTHWC, expected)


@pytest.fixture(scope="session")
def tiny() -> BSQViT:
    return from_pretrained("untrained:vit-tiny-32-l18")


@pytest.fixture(scope="session")
def small() -> BSQViT:
    return from_pretrained("untrained:vit-small-128-l18")


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)
