"""Sharded state in a folder, by torch.distributed.checkpoint: every process writes its rows; any number of processes reads them.

The entry `NUMBER.NAME` is the state tensor NAME of parameter NUMBER, with the shape that it has on one process. The folder is
whole once `.metadata` is there: it is written last, when every process has written its file.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

# Name of an entry -> shape and dtype.
Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]


class CheckpointError(ValueError):
    """A folder that is no whole checkpoint, or one of something else."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A state tensor, or the part of it that this process holds, in the form that torch.distributed.checkpoint asks for.

    Attributes:
        tensor: what is held.
        shape: of the whole.
        dim, start: where the part begins in the whole; dim None: it is the whole.
    """

    tensor: Tensor
    shape: tuple[int, ...]
    dim: int | None = None
    start: int = 0

    def size(self) -> torch.Size:
        """Shape of the whole."""
        return torch.Size(self.shape)

    def _chunk(self) -> ChunkStorageMetadata:
        offsets = [self.start if d == self.dim else 0 for d in range(self.tensor.ndim)]
        return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=self.tensor.shape)

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        chunk, properties = self._chunk(), TensorProperties.create_from_tensor(self.tensor)
        data = TensorWriteData(chunk=chunk, properties=properties, size=self.size())
        return [WriteItem(index=MetadataIndex(name, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data)]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()]


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        # The default's would look for meta tensors in it, and take a dataclass apart.
        self.state_dict = self.original_state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].tensor


def save(parts: dict[str, Part], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the parts; to be called by every process of `group`."""
    (folder / ".metadata").unlink(missing_ok=True)  # an older checkpoint of that name is no longer whole
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    dcp.save(parts, checkpoint_id=folder, planner=planner, process_group=group)


def load(
    parts: dict[str, Part], expected: Expected, folder: Path, group: dist.ProcessGroup | None, means: dict[str, Part]
) -> None:
    """Read into the parts' tensors; everything is checked before anything is changed.

    Args:
        parts: what this process holds.
        expected: shape and dtype of every entry, those that other processes hold too.
        folder: as `save` wrote it, on any number of processes.
        group: the processes that load together; None: this one alone.
        means: further parts, of entries that have several copies, in one more dimension before the others: filled with the mean.

    Raises:
        CheckpointError: the folder or a file in it is missing or damaged, or entries do not fit.
    """
    reader, problem = dcp.FileSystemReader(folder), None
    try:
        _check(reader, expected, folder)
    except CheckpointError as error:
        problem = str(error)
    _raise_together(problem, group)
    try:
        planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        if group is None:
            _read_alone(parts, reader, planner)
        else:
            dcp.load(parts, storage_reader=reader, planner=planner, process_group=group)
        for name, part in means.items():
            copies = torch.empty(expected[name][0][0], *part.tensor.shape, dtype=part.tensor.dtype)
            dim = None if part.dim is None else part.dim + 1
            _read_alone({name: Part(copies, expected[name][0], dim, part.start)}, reader, planner)
            part.tensor.copy_(copies.mean(0, dtype=torch.promote_types(copies.dtype, torch.float32)))
    except dcp.CheckpointException as error:
        raise CheckpointError(f"{folder} cannot be read: {error}") from None


def _read_alone(parts: dict[str, Part], reader: dcp.FileSystemReader, planner: _LoadPlanner) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*assuming the intent is to load in a single process")
        if torch.__version__ >= "2.7":  # compared as versions
            dcp.load(parts, storage_reader=reader, planner=planner, no_dist=True)
        else:  # in torch 2.6 only the older function, deprecated then, can leave other processes out
            warnings.filterwarnings("ignore", "`load_state_dict` is deprecated", FutureWarning)
            dcp.load_state_dict(parts, reader, no_dist=True, planner=planner)


def _raise_together(problem: str | None, group: dist.ProcessGroup | None) -> None:
    """Where one process does not see the files (a disk of its own), the others do not wait for it."""
    if group is None:
        problems = [problem]
    else:
        problems = [None] * dist.get_world_size(group)
        dist.all_gather_object(problems, problem, group=group)
    for rank, text in enumerate(problems):
        if text is not None:
            raise CheckpointError(text if text == problem else f"rank {rank}: {text}")


def entries(folder: Path) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Last part of the name, shape and dtype of every tensor in a folder that torch.distributed.checkpoint has written.

    Raises:
        CheckpointError: as of `load`.
    """
    stored = _metadata(dcp.FileSystemReader(folder), folder).state_dict_metadata
    tensors = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
    return [(name.rpartition(".")[2], tuple(entry.size), entry.properties.dtype) for name, entry in tensors.items()]


def names(folder: Path) -> set[str]:
    """Names of the parameters with state in a folder that torch.distributed.checkpoint has written of {"optimizer": ...}.

    Raises:
        CheckpointError: as of `load`.
    """
    stored = _metadata(dcp.FileSystemReader(folder), folder).state_dict_metadata
    prefix = "optimizer.state."
    return {name.removeprefix(prefix).rpartition(".")[0] for name in stored if name.startswith(prefix)}


def _check(reader: dcp.FileSystemReader, expected: Expected, folder: Path) -> None:
    metadata = _metadata(reader, folder)
    _check_entries(metadata.state_dict_metadata, expected, folder)
    _check_files(metadata.storage_data, folder)


def _metadata(reader: dcp.FileSystemReader, folder: Path) -> Metadata:
    if not (folder / ".metadata").is_file():
        reason = "it has no .metadata: the save was interrupted" if folder.is_dir() else "there is no such folder"
        raise CheckpointError(f"{folder} is no whole checkpoint: {reason}")
    try:
        return reader.read_metadata()
    except Exception as error:  # whatever unpickling a damaged file ends in
        raise CheckpointError(f"{folder / '.metadata'} is damaged: {error}") from None


def _check_entries(stored: Mapping[str, object], expected: Expected, folder: Path) -> None:
    missing, extra = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys())
    if missing or extra:
        raise CheckpointError(
            f"{folder} does not fit this optimizer's parameters and options"
            + (f"; missing: {', '.join(missing[:5])}" if missing else "")
            + (f"; unexpected: {', '.join(extra[:5])}" if extra else "")
        )
    for name, (shape, dtype) in expected.items():
        entry = stored[name]
        fits = isinstance(entry, TensorStorageMetadata) and (tuple(entry.size), entry.properties.dtype) == (shape, dtype)
        if not fits:
            theirs = f"{tuple(entry.size)} {entry.properties.dtype}" if isinstance(entry, TensorStorageMetadata) else "no tensor"
            raise CheckpointError(f"{folder}: {name} is {theirs} there, {shape} {dtype} here")


def _check_files(storage: Mapping[Any, Any], folder: Path) -> None:
    """Every file has to be there, and as long as what it holds."""
    length: dict[str, int] = {}
    for place in storage.values():
        length[place.relative_path] = max(length.get(place.relative_path, 0), place.offset + place.length)
    for name, least in length.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size < least:
            raise CheckpointError(f"{file} is {'damaged: it ends too early' if file.is_file() else 'missing'}")
