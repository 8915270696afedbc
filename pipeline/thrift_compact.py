"""Reads structs in Thrift's compact protocol, in which Parquet writes the headers of pages and its footer."""

from __future__ import annotations

from typing import Any

_BOOL_TRUE, _BOOL_FALSE, _I8, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(1, 13)
_MAX_DEPTH = 12


class NotThrift(Exception):
    """The bytes are no struct in the compact protocol, or end within one."""


class CompactReader:
    """Structs come as dictionaries by field number; in them integers, structs and lists of either keep their values.

    Whatever else there may be is passed over and stands as None."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = data
        self.place = 0
        """Bytes read so far."""

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """Read the struct that begins here.  Raises NotThrift."""
        if depth > _MAX_DEPTH:
            raise NotThrift("structs too deep")
        values: dict[int, Any] = {}
        field = 0
        while octet := self._octet():
            field = field + (octet >> 4) if octet >> 4 else self._zigzag()
            if field in values or field < 1:
                raise NotThrift("a field comes twice")
            kind = octet & 15
            # In a struct the type of a truth is its value; in a list each takes an octet.
            values[field] = None if kind in (_BOOL_TRUE, _BOOL_FALSE) else self._value(kind, depth)
        return values

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (_I16, _I32, _I64):
            return self._zigzag()
        if kind in (_I8, _BOOL_TRUE, _BOOL_FALSE):
            return self._skip(1)
        if kind == _DOUBLE:
            return self._skip(8)
        if kind == _BINARY:
            return self._skip(self._varint())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._list(depth)
        # Parquet has no maps.
        raise NotThrift("an unexpected field")

    def _list(self, depth: int) -> list[Any]:
        octet = self._octet()
        length = octet >> 4 if octet >> 4 < 15 else self._varint()
        # Each item takes an octet at least.
        if length > len(self._data) - self.place or depth > _MAX_DEPTH:
            raise NotThrift("a list that ends early")
        return [self._value(octet & 15, depth + 1) for _ in range(length)]

    def _octet(self) -> int:
        if self.place >= len(self._data):
            raise NotThrift("a struct that ends early")
        octet = int(self._data[self.place])
        self.place += 1
        return octet

    def _varint(self) -> int:
        value = 0
        for shift in range(0, 70, 7):
            octet = self._octet()
            value |= (octet & 127) << shift
            if octet < 128:
                return value
        raise NotThrift("an endless number")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _skip(self, num_bytes: int) -> None:
        if num_bytes > len(self._data) - self.place:
            raise NotThrift("a struct that ends early")
        self.place += num_bytes
