"""The index of a checkpoint's folder; and `.metadata`, the pickle of torch.distributed.checkpoint, read without running anything.

The `.metadata` of a folder that somebody else made may be any program. The unpickler here knows only the names that such a file
needs. Each name stands for an object that holds values and does nothing. torch itself reads the file with pickle. So a file that
torch is about to read is read here first, see `refuse_programs`.
"""

from __future__ import annotations

import dataclasses
import io
import math
import pickle
import pickletools
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch

METADATA = ".metadata"
# The most bytes of the file, which has some hundred bytes for each tensor.
_MOST_BYTES = 2**30
# The operations that pickle writes for records, numbers, text and containers. Other operations make objects in other ways.
# fmt: off
_OPCODES = frozenset((
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "MEMOIZE", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT",
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_SET", "ADDITEMS",
    "EMPTY_DICT", "SETITEM", "SETITEMS", "GLOBAL", "STACK_GLOBAL", "REDUCE", "NEWOBJ", "BUILD",
))
# fmt: on


class CheckpointError(ValueError):
    """A folder that is no complete checkpoint, or a checkpoint of something else."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """A part of a tensor in a file.

    Attributes:
        file: the file's name in the folder.
        at, bytes: the place of the part in the file, and its length.
        start, shape: the place of the part in the tensor, and its shape.
        checksum: of the part's bytes; None: the part is in the format of torch.save.
    """

    file: str
    at: int
    bytes: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    checksum: int | None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in a folder.

    Attributes:
        shape, dtype: of the whole tensor; dtype None: the entry is no tensor.
        parts: the parts that the files have.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    parts: list[Stored]


def checked(entries: Mapping[str, Entry], folder: Path, file: Path) -> dict[str, Entry]:
    """Give the entries, if their parts lie within the tensors and the files.

    Args:
        entries: the entries that `file` names.
        folder: where the files are.
        file: of the index, for messages.

    Raises:
        CheckpointError: a part does not, or a file is missing.
    """
    sizes: dict[str, int] = {}
    for name, entry in entries.items():
        problem = None if type(name) is str and _sizes(entry.shape) else "no name, or no shape"
        for part in entry.parts:
            problem = problem or _problem(part, entry)
            if problem is None and part.file not in sizes:
                path = folder / part.file
                if not path.is_file():
                    raise CheckpointError(f"{path} is missing")
                sizes[part.file] = path.stat().st_size
            if problem is None and part.at + part.bytes > sizes[part.file]:
                raise CheckpointError(f"{folder / part.file} is damaged: it ends too early")
        if problem is not None:
            raise CheckpointError(f"{file} is damaged: {name!r}: {problem}")
    return dict(entries)


def _problem(part: Stored, entry: Entry) -> str | None:
    if type(part.file) is not str or PurePath(part.file).name != part.file or part.file in ("", ".", "..") or "\\" in part.file:
        return "a file outside of the folder"
    if not _sizes((part.at, part.bytes)):
        return "a place outside of a file"
    if entry.dtype is None:
        return None
    if not (_sizes(part.start) and _sizes(part.shape) and len(part.start) == len(part.shape) == len(entry.shape)):
        return "a part of other dimensions"
    if part.checksum is not None:
        if type(part.checksum) is not int or part.bytes != math.prod(part.shape) * entry.dtype.itemsize:
            return "a part of another size"
    elif part.bytes < math.prod(part.shape) * entry.dtype.itemsize:
        return "a part of another size"
    return None


def _sizes(values: Any) -> bool:
    return isinstance(values, tuple) and all(type(x) is int and 0 <= x < 2**62 for x in values)


def tiled(entry: Entry) -> bool:
    """Tell whether the parts are runs along one dimension that together make the whole tensor."""
    if not all(entry.shape):
        return True  # the tensor is empty
    parts = [part for part in entry.parts if all(part.shape)]
    cut = {d for part in parts for d in range(len(entry.shape)) if part.shape[d] != entry.shape[d]}
    if len(cut) > 1 or any(part.start[d] for part in parts for d in range(len(entry.shape)) if d not in cut):
        return False
    if not cut:
        return len(parts) == 1
    (d,), end = cut, 0
    for part in sorted(parts, key=lambda part: part.start[d]):
        if part.start[d] != end:
            return False
        end += part.shape[d]
    return end == entry.shape[d]


# The pickle -----------------------------------------------------------------------------------------------------------------


def refuse_programs(folder: Path) -> None:
    """Read the pickles of a folder that torch.distributed.checkpoint is about to read; refuse pickles of more than values.

    Raises:
        CheckpointError: `.metadata` or a value in a file is damaged, or asks for anything that such a file does not need.
    """
    for name, entry in read_metadata(folder).items():
        for part in entry.parts if entry.dtype is None else ():
            with open(folder / part.file, "rb") as stream:
                stream.seek(part.at)
                data = stream.read(part.bytes)
            try:
                torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except Exception as error:  # a damaged file may raise anything
                reason = str(error).partition("\n")[0]
                raise CheckpointError(f"{folder / part.file} is damaged: {name} in it is no plain value: {reason}") from None


def read_metadata(folder: Path) -> dict[str, Entry]:
    """Read and check `.metadata` of a folder.

    Raises:
        CheckpointError: `.metadata`, or a file that it names, is missing or damaged.
    """
    file = folder / METADATA
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("it is too large")
        record = _Unpickler(_safe(file.read_bytes())).load()
        entries = _entries(record)
    except Exception as error:  # a damaged file may raise anything
        raise CheckpointError(f"{file} is damaged: {error}") from None
    return checked(entries, folder, file)


def _entries(record: Any) -> dict[str, Entry]:
    """Give the entries that the record `Metadata` names."""
    parts: dict[str, list[Stored]] = {}
    known: dict[str, Any] = dict(record.state_dict_metadata)
    for index, place in record.storage_data.items():
        if getattr(place, "transform_descriptors", None):
            raise ValueError("files that were transformed (compressed) are not read")
        entry, start = known[index.fqn], tuple(getattr(index, "offset", None) or ())
        shape: tuple[int, ...] = ()
        if entry.name == "TensorStorageMetadata":
            start = start or (0,) * len(entry.size)
            shape = next(tuple(chunk.sizes) for chunk in entry.chunks if tuple(chunk.offsets) == start)
        stored = Stored(place.relative_path, place.offset, place.length, start, shape, None)
        parts.setdefault(index.fqn, []).append(stored)
    found = {}
    for name, entry in known.items():
        if entry.name == "TensorStorageMetadata":
            dtype = entry.properties.state[0] if entry.properties.state else entry.properties.dtype
            if not isinstance(dtype, torch.dtype):
                raise ValueError(f"{name} has no dtype")
            found[name] = Entry(tuple(entry.size), dtype, parts.get(name, []))
        elif entry.name == "BytesStorageMetadata":
            found[name] = Entry((), None, parts.get(name, []))
        else:
            raise ValueError(f"{name} is of an unknown kind")
    return found


def _safe(data: bytes) -> io.BytesIO:
    """Give the pickle, if it has only operations that such a file needs, and a memo no larger than the file."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name not in _OPCODES:
            raise ValueError(f"it has the operation {operation.name}, which no checkpoint needs")
        if operation.name in ("LONG_BINPUT", "LONG_BINGET") and isinstance(argument, int) and argument > len(data):
            raise ValueError("it asks for more memory than it can use")
    return io.BytesIO(data)


