"""Turn what a user names (URLs, ranges, globs, lists) into an ordered list of shards, without touching the shards."""

from __future__ import annotations

import glob
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
from braceexpand import braceexpand
from fsspec.core import url_to_fs

from pipeline.credentials import printable_error, printable_url
from schemas.errors import SpecError

MAX_SHARDS = 10_000_000
"""Of one job.  The plan of so many takes about a gigabyte while it is made."""
MAX_LIST_BYTES = 1 << 30
"""Of one @list file."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)://")
_NO_ALTERNATIVES = re.compile(r"(?<!\\)\{[^{},]*\.\.[^{},]*\}")
"""Braces meant as a range; what is none stays as it is when braces are expanded."""
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(-?\d+))?|([A-Za-z])\.\.([A-Za-z])(?:\.\.(-?\d+))?")


def expand_shards(patterns: Iterable[str], storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Return the URLs that `patterns` name, in their order, each once; local paths are absolute.

    A pattern is a path or any fsspec URL, with {000..127} and {a,b} expanded and globs looked up, or @list.txt: a file
    with one pattern a line and # before comments.  A shard that does not exist stays in the list: that it is missing
    belongs into the ledger.  Raises SpecError, in one line, for what cannot be meant: a glob that matches nothing, a
    URL twice, control characters, more than MAX_SHARDS shards."""
    options = dict(storage_options or {})
    urls: list[str] = []
    seen: set[str] = set()
    for pattern in patterns:
        for line in _lines(pattern, options):
            for url in _expand(line, options):
                if url in seen:
                    raise SpecError(f"{printable_url(url)}: this shard is named twice. Name every shard once.")
                if len(urls) == MAX_SHARDS:
                    raise SpecError(f"{_shown(pattern)}: more than {MAX_SHARDS:,} shards. Split the job.")
                seen.add(url)
                urls.append(url)
    if not urls:
        raise SpecError("No shards are named. Give URLs, ranges such as shard-{000..127}.tar, globs, or @list.txt.")
    return urls


def _lines(pattern: str, options: dict[str, Any]) -> Iterator[str]:
    _check_characters(pattern)
    if not pattern.startswith("@"):
        yield pattern
        return
    name = pattern[1:]
    try:
        filesystem, path = url_to_fs(name, **options)
        if filesystem.size(path) > MAX_LIST_BYTES:
            raise SpecError(f"{_shown(name)}: a list of more than {MAX_LIST_BYTES:,} bytes. Split the job.")
        text = bytes(filesystem.cat_file(path)).decode("utf-8-sig")
    except SpecError:
        raise
    except UnicodeDecodeError as error:
        raise SpecError(f"{_shown(name)}: the list is not UTF-8 text. Save it as UTF-8.") from error
    except Exception as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else printable_error(error, options)
        raise SpecError(f"{_shown(name)}: the list cannot be read ({reason}). Name a text file of URLs.") from error
    for number, line in enumerate(text.split("\n"), start=1):
        url = line.strip()
        if not url or url.startswith("#"):
            continue
        if url.startswith("@"):
            raise SpecError(f"{_shown(name)}, line {number}: a list cannot name another list. Give both with @.")
        yield url


def _expand(pattern: str, options: dict[str, Any]) -> Iterator[str]:
    _check_characters(pattern)
    if not pattern.strip():
        raise SpecError("An empty shard name. Give URLs, ranges such as shard-{000..127}.tar, globs, or @list.txt.")
    if "{" not in pattern or os.path.lexists(pattern):
        expanded: Iterable[str] = (pattern,)
    else:
        num_urls = _count_expansions(pattern)
        if num_urls > MAX_SHARDS:
            raise SpecError(f"{_shown(pattern)}: the braces stand for more than {MAX_SHARDS:,} shards. Split the job.")
        try:
            expanded = braceexpand(pattern)
        except ValueError as error:
            raise SpecError(f"{_shown(pattern)}: the braces do not match. Write ranges as {{000..127}}.") from error
        no_range = next((part for part in _NO_ALTERNATIVES.findall(pattern) if not _RANGE.fullmatch(part[1:-1])), None)
        if no_range is not None:
            raise SpecError(f"{_shown(pattern)}: {no_range} is no range. Write ranges as {{000..127}}.")
    for url in expanded:
        yield from _look_up(_normalise(url), options)


