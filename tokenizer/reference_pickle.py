"""Reads the tensors of a torch.save file without unpickling it.

Unpickling calls whatever the file names.  Here a small machine goes through the pickle's opcodes and knows plain
values, dicts, lists and one call that matters, torch._utils._rebuild_tensor_v2.  Names that checkpoints of the
reference hold besides (its options, optimizer and random state) become inert placeholders that nothing can call; any
other name refuses the whole file.  Storages are read only for the tensors that are asked for."""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from schemas.errors import CheckpointError, printable

MAX_PICKLE_BYTES = 4 << 20
"""A checkpoint of the paper's largest model takes 300 kB; in memory a pickle takes up to 70 times its bytes."""
MAX_ENTRIES = 100_000
MAX_TENSOR_BYTES = 4 << 30
MAX_DIMENSIONS = 8

STORAGE_DTYPES = {
    "torch FloatStorage": torch.float32,
    "torch DoubleStorage": torch.float64,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}
INERT_NAMES = frozenset(
    f"{module} {name}"
    for module, names in {
        "argparse": "Namespace",
        "builtins": "Ellipsis bool bytes dict float int list object set str tuple",
        "__builtin__": "Ellipsis bool bytes dict float int list long object set str tuple unicode",
        "collections": "OrderedDict defaultdict",
        "numpy": "dtype ndarray",
        "numpy.core.multiarray": "_reconstruct scalar",
        "numpy._core.multiarray": "_reconstruct scalar",
        "omegaconf.base": "Box Container ContainerMetadata Metadata Node",
        "omegaconf.basecontainer": "BaseContainer",
        "omegaconf.dictconfig": "DictConfig",
        "omegaconf.listconfig": "ListConfig",
        "omegaconf.tupleconfig": "TupleConfig",
        "omegaconf.nodes": "AnyNode BooleanNode FloatNode IntegerNode InterpolationResultNode StringNode",
        "pathlib": "Path PosixPath",
        "torch": "Size bfloat16 device float16 float32 float64 int32 int64",
        "torch._utils": "_rebuild_parameter _rebuild_tensor_v2",
        "typing": "Any Dict List Optional Tuple Union",
        "_codecs": "encode",
        "_operator": "getitem",
    }.items()
    for name in names.split()
)


@dataclass(frozen=True, slots=True, eq=False)
class Inert:
    """Stands for a name of the pickle, or for what a call of it would have made. It does nothing."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A tensor that lies in the file: an entry of the archive and how its values are spread there."""

    dtype: torch.dtype
    storage: str
    storage_values: int
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class TorchFile:
    """An open torch.save file in the zip format: its plain values, and its tensors one by one."""

    def __init__(self, path: Path) -> None:
        """Open `path`; raises CheckpointError where it cannot be read or would execute something."""
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise CheckpointError(
                f"{path}: no zip archive. If it is a checkpoint from before torch 1.6, whose format cannot be read "
                "without running what it says, save it again with a newer torch where it is trusted."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or type(error).__name__}.") from error
        try:
            self._open()
        except BaseException:
            self._zip.close()
            raise

    def _open(self) -> None:
        self._entries = {entry.filename: entry for entry in self._zip.infolist()}
        if len(self._entries) != len(self._zip.infolist()) or len(self._entries) > MAX_ENTRIES:
            raise CheckpointError(f"{self.path}: entries of the archive repeat, or are more than {MAX_ENTRIES:,}.")
        # torch.save stores: so an entry's size is bounded by the file's.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in self._entries.values()):
            raise CheckpointError(f"{self.path}: entries of the archive are compressed; torch.save compresses nothing.")
        pickles = [name for name in self._entries if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise CheckpointError(f"{self.path}: the archive holds no data.pkl; this is no torch.save file.")
        self._prefix = pickles[0].removesuffix("data.pkl")
        order = self._prefix + "byteorder"
        if order in self._entries and self._read(order, 16) != b"little":
            raise CheckpointError(f"{self.path}: tensors are not little-endian.")
        self.root = _PickleMachine(self.path).run(self._read(pickles[0], MAX_PICKLE_BYTES))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._zip.close()

    def tensor(self, stored: StoredTensor, name: str) -> Tensor:
        """Read one tensor, contiguous. Raises CheckpointError where it reaches outside its storage."""
        values = math.prod(stored.shape)
        item_bytes = stored.dtype.itemsize
        last = sum((size - 1) * step for size, step in zip(stored.shape, stored.stride, strict=True))
        entry = f"{self._prefix}data/{stored.storage}"
        num_bytes = stored.storage_values * item_bytes
        if values > stored.storage_values or (values and stored.offset + last >= stored.storage_values):
            raise CheckpointError(f"{self.path}: tensor {printable(name)!r} reaches outside its storage.")
        if max(values * item_bytes, num_bytes) > MAX_TENSOR_BYTES:
            raise CheckpointError(f"{self.path}: tensor {printable(name)!r} is over {MAX_TENSOR_BYTES:,} bytes.")
        if entry not in self._entries or self._entries[entry].file_size != num_bytes:
            raise CheckpointError(f"{self.path}: the storage of tensor {printable(name)!r} is missing or cut off.")
        if not values:
            return torch.empty(stored.shape, dtype=stored.dtype)
        storage = torch.frombuffer(bytearray(self._read(entry, num_bytes)), dtype=stored.dtype)
        return storage.as_strided(stored.shape, stored.stride, stored.offset).clone(
            memory_format=torch.contiguous_format
        )

    def _read(self, name: str, limit: int) -> bytes:
        entry = self._entries[name]
        if entry.file_size > limit:
            raise CheckpointError(f"{self.path}: {printable(name)} has {entry.file_size:,} bytes; at most {limit:,}.")
        try:
            with self._zip.open(entry) as file:
                content = file.read(entry.file_size)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.path}: {printable(name)} is damaged: {error}.") from error
        if len(content) != entry.file_size:
            raise CheckpointError(f"{self.path}: {printable(name)} is cut off.")
        return content


CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = frozenset(
    [
        *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINSTRING", "SHORT_BINSTRING"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    ]
)


class _PickleMachine:
    """Runs the opcodes of protocols 2 to 5 that torch.save writes, without calling anything."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.actions: dict[str, Callable[[Any], object]] = {
            "MARK": lambda _: self.marks.append(len(self.stack)),
            "EMPTY_DICT": lambda _: self.stack.append({}),
            "EMPTY_LIST": lambda _: self.stack.append([]),
            "EMPTY_SET": lambda _: self.stack.append(Inert("set")),
            "TUPLE": lambda _: self.stack.append(tuple(self._pop_mark())),
            "TUPLE1": lambda _: self.stack.append(tuple(self._pop(1))),
            "TUPLE2": lambda _: self.stack.append(tuple(self._pop(2))),
            "TUPLE3": lambda _: self.stack.append(tuple(self._pop(3))),
            "POP": lambda _: self.stack.pop(),
            "POP_MARK": lambda _: self._pop_mark(),
            "APPEND": lambda _: self._append(self._pop(1)),
            "APPENDS": lambda _: self._append(self._pop_mark()),
            "ADDITEMS": lambda _: self._append(self._pop_mark()),
            "SETITEM": lambda _: self._set(self._pop(2)),
            "SETITEMS": lambda _: self._set(self._pop_mark()),
            "GLOBAL": self._name,
            "STACK_GLOBAL": lambda _: self._name(" ".join(self._pop(2))),
            "REDUCE": lambda _: self._call(*self._pop(2)),
            "NEWOBJ": lambda _: self._call(*self._pop(2)),
            "NEWOBJ_EX": lambda _: self._call(*self._pop(3)[:2]),
            "BUILD": lambda _: self._pop(1),
            "BINPERSID": lambda _: self.stack.append(self._storage(*self._pop(1))),
            "MEMOIZE": lambda _: self._put(len(self.memo)),
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda index: self.stack.append(self.memo[index])),
            **dict.fromkeys(("PROTO", "FRAME"), lambda _: None),
        }

    def run(self, pickled: bytes) -> Any:
        """What the pickle holds, of dicts, lists, tuples, plain values, StoredTensor and Inert."""
        try:
            for opcode, argument, _ in pickletools.genops(io.BytesIO(pickled)):
                if opcode.name in LITERALS:
                    self.stack.append(argument)
                elif opcode.name in CONSTANTS:
                    self.stack.append(CONSTANTS[opcode.name])
                elif opcode.name == "STOP":
                    return self.stack.pop()
                elif opcode.name in self.actions:
                    self.actions[opcode.name](argument)
                else:
                    raise CheckpointError(f"{self.path}: refused: opcode {opcode.name} is not one torch.save writes.")
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise CheckpointError(f"{self.path}: the pickle inside is damaged ({type(error).__name__}).") from error
        raise CheckpointError(f"{self.path}: the pickle inside is cut off.")

    def _name(self, name: str) -> None:
        if name not in INERT_NAMES and name not in STORAGE_DTYPES:
            raise CheckpointError(
                f"{self.path}: refused: it asks for {printable(name).replace(' ', '.')}, which no checkpoint of the "
                "reference needs. Nothing was executed."
            )
        self.stack.append(Inert(name))

    def _call(self, function: Any, arguments: Any) -> None:
        name = function.name if isinstance(function, Inert) else ""
        if name == "torch._utils _rebuild_tensor_v2":
            self.stack.append(self._tensor(*arguments[:4]))
        elif name == "torch._utils _rebuild_parameter":
            self.stack.append(arguments[0])
        elif name in ("collections OrderedDict", "collections defaultdict"):
            # Their items follow as SETITEMS.
            self.stack.append({})
        else:
            self.stack.append(Inert(name))

    def _storage(self, description: Any) -> tuple[torch.dtype, str, int]:
        kind, storage, key, _, values = description
        if kind != "storage" or not isinstance(key, str) or type(values) is not int or values < 0:
            raise ValueError("storage")
        return STORAGE_DTYPES[storage.name], key, values

    def _tensor(self, storage: Any, offset: Any, shape: Any, stride: Any) -> StoredTensor:
        dtype, key, values = storage
        counts = (offset, *shape, *stride)
        if any(type(count) is not int or not 0 <= count < 1 << 48 for count in counts):
            raise ValueError("tensor")
        if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
            raise ValueError("tensor")
        return StoredTensor(dtype, key, values, offset, tuple(shape), tuple(stride))

    def _append(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def _set(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((key, value) for key, value in pairs if isinstance(key, str | int))

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("stack")
        popped = self.stack[-count:]
        del self.stack[-count:]
        return popped

    def _pop_mark(self) -> list[Any]:
        mark = self.marks.pop()
        popped = self.stack[mark:]
        del self.stack[mark:]
        return popped
