"""Sharded state in a folder: every process writes its rows, and any number of processes reads them. No file is a pickle.

    rank_0.safetensors, rank_1.safetensors, ...   the numbers, a file for each process
    index.json                                    shape, dtype and parts of every tensor; a part's file, place, start, checksum

The entry `NUMBER.NAME` is the state tensor NAME of parameter NUMBER, with the shape that it has on one process. The index is
written last, when every process has written its file, so a folder with an index is complete. Folders of earlier versions, which
torch.distributed.checkpoint wrote, are read too, see dcp_metadata.py.
"""

from __future__ import annotations

import ctypes
import dataclasses
import io
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.checksums import checksum
from .dcp_metadata import METADATA, CheckpointError, Entry, Stored, checked, read_metadata, tiled

# Name of an entry -> shape and dtype.
Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]

INDEX = "index.json"
_FORMAT = 1
# The names of dtypes in the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
_ALIGNMENT = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A state tensor, or the part of it that this process holds.

    Attributes:
        tensor: the part.
        shape: of the whole tensor.
        dim, start: where the part begins in the whole; dim None: the part is the whole.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0

    @property
    def offsets(self) -> tuple[int, ...]:
        """The place at which the part begins, in each dimension."""
        return tuple(self.start if d == self.dim else 0 for d in range(len(self.shape)))


@dataclasses.dataclass(frozen=True)
class Index:
    """The entries of a folder.

    Attributes:
        folder: its path.
        entries: by name.
    """

    folder: Path
    entries: Mapping[str, Entry]


# Writing --------------------------------------------------------------------------------------------------------------------