class _Fixed(type):
    """A class whose attributes cannot be set: a pickle could otherwise set them."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it writes to the class {cls.__name__}")


class _Record(metaclass=_Fixed):
    """Values by name, in the place of one of torch's objects."""

    name = ""
    state: Any = ()
    transform_descriptors: Any = None

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            if not all(isinstance(key, str) for key in state) or {"name", "state"} & state.keys():
                raise pickle.UnpicklingError("it has a record with other keys")
            self.__dict__.update(state)
        else:
            self.__dict__["state"] = state

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class _Function(metaclass=_Fixed):
    """A stand-in for a function: when called, it gives its arguments as text, as a number or as a tuple."""

    __slots__ = ("kind",)
    kind: type

    def __init__(self, kind: type):
        object.__setattr__(self, "kind", kind)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it writes to a function")

    def __call__(self, *args: Any) -> Any:
        if self.kind is tuple:
            (values,) = args
            return tuple(values)
        return self.kind(*args) if self.kind is not str else "/".join(map(str, args))


_PLACE = "torch.distributed.checkpoint."
_RECORDS = {
    f"{_PLACE}metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
    ),
    f"{_PLACE}filesystem": ("_StorageInfo",),
}
_NAMES: dict[tuple[str, str], Any] = {
    (module, name): _Fixed(name, (_Record,), {"name": name}) for module, names in _RECORDS.items() for name in names
}
_NAMES |= {
    (f"{_PLACE}metadata", "_MEM_FORMAT_ENCODING"): _Function(int),
    ("torch", "Size"): _Function(tuple),
    ("torch.serialization", "_get_layout"): _Function(str),
}
_NAMES |= {("torch", str(d).removeprefix("torch.")): d for d in vars(torch).values() if isinstance(d, torch.dtype)}
_PATHS = ("PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("pathlib", "pathlib._local") and name in _PATHS:
            return _Function(str)
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs: it may be a program")
        return _NAMES[module, name]
