"""The members that are carried along with a picture or video: caption, label, metadata.

A bad one never costs the sample: its column is null and a warning says why.  Nothing is altered to fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from pipeline.sample import Member
from schemas.errors import CaptionNotText, LabelNotInteger, MetadataNotJSON, SidecarWarning
from schemas.jobspec import LimitsSpec

T = TypeVar("T")

CAPTION_EXTENSIONS = ("txt", "caption")
LABEL_EXTENSIONS = ("cls",)
METADATA_EXTENSIONS = ("json",)

_INTEGER = re.compile(r"[+-]?[0-9]{1,19}")
_INT64 = range(-(2**63), 2**63)
# How deep Python's parser gets depends on its version and on the caller's stack; so the bound is our own.
_MAX_JSON_DEPTH = 100
# Possessive, and content with a string that never ends: giving bytes back would take quadratic time.
_JSON_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_MAX_JSON_DIGITS = 1000


@dataclass(slots=True)
class Sidecars:
    """What is carried; None where the member is absent, bad, or not asked for."""

    caption: str | None = None
    label: int | None = None
    metadata: str | None = None
    """Strict JSON, re-serialised without spaces, keys in their order."""
    warnings: list[SidecarWarning] = field(default_factory=list)


def read_sidecars(members: dict[str, Member], carry: tuple[str, ...], limits: LimitsSpec) -> Sidecars:
    """Read the members that `carry` names ("caption", "label", "metadata"); `members` is by extension.

    A caption is `.txt`, else `.caption`; extensions in any case.  Never raises for bad content."""
    warnings: list[SidecarWarning] = []
    by_extension: dict[str, Member] = {}
    for extension, member in members.items():
        by_extension.setdefault(extension.lower(), member)

    def carried(column: str, extensions: tuple[str, ...], read: Callable[[Member, LimitsSpec], T]) -> T | None:
        member = next((by_extension[name] for name in extensions if name in by_extension), None)
        if member is None or column not in carry:
            return None
        try:
            return read(member, limits)
        except SidecarWarning as warning:
            warnings.append(warning)
            return None

    return Sidecars(
        carried("caption", CAPTION_EXTENSIONS, _caption),
        carried("label", LABEL_EXTENSIONS, _label),
        carried("metadata", METADATA_EXTENSIONS, _metadata),
        warnings,
    )


def _text(member: Member, limits: LimitsSpec, warning: type[SidecarWarning]) -> str:
    """Return the UTF-8 text of a member; a byte-order mark at its beginning is no part of it."""
    if member.kind != "file":
        raise warning(f"{member.name} is a {member.kind}, not a file; it is not carried.", member=member.name)
    if member.payload is None or member.size > limits.max_sidecar_bytes:
        raise warning(
            f"{member.name} has {member.size:,} bytes, over limits.max_sidecar_bytes ({limits.max_sidecar_bytes:,}); "
            "it is not carried.",
            member=member.name,
        )
    try:
        return member.payload.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise warning(
            f"{member.name} is not UTF-8 at byte {error.start:,} ({error.object[error.start : error.start + 4]!r}); "
            "it is not carried.",
            member=member.name,
        ) from error


def _caption(member: Member, limits: LimitsSpec) -> str:
    return _text(member, limits, CaptionNotText)


def _label(member: Member, limits: LimitsSpec) -> int:
    text = _text(member, limits, LabelNotInteger).strip()
    # Not int() alone: it takes digits of every script, underscores, and texts of any length.
    if _INTEGER.fullmatch(text) is None or int(text) not in _INT64:
        raise LabelNotInteger(
            f"{member.name} holds {text[:40]!r}, no whole number of 64 bits; it is not carried.", member=member.name
        )
    return int(text)


def _metadata(member: Member, limits: LimitsSpec) -> str:
    text = _text(member, limits, MetadataNotJSON)
    try:
        _check_depth(text.encode())
        canonical = _JSON_WRITER.encode(_JSON_PARSER.decode(text))
        canonical.encode("utf-8")
    except (ValueError, RecursionError) as error:  # both of JSON's and Unicode's errors are ValueErrors
        reason = "it has half of a surrogate pair" if isinstance(error, UnicodeEncodeError) else str(error)
        raise MetadataNotJSON(
            f"{member.name} is no strict JSON: {reason[:200]}; it is not carried.", member=member.name
        ) from error
    return canonical


def _check_depth(text: bytes) -> None:
    if text.count(b"[") + text.count(b"{") <= _MAX_JSON_DEPTH:
        return
    depth = 0
    for bracket in re.findall(rb"[][{}]", _JSON_STRING.sub(b"", text)):
        depth += 1 if bracket in b"[{" else -1
        if depth > _MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {_MAX_JSON_DEPTH}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _bounded_int(digits: str) -> int:
    if len(digits) > _MAX_JSON_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {twice[:40]!r} stands twice in one object")
    return unique


# Made once: json.loads and json.dumps make theirs anew for each sample when they are given options.
_JSON_PARSER = json.JSONDecoder(parse_constant=_refuse_constant, parse_int=_bounded_int, object_pairs_hook=_unique_keys)
# allow_nan=False: 1e999 parses to infinity, which JSON cannot write.
_JSON_WRITER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