def save(parts: dict[str, Part], folder: Path, group: dist.ProcessGroup) -> None:
    """Write the parts. Every process of `group` has to call this.

    Raises:
        OSError: on every process, if one process cannot write.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    held = _everybodys({name: (part.offsets, part.tensor.nbytes) for name, part in parts.items()}, group, size)
    mine = {name: parts[name] for name in _writers(held)[rank]}
    problem, written = None, {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in (INDEX, METADATA):  # an older checkpoint in this folder is no longer complete
            (folder / name).unlink(missing_ok=True)
        written = _write(mine, folder / f"rank_{rank}.safetensors")
    except OSError as error:
        problem = f"rank {rank}: {error}"
    found = _everybodys((problem, written), group, size)
    for problem in (theirs for theirs, _ in found if theirs is not None):
        raise OSError(f"{folder} cannot be written: {problem}")
    if rank == 0:
        entries: dict[str, Any] = {}
        for _, theirs in found:
            for name, (shape, dtype, stored) in theirs.items():
                entries.setdefault(name, {"shape": shape, "dtype": dtype, "parts": []})["parts"].append(stored)
        _replace(folder / INDEX, [json.dumps({"format": _FORMAT, "entries": entries}).encode()])
    dist.barrier(group)


def _everybodys(mine: Any, group: dist.ProcessGroup, size: int) -> list[Any]:
    everybody: list[Any] = [None] * size
    dist.all_gather_object(everybody, mine, group=group)
    return everybody


def _writers(held: list[dict[str, tuple[tuple[int, ...], int]]]) -> list[list[str]]:
    """Say which process writes which parts: of the processes that hold a part, the one with the fewest bytes so far writes it."""
    holders: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    sizes: dict[tuple[str, tuple[int, ...]], int] = {}
    for rank, parts in enumerate(held):
        for name, (offsets, size) in parts.items():
            holders.setdefault((name, offsets), []).append(rank)
            sizes[name, offsets] = size
    bytes_of, names = [0] * len(held), [[] for _ in held]  # type: tuple[list[int], list[list[str]]]
    for (name, offsets), ranks in sorted(holders.items(), key=lambda item: len(item[1])):
        rank = min(ranks, key=bytes_of.__getitem__)
        bytes_of[rank] += sizes[name, offsets]
        names[rank].append(name)
    return names


def _write(parts: Mapping[str, Part], file: Path) -> dict[str, Any]:
    """Write parts to a safetensors file; give, by name, shape and dtype of the whole, and the part's record for the index."""
    header: dict[str, Any] = {}
    end = 0
    for name, part in parts.items():
        t, start = part.tensor, -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + t.nbytes
        header[name] = {"dtype": _DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    begin = 8 + len(text)
    found: dict[str, Any] = {}

    def data() -> Iterator[Any]:
        yield len(text).to_bytes(8, "little") + text
        end = 0
        for name, part in parts.items():
            start, stop = header[name]["data_offsets"]
            t = part.tensor.detach().cpu().contiguous()
            yield bytes(start - end)
            yield _memory(t)
            end = stop
            place = {"file": file.name, "at": begin + start, "bytes": t.nbytes}
            where = {"start": list(part.offsets), "shape": list(t.shape), "checksum": checksum(t)}
            found[name] = list(part.shape), str(t.dtype).removeprefix("torch."), {**place, **where}

    _replace(file, data())
    return found


def _replace(file: Path, data: Iterable[Any]) -> None:
    """Write a file under another name, and rename it once it is on the disk."""
    other = file.with_name(f"{file.name}.tmp")
    with open(other, "wb") as stream:
        for part in data:
            stream.write(part)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(other, file)


def _memory(t: Tensor) -> Any:
    """Give the memory of a contiguous tensor on the CPU."""
    return (ctypes.c_ubyte * t.nbytes).from_address(t.data_ptr()) if t.nbytes else b""


# Reading --------------------------------------------------------------------------------------------------------------------


def opened(folder: Path) -> Index:
    """Read the index of a folder of this version or of earlier versions.

    Raises:
        CheckpointError: the folder or its index is missing or damaged, or a file is missing or too short.
    """
    if (folder / INDEX).is_file():
        entries = _read_index(folder)
    elif (folder / METADATA).is_file():
        entries = read_metadata(folder)
    else:
        reason = f"it has no {INDEX}, nor {METADATA}: the save was interrupted" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(f"{folder} is no whole checkpoint: {reason}")
    return Index(folder, entries)


def _read_index(folder: Path) -> dict[str, Entry]:
    file, dtypes = folder / INDEX, {str(dtype).removeprefix("torch."): dtype for dtype in _DTYPES}
    try:
        index = json.loads(file.read_bytes())
        version = index["format"]
        if type(version) is int and version > _FORMAT:
            raise CheckpointError(f"{file} has format {version}, this version of hf_efcp reads up to {_FORMAT}: upgrade")
        entries = {
            name: Entry(tuple(e["shape"]), dtypes[e["dtype"]], [_stored(part) for part in e["parts"]])
            for name, e in index["entries"].items()
        }
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OSError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is damaged: {type(error).__name__}: {error}") from None
    return checked(entries, folder, file)


def _stored(part: Mapping[str, Any]) -> Stored:
    return Stored(part["file"], part["at"], part["bytes"], tuple(part["start"]), tuple(part["shape"]), part["checksum"])


def check(index: Index, expected: Expected) -> None:
    """Raise CheckpointError where a folder has other entries than those that all processes together expect."""
    stored = index.entries
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{index.folder} does not fit this optimizer's parameters and options"
            + (f"; missing: {', '.join(missing[:5])}" if missing else "")
            + (f"; unexpected: {', '.join(extra[:5])}" if extra else "")
        )
    for name, (shape, dtype) in expected.items():
        entry = stored[name]
        if (entry.shape, entry.dtype) != (shape, dtype):
            theirs = "no tensor" if entry.dtype is None else f"{entry.shape} {entry.dtype}"
            raise CheckpointError(f"{index.folder}: {name} is {theirs} there, {shape} {dtype} here")
        if not tiled(entry):
            raise CheckpointError(f"{index.folder} is damaged: a part of {name} is missing, or there twice")


