"""Keep credentials out of whatever is shown or written: URLs and errors as they may be printed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from schemas.errors import printable

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://(?P<rest>(?:(?!::[A-Za-z][\w+.\-]*://)[^\s'\"<>])*)")
_CONTAINER_SCHEMES = {"abfs", "abfss", "wasb", "wasbs", "adl"}
_OBJECT_SCHEMES = {"s3", "s3a", "gs", "gcs", "oss", "oci", "file", "local", "memory"}
_SECRET_NAME = re.compile(r"key|secret|token|sig|pass|cred|auth|sas|account", re.IGNORECASE)

HIDDEN = "***"
"""Stands for a credential in whatever is shown or written."""


def printable_url(url: str) -> str:
    """Return `url` as it may be shown or stored: without user information, signatures or tokens."""
    return _URL.sub(_hide, printable(url))


def printable_error(error: BaseException, storage_options: Mapping[str, Any] | None = None) -> str:
    """Return the first line of what `error` says, at most 300 characters, without credentials."""
    text = printable(str(error)).strip() or type(error).__name__
    for secret in sorted(_secrets(storage_options or {}), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    text = printable_url(text.splitlines()[0])
    return text if len(text) <= 300 else text[:297] + "..."


def _hide(match: re.Match[str]) -> str:
    scheme, rest = match["scheme"].lower(), match["rest"]
    # A secret key may hold an unquoted slash, so user information with a password runs up to the last "@".
    password = re.match(r"[^/@:?#]*:(?!\d+(?:[/?#]|$))[^?#]*@", rest)
    end = password.end() if password else re.match(r"[^/?#]*", rest).end()  # type: ignore[union-attr]
    authority, path = rest[:end], rest[end:]
    user, at, host = authority.rpartition("@")
    if at and not (scheme in _CONTAINER_SCHEMES and ":" not in user):
        authority = f"{HIDDEN}@{host}"
    path, hash_mark, fragment = path.partition("#")
    path, question, query = path.partition("?")
    if query and (scheme not in _OBJECT_SCHEMES or _SECRET_NAME.search(query)):
        query = "&".join(_hide_value(part) for part in query.split("&"))
    if hash_mark and (scheme not in _OBJECT_SCHEMES or _SECRET_NAME.search(fragment)):
        fragment = HIDDEN
    return f"{match['scheme']}://{authority}{path}{question}{query}{hash_mark}{fragment}"


def _hide_value(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    if not equals:
        return HIDDEN
    return parameter if name.lower() == "versionid" else f"{name}={HIDDEN}"


def _secrets(options: Mapping[str, Any], under_secret: bool = False) -> Iterator[str]:
    for name, value in options.items():
        secret = under_secret or bool(_SECRET_NAME.search(str(name)))
        if isinstance(value, Mapping):
            yield from _secrets(value, secret)
        elif isinstance(value, str) and secret and len(value) >= 4:
            yield value