def _normalise(url: str) -> str:
    """Return a local path as an absolute one; leave any other URL as it is."""
    if "::" in url and not os.path.exists(url):  # noqa: PTH110 - Path.exists() raises for a name that is too long
        return url
    scheme = _SCHEME.match(url)
    if scheme and scheme[1].lower() not in ("file", "local"):
        return url
    path = url[scheme.end() :] if scheme else os.path.expanduser(url)  # noqa: PTH111 - Path's raises for a user it does not know
    return os.path.abspath(path)  # noqa: PTH100 - Path.absolute() keeps "..", and two names of one shard must meet


def _look_up(url: str, options: dict[str, Any]) -> Iterator[str]:
    first, chain, rest = url.partition("::")
    if chain and "://" not in first and not first.startswith("/"):
        # A layer without a path of its own, such as simplecache::s3://bucket/*.tar
        yield from (f"{first}::{match}" for match in _look_up(rest, options))
        return
    scheme = _SCHEME.match(first)
    if scheme is None:
        yield from _look_up_local(url)
        return
    _check_protocol(scheme[1], url)
    # A question mark begins the query of an HTTP URL, and the version of an S3 object.
    is_plain = (
        "*" not in first.partition("?")[0] if scheme[1].lower() in ("http", "https") else not glob.has_magic(first)
    )
    if is_plain or "?versionId=" in first:
        yield url
        return
    try:
        filesystem, path = url_to_fs(url, **options)
        found = filesystem.glob(path, detail=True)
    except Exception as error:
        raise SpecError(
            f"{_shown(url)}: the glob cannot be looked up ({printable_error(error, options).rstrip('.')}). "
            "Check the URL and your credentials."
        ) from error
    names = sorted(name for name, entry in found.items() if entry["type"] == "file")
    if not names:
        raise SpecError(f"{_shown(url)}: nothing matches. Check the folder and the pattern.")
    for name in names:
        yield (name if _SCHEME.match(name) else scheme[0] + name.lstrip("/")) + chain + rest


def _look_up_local(path: str) -> Iterator[str]:
    # A file whose name happens to hold brackets is itself, not a pattern.
    if not glob.has_magic(path) or os.path.lexists(path):
        if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir() raises for a name that is too long
            raise SpecError(f"{_shown(path)}: this is a folder. Name its shards, such as {_shown(path)}/*.tar.")
        yield path
        return
    matches = sorted(match for match in glob.iglob(path, recursive=True) if not Path(match).is_dir())  # noqa: PTH207
    if not matches:
        raise SpecError(f"{_shown(path)}: nothing matches. Check the folder and the pattern.")
    for match in matches:
        _check_characters(match)
        yield match


def _check_protocol(scheme: str, url: str) -> None:
    try:
        fsspec.get_filesystem_class(scheme)
    except (ValueError, ImportError) as error:
        remedy = " Give a path, or a URL such as s3://, gs:// or https://." if isinstance(error, ValueError) else ""
        raise SpecError(f"{_shown(url)}: {str(error).splitlines()[0].rstrip('.')}.{remedy}") from error


def _check_characters(text: str) -> None:
    if text.isprintable():
        return
    for character in text:
        # Control characters, and halves of a surrogate pair: bytes of a name that are not UTF-8.
        if unicodedata.category(character) in ("Cc", "Cs"):
            raise SpecError(f"{_shown(text)!r}: the name holds {character!r}. Rename the shard to printable UTF-8.")


def _shown(pattern: str) -> str:
    return printable_url(pattern)


def _count_expansions(pattern: str) -> int:
    """Return at most how many strings braceexpand makes of `pattern`, without making them."""
    # Frames of an open brace: strings of the finished alternatives, and of the one being read.
    frames: list[tuple[int, int, int]] = []
    finished, current, start = 0, 1, 0
    position = 0
    while position < len(pattern):
        character = pattern[position]
        if character == "\\":
            position += 1
        elif character == "{":
            frames.append((finished, current, start))
            finished, current, start = 0, 1, position + 1
        elif character == "," and frames:
            finished, current = finished + current, 1
        elif character == "}" and frames:
            span = _RANGE.fullmatch(pattern[start:position])
            inside = _count_range(span) if span else finished + current
            finished, outside, start = frames.pop()
            current = outside * inside
        if current > MAX_SHARDS:
            return current
        position += 1
    return current


def _count_range(span: re.Match[str]) -> int:
    first, last = (int(span[1]), int(span[2])) if span[1] else (ord(span[4]), ord(span[5]))
    step = abs(int(span[3] or span[6] or 1)) or 1
    return abs(last - first) // step + 1
