"""Canonical form of the settings that change bits, and its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import rfc8785

from schemas.jobspec import ClipSpec, JobSpec, PreprocessSpec
from schemas.tokenfile import FORMAT_VERSION


def fingerprint_fields(spec: JobSpec, tokenizer: Mapping[str, Any], weight_sha256: str) -> dict[str, Any]:
    """Collect what determines the bits of a row that exists.

    `spec` is resolved: its size, clip length, stride and dtype are concrete.  A field at its version-1 default is
    left out, so that fields added later do not change the fingerprints of old datasets."""
    return {
        "format_version": FORMAT_VERSION,
        "tokenizer": dict(tokenizer),
        "weight_sha256": weight_sha256,
        "preprocess": _without_defaults(spec.preprocess, PreprocessSpec()),
        "clips": _without_defaults(spec.clips, ClipSpec()),
        "carry": sorted(spec.carry),
        "dtype": spec.dtype,
    }


def fingerprint(fields: Mapping[str, Any]) -> str:
    """SHA-256 (64 hex digits) of the RFC 8785 form of `fingerprint_fields`."""
    return hashlib.sha256(rfc8785.dumps(dict(fields))).hexdigest()


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the fields in which two fingerprints differ, with both values, for a refusal that a person understands."""
    differences = []
    for name in sorted(set(ours) | set(theirs)):
        default = _DEFAULTS.get(f"{prefix}{name}", "not set")
        mine, other = ours.get(name, default), theirs.get(name, default)
        if isinstance(mine, Mapping) and isinstance(other, Mapping):
            differences += differing_fields(mine, other, f"{prefix}{name}.")
        elif mine != other:
            differences.append(f"{prefix}{name}: {_brief(other)} there, {_brief(mine)} asked for")
    return differences


_DEFAULTS = {
    f"{section}.{name}": value
    for section, spec in (("preprocess", PreprocessSpec()), ("clips", ClipSpec()))
    for name, value in spec.model_dump(mode="json").items()
}
"""What a field that is left out of a fingerprint stands for."""


def _brief(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"


def _without_defaults(section: PreprocessSpec | ClipSpec, default: PreprocessSpec | ClipSpec) -> dict[str, Any]:
    values, defaults = section.model_dump(mode="json"), default.model_dump(mode="json")
    return {name: value for name, value in values.items() if value != defaults[name]}
