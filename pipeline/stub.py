"""The tokenizer named "stub": no model, tokens cut from pixels.  For tests and benchmarks of the path around the
encoder; everything but the model runs as always."""

from __future__ import annotations

import hashlib
import json

from schemas.job import TokenizerRecord

STUB_NAME = "stub"
STUB_BITS = 16
STUB_PATCH = 8


def stub_record(image_size: int, max_frames: int) -> TokenizerRecord:
    """The tokenizer record of the stub encoder."""
    side = image_size // STUB_PATCH
    config = {"preset": STUB_NAME, "image_size": image_size, "patch_size": STUB_PATCH, "max_frames": max_frames}
    return TokenizerRecord(
        name=STUB_NAME,
        config=config,
        weight_sha256=hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
        folder="",
        bits=STUB_BITS,
        group_size=STUB_BITS,
        patch_size=STUB_PATCH,
        grid=(side, side),
    )
