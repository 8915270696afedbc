"""Which rows of a dataset pass a filter: from the statistics of row groups where they decide, else from the columns.

A filter is a list of conditions that must all hold: `("caption", "present")`, `("label", "in", [3, 7])`,
`("frames", ">=", 8)`."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.token_files import TokenFile, TokenFiles
from pipeline.token_index import TokenIndex
from schemas.errors import SpecError, nearest_name
from schemas.tokenfile import CARRIED_COLUMNS, token_schema

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "==": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
OPERATORS = (*_COMPARE, "in", "not in", "present", "missing")
_UNFILTERABLE = ("tokens", "crop", "frame_times")
_TYPES = {field.name: field.type for field in token_schema(tuple(CARRIED_COLUMNS))}

CACHE_FOLDER = "bsqtok-filters"
"""The folder inside `cache_dir` where results of filters are kept."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One condition on one column; a null passes only "missing"."""

    column: str
    operator: str
    value: Any = None


@dataclass(frozen=True)
class RowFilter:
    """Conditions that must all hold."""

    conditions: tuple[Condition, ...]

    @property
    def sha256(self) -> str:
        """Identity of the filter: the same for the same conditions in any order."""
        texts = sorted(json.dumps([each.column, each.operator, each.value]) for each in self.conditions)
        return hashlib.sha256("\n".join(texts).encode()).hexdigest()

    @property
    def columns(self) -> list[str]:
        """The columns that it looks at."""
        return sorted({each.column for each in self.conditions})


def parse_filters(filters: Sequence[Sequence[Any]], carried: Sequence[str]) -> RowFilter:
    """Check conditions as the user gave them, for a dataset that carries the columns `carried`.  Raises SpecError."""
    known = [name for name in token_schema(carried).names if name not in _UNFILTERABLE]
    conditions = []
    for each in filters:
        if isinstance(each, str) or not 2 <= len(each) <= 3:
            raise SpecError(f"filters: {each!r} is no condition; give tuples such as ('frames', '>=', 8).")
        column, operator = str(each[0]), str(each[1])
        if column not in known:
            raise SpecError(
                f"filters: the dataset has no column {column!r} to filter by.{nearest_name(column, known)} It has "
                f"{', '.join(known)}."
            )
        if operator not in OPERATORS:
            raise SpecError(f"filters: there is no operator {operator!r}. Choose from {', '.join(OPERATORS)}.")
        conditions.append(Condition(column, operator, _checked_value(column, operator, each[2:])))
    return RowFilter(tuple(conditions))


def _checked_value(column: str, operator: str, given: Sequence[Any]) -> Any:
    """The value as JSON holds it: a number, a text, or a sorted list without repeats."""
    if operator in ("present", "missing"):
        if given:
            raise SpecError(f"filters: {column!r} {operator} takes no value.")
        return None
    if not given:
        raise SpecError(f"filters: {column!r} {operator} needs a value.")
    is_list = operator in ("in", "not in")
    if is_list and (isinstance(given[0], str) or not hasattr(given[0], "__iter__")):
        raise SpecError(f"filters: {column!r} {operator} needs a list, not {given[0]!r}.")
    try:
        values = pa.array(list(given[0]) if is_list else [given[0]], _TYPES[column])
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise SpecError(f"filters: {given[0]!r} cannot be compared with {column!r}: {error}.") from error
    if values.null_count:
        raise SpecError(f"filters: a missing {column!r} is asked for with 'missing' or 'present'.")
    return sorted(set(values.to_pylist())) if is_list else values[0].as_py()


def select_rows(
    row_filter: RowFilter, index: TokenIndex, files: TokenFiles, cache_dir: str | Path | None = None
) -> npt.NDArray[np.bool_]:
    """Which rows of the dataset pass, bool [rows] in the order of its files.

    With `cache_dir` the answer is kept there under the hashes of manifest and filter.  Raises BsqError."""
    path = None
    if cache_dir is not None:
        name = f"{index.info.manifest_sha256[:32]}-{row_filter.sha256[:32]}.bits"
        path = Path(cache_dir).absolute() / CACHE_FOLDER / name
        if (kept := _read_kept(path, index.info.rows)) is not None:
            return kept
    parts = [np.zeros(0, np.bool_)]
    for number in range(index.num_files):
        units = range(int(index.first_unit[number + 1] - index.first_unit[number]))
        file = files[number] if units else None
        parts += [_passing(row_filter, file, unit) for unit in units if file is not None]
    passes = np.concatenate(parts)
    if path is not None:
        _keep(path, passes)
    return passes


def _passing(row_filter: RowFilter, file: TokenFile, unit: int) -> npt.NDArray[np.bool_]:
    num_rows = file.unit_rows[unit]
    undecided = []
    for condition in row_filter.conditions:
        verdict = _by_statistics(condition, file, unit)
        if verdict is False:
            return np.zeros(num_rows, np.bool_)
        if verdict is None:
            undecided.append(condition)
    passes = np.ones(num_rows, np.bool_)
    if undecided:
        table = file.read_columns(unit, sorted({condition.column for condition in undecided}))
        for condition in undecided:
            passes &= _evaluate(condition, table[condition.column])
    return passes


def _by_statistics(condition: Condition, file: TokenFile, unit: int) -> bool | None:
    """True where all rows of the unit pass, False where none does, None where the rows must be asked."""
    statistics = file.statistics(unit, condition.column)
    if statistics is None or not statistics.has_null_count:
        return None
    nulls, num_rows = statistics.null_count, file.unit_rows[unit]
    if condition.operator in ("present", "missing"):
        if nulls in (0, num_rows):
            return bool((nulls == 0) == (condition.operator == "present"))
        return None
    if nulls == num_rows:
        return False
    # Texts may be cut in statistics and NaN is left out, so only integers are decided by them.
    if not statistics.has_min_max or not isinstance(condition.value, int):
        return None
    least, most, value = statistics.min, statistics.max, condition.value
    outcomes: dict[str, tuple[bool, bool]] = {
        "==": (least == most == value, value < least or value > most),
        "!=": (value < least or value > most, least == most == value),
        "<": (most < value, least >= value),
        "<=": (most <= value, least > value),
        ">": (least > value, most <= value),
        ">=": (least >= value, most < value),
    }
    every, none = outcomes[condition.operator]
    return False if none else True if every and not nulls else None


def _evaluate(condition: Condition, column: pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    if condition.operator == "present":
        passes = pc.is_valid(column)
    elif condition.operator == "missing":
        passes = pc.is_null(column)
    elif condition.operator in _COMPARE:
        passes = _COMPARE[condition.operator](column, pa.scalar(condition.value, column.type))
    else:
        passes = pc.is_in(column, value_set=pa.array(condition.value, column.type))
        if condition.operator == "not in":
            passes = pc.and_(pc.invert(passes), pc.is_valid(column))
    return np.asarray(pc.fill_null(passes, False).to_numpy(), np.bool_)


def _read_kept(path: Path, num_rows: int) -> npt.NDArray[np.bool_] | None:
    """The kept answer: 32 bytes of SHA-256, then the bits; None where there is none, or a damaged one."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    bits = data[32:]
    if len(bits) != (num_rows + 7) // 8 or hashlib.sha256(bits).digest() != data[:32]:
        return None
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=num_rows, bitorder="little").view(np.bool_)


def _keep(path: Path, passes: npt.NDArray[np.bool_]) -> None:
    bits = np.packbits(passes, bitorder="little").tobytes()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(8)}.tmp")
    # Without a place to keep it, the next start only takes longer.
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(hashlib.sha256(bits).digest() + bits)
        temporary.replace(path)
