"""The model: quantizer, BSQ-ViT, codes, checkpoints.  Tensors in, tensors out.

    tokenizer = from_pretrained("default")
    bits = tokenizer.encode(frames)     # bool [B, T, h, w, L] of uint8 [B, T, H, W, 3]
    frames = tokenizer.decode(bits)     # float [B, T, H, W, 3] from -1 to 1

Public names load their module at first use, so that importing the package does not import torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizer.bsqvit import BSQViT, PackedTokens
    from tokenizer.checkpoint import from_pretrained, save_checkpoint, weight_sha256
    from tokenizer.config import BSQViTConfig
    from tokenizer.quantizer import BinarySphericalQuantizer
    from tokenizer.reference_import import import_reference_checkpoint

__all__ = [
    "BSQViT",
    "BSQViTConfig",
    "BinarySphericalQuantizer",
    "PackedTokens",
    "from_pretrained",
    "import_reference_checkpoint",
    "save_checkpoint",
    "weight_sha256",
]

_MODULES = {
    "BSQViT": "bsqvit",
    "BSQViTConfig": "config",
    "BinarySphericalQuantizer": "quantizer",
    "PackedTokens": "bsqvit",
    "from_pretrained": "checkpoint",
    "import_reference_checkpoint": "reference_import",
    "save_checkpoint": "checkpoint",
    "weight_sha256": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'tokenizer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tokenizer.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