def read(index: Index, name: str, part: Part) -> Tensor:
    """Read the part of an entry that this process holds; give it, on the CPU.

    Raises:
        CheckpointError: a file is damaged.
    """
    return _read(index, name, part.dim, part.start, tuple(part.tensor.shape))


def read_mean(index: Index, name: str, part: Part) -> Tensor:
    """Read an entry of which the folder has several copies, along a first dimension; give their mean, as `read` does."""
    shape = (index.entries[name].shape[0], *part.tensor.shape)
    copies = _read(index, name, None if part.dim is None else part.dim + 1, part.start, shape)
    return copies.mean(0, dtype=torch.promote_types(copies.dtype, torch.float32)).to(copies.dtype)


def _read(index: Index, name: str, dim: int | None, start: int, shape: tuple[int, ...]) -> Tensor:
    """Put a run of a tensor together from the parts in the files. Each part is read and checked as a whole."""
    entry = index.entries[name]
    assert entry.dtype is not None
    if len(entry.parts) == 1 and entry.parts[0].shape == shape:
        return _part(index, name, entry.dtype, entry.parts[0])
    whole = torch.empty(shape, dtype=entry.dtype)
    for stored in entry.parts:
        t, target = None, whole
        for d in range(len(shape)):
            first = start if d == dim else 0
            begin, end = max(first, stored.start[d]), min(first + shape[d], stored.start[d] + stored.shape[d])
            if begin >= end:
                break
            t = _part(index, name, entry.dtype, stored) if t is None else t
            target, t = target.narrow(d, begin - first, end - begin), t.narrow(d, begin - stored.start[d], end - begin)
        else:
            target.copy_(_part(index, name, entry.dtype, stored) if t is None else t)
    return whole


def _part(index: Index, name: str, dtype: torch.dtype, stored: Stored) -> Tensor:
    """Read a part of a tensor from its file."""
    file = index.folder / stored.file
    try:
        with open(file, "rb") as stream:
            stream.seek(stored.at)
            t = _pickled(stream, stored) if stored.checksum is None else _plain(stream, dtype, stored)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from None
    if t is None or (tuple(t.shape), t.dtype) != (stored.shape, dtype) or t.layout != torch.strided or t.device.type != "cpu":
        raise CheckpointError(f"{file} is damaged: {name} in it cannot be read")
    if stored.checksum is not None and checksum(t) != stored.checksum:
        raise CheckpointError(f"{file} is damaged: the checksum of {name} is not the one that was saved")
    return t


def _plain(stream: BinaryIO, dtype: torch.dtype, stored: Stored) -> Tensor | None:
    t = torch.empty(stored.shape, dtype=dtype)
    return t if not t.nbytes or stream.readinto(_memory(t)) == t.nbytes else None  # type: ignore[attr-defined]


def _pickled(stream: BinaryIO, stored: Stored) -> Tensor | None:
    """Read a tensor that torch.save has written. weights_only makes nothing but tensors and plain values."""
    try:
        t = torch.load(io.BytesIO(stream.read(stored.bytes)), map_location="cpu", weights_only=True)
    except Exception:  # a damaged file may raise anything
        return None
    return t.contiguous() if type(t) is Tensor and t.layout == torch.strided and not t.is_quantized else None


# What others ask ------------------------------------------------------------------------------------------------------------


def entries(folder: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Give the last part of the name, the shape and the dtype of every tensor in a folder.

    Raises:
        CheckpointError: see `opened`.
    """
    stored = opened(folder).entries.items()
    return [(name.rpartition(".")[2], e.shape, e.dtype) for name, e in stored if e.dtype is not None]


def names(folder: Path) -> set[str]:
    """Give the names of the parameters with state in a folder to which torch.distributed.checkpoint saved {"optimizer": ...}.

    Raises:
        CheckpointError: see `opened`.
    """
    prefix = "optimizer.state."
    stored: Collection[str] = opened(folder).entries
    return {name.removeprefix(prefix).rpartition(".")[0] for name in stored if name.startswith(prefix)}
