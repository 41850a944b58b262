"""Copies a checkpoint's numbers to a fresh setup's state, and checks them meanwhile; computes the checksums of a state."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.cells import Spec
from ..core.checksums import checksum, checksums
from ..core.values import Values, values_of
from .setup import Setup

# The bytes that are copied and checked at once, so that they stay in the processor's cache.
_PIECE = 2**21
# A checkpoint's entry: the tensor as it is there; the part of it that this process holds; the saved checksum, or None.
Found = tuple[Tensor, Tensor, Any]


class Reading:
    """Fills a fresh setup with a checkpoint's entries, and checks their numbers piece by piece while the cache has them.

    Args:
        setup: the setup to fill.
        state: its entries.
        labels: names of the parameters, for messages.
    """

    def __init__(self, setup: Setup, state: Mapping[Tensor, Mapping[str, Tensor]], labels: Mapping[Tensor, str]):
        self.setup, self.state, self.labels = setup, state, labels
        self._damaged: list[tuple[Tensor, str]] = []

    def fill(self, source_of: Callable[[Tensor], Callable[[str], Found | None]]) -> str | None:
        """Fill the setup; say what is wrong with the numbers. None: nothing.

        Args:
            source_of: p -> name -> the checkpoint's entry; None: the checkpoint has no such entry, which begins anew.
        """
        asked: list[tuple[Sequence[Tensor], Spec]] = []
        flags: list[Tensor] = []
        summed: list[tuple[Sequence[Tensor], str, list[Any]]] = []
        sums: list[Tensor] = []
        for params, batches in _batches(self.setup):
            sources = [source_of(p) for p in params]
            for spec, batch in batches:
                values = values_of(spec)
                for some, part in _parts(batch):
                    few, found = params[some], [source(spec.name) for source in sources[some]]
                    pieces = _copied(found, part, spec)
                    if values is None or not part.numel():
                        collections.deque(pieces, 0)
                    else:
                        asked.append((few, spec))
                        flags.append(torch.stack([values.sure(piece) for piece in pieces]))
                    known = [self._expected(p, spec, one) for p, one in zip(few, found, strict=True)]
                    if any(x is not None for x in known):
                        summed.append((few, spec.name, known))
                        sums.append(checksums(part))
        for (few, spec), ok in zip(asked, _numbers(flags), strict=True):
            if not all(ok) and (words := self._wrong(few, spec)):
                return words
        for (few, name, known), found in zip(summed, _numbers(sums), strict=True):
            self._damaged += [(p, name) for p, x, y in zip(few, known, found, strict=True) if x is not None and x != y]
        for p, name in self._damaged:
            return f"{self.labels[p]}: {name} is damaged in the checkpoint: its checksum is not the one that was saved"
        return None

    def _expected(self, p: Tensor, spec: Spec, found: Found | None) -> Any:
        """Give the checksum that the copy of an entry should have; None: unknown, or already checked on the original."""
        if found is None:
            return None
        whole, part, known = found
        if known is None or (part is whole and whole.dtype == spec.dtype):
            return known
        if checksum(whole) != known:
            self._damaged.append((p, spec.name))
        return None

    def _wrong(self, params: Sequence[Tensor], spec: Spec) -> str | None:
        """Say which parameter has numbers that are not allowed, if any; called where `sure` did not rule them out."""
        values = values_of(spec)
        assert values is not None
        for p in params:
            entry = self.state[p][spec.name]
            if entry.numel() and not _sure(values, entry).all() and not (values.exact and values.exact(self.state[p])):
                return f"{self.labels[p]}: {spec.name} is damaged in the checkpoint: expected {values.expected}"
        return None


def _copied(found: Sequence[Found | None], batch: Tensor, spec: Spec) -> Iterator[Tensor]:
    """Copy the found entries of n tensors to a batch (n, ...), piece by piece; give each piece, (rows, cols), once copied."""
    if not batch.numel():
        return
    sources = [None if one is None else one[1] for one in found]
    if len(found) > 1 and all(_like(t, batch) for t in sources):
        torch.stack(sources, out=batch)  # type: ignore[arg-type]
        yield from _pieces(batch)
        return
    for source, target in zip(sources, batch.unbind(), strict=True):
        if source is None:
            target.fill_(spec.start)
            yield from _pieces(target)
        else:
            for piece, theirs in zip(_pieces(target), _pieces(source.view(target.shape), target.itemsize), strict=True):
                yield piece.copy_(theirs)


def _like(t: Tensor | None, batch: Tensor) -> bool:
    return t is not None and t.dtype == batch.dtype and t.device == batch.device and t.shape == batch.shape[1:]


def _pieces(t: Tensor, itemsize: int = 0) -> Sequence[Tensor]:
    """Cut a tensor, not empty, into pieces (rows, cols) that fit into the cache; `itemsize`: of its numbers, if not its own."""
    matrix = t.reshape(-1, t.shape[-1] if t.ndim else 1)
    rows = max(1, _PIECE // (matrix.shape[1] * (itemsize or t.itemsize)))
    return matrix.split(rows) if rows < len(matrix) else (matrix,)


def _sure(values: Values, batch: Tensor) -> Tensor:
    """Tell whether all numbers are certainly allowed, a 0-D bool tensor."""
    return torch.stack([values.sure(piece) for piece in _pieces(batch)]).all()


def _numbers(values: Sequence[Tensor]) -> list[list[Any]]:
    """Give tensors (k,) of one dtype as lists; the host waits for each device once."""
    result: list[list[Any]] = [[] for _ in values]
    for device in {t.device for t in values}:
        places = [(i, t) for i, t in enumerate(values) if t.device == device]
        numbers = iter(torch.cat([t for _, t in places]).tolist())
        for i, t in places:
            result[i] = list(itertools.islice(numbers, t.numel()))
    return result


def _batches(setup: Setup) -> Iterator[tuple[Sequence[Tensor], list[tuple[Spec, Tensor]]]]:
    """Give all entries of a setup: n parameters, and for them pairs of a spec and a batch (n, ...)."""
    for s in (*setup.stacks, *setup.factors):
        yield s.params, [(s.specs[name], buffer) for name, buffer in s.buffers.items()]
    for number, p in enumerate(setup.params):
        if counts := [(setup.specs[p][k], t[None]) for k, t in setup.counters.entries(number).items() if k in setup.specs[p]]:
            yield [p], counts


def _parts(batch: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Cut a batch into parts of a few tensors, or of one; give the place of each part, and the part."""
    n = max(1, _PIECE * len(batch) // max(batch.nbytes, 1))
    for i, part in enumerate(batch.split(n) if n < len(batch) else (batch,)):
        yield slice(i * n, (i + 1) * n), part


def checksums_of(setup: Setup, keys: Mapping[Tensor, Any], with_window: bool) -> dict[Any, dict[str, int]]:
    """Give the checksums of a setup's state, by key and name.

    Args:
        setup: whose state it is.
        keys: parameter -> its key in the result.
        with_window: whether the window's entries are included.
    """
    asked = [(p, spec.name, t) for p, batches in _batches(setup) for spec, t in batches if with_window or not spec.window]
    result: dict[Any, dict[str, int]] = {keys[p]: {} for p in setup.params}
    for (params, name, _), values in zip(asked, _numbers([checksums(batch) for _, _, batch in asked]), strict=True):
        for p, value in zip(params, values, strict=True):
            result[keys[p]][name] = value
    return result
