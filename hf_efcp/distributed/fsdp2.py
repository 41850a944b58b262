"""Parameters that are already divided over a device mesh (FSDP2's DTensors): the state follows their rows.

FSDP2 gives each process of the mesh's sharded dimension a run of ceil(rows / N) rows of dimension 0. The last processes may have
fewer rows or none. With a second mesh dimension (HSDP), the runs are replicated along it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..core.cells import Spec
from ..options import OptionError
from .ddp import unit
from .placement import Placement, Specs, cut
from .plan import Owners


def is_sharded(p: Any) -> bool:
    """Tell whether p is a DTensor."""
    return hasattr(p, "device_mesh") and hasattr(p, "placements")


def local(t: Any) -> Tensor:
    """Give the part of t that this process holds, in t's memory."""
    return t.detach().to_local() if is_sharded(t) else t.detach()


def local_gradient(p: Any) -> Tensor | None:
    """Give the part of p's gradient that this process holds."""
    g = p.grad
    if g is None or not is_sharded(g):
        return g
    if g.placements != p.placements:  # FSDP2's own gradients are placed as the parameter is
        g = g.redistribute(p.device_mesh, p.placements)
    return g.detach().to_local()


def problem(p: Any) -> str | None:
    """Say what is wrong with the way the DTensor p is divided; None: nothing."""
    dims = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]
    rows = [d for d in dims if type(p.placements[d]).__name__ == "Shard" and p.placements[d].dim == 0]
    if len(dims) <= 1 and rows == dims:
        return None
    placements = ", ".join(map(repr, p.placements))
    return (
        f"a parameter is a DTensor placed as ({placements}); allowed is what FSDP2 makes: Shard(dim=0) over one dimension of "
        "the mesh, Replicate() over the others"
    )


class FSDP2Mesh(Placement):
    """A device mesh over which parameters are divided by rows; the state follows them.

    Args:
        params: DTensors for which `problem` is None, on the same mesh with the same placements.
    """

    alone = False
    follows = True

    def __init__(self, params: Sequence[Any]):
        self.mesh, self.placements = params[0].device_mesh, tuple(params[0].placements)
        self.dim = next((d for d, placement in enumerate(self.placements) if not placement.is_replicate()), None)
        self.rank = 0 if self.dim is None else self.mesh.get_local_rank(self.dim)
        self.size = self.shards = 1 if self.dim is None else self.mesh.size(self.dim)
        self._replicated = [d for d in range(self.mesh.ndim) if d != self.dim]

    @classmethod
    def of(cls, params: Sequence[Any], name: str) -> FSDP2Mesh:
        """Make the placement of parameters, where some of them are DTensors.

        Args:
            params: the parameters.
            name: of the optimizer, for messages.

        Raises:
            OptionError: the parameters are not all on one mesh with the same placements.
        """
        mesh = cls([p for p in params if is_sharded(p)])
        for i, p in enumerate(params):
            if not mesh.fits(p):
                place = f"{p.placements} on {p.device_mesh}" if is_sharded(p) else "a plain tensor"
                raise OptionError(
                    f"{name}: all parameters must lie alike on one device mesh; parameter {i} is {place}, others are "
                    f"{mesh.placements} on {mesh.mesh}: give each kind an optimizer of its own"
                )
        return mesh

    def fits(self, p: Any) -> bool:
        """Tell whether p is divided as the others are."""
        return is_sharded(p) and p.device_mesh == self.mesh and tuple(p.placements) == self.placements

    def check(self, specs: Mapping[Tensor, Specs]) -> None:
        """See Placement. FSDP2 may cut a tensor anywhere, even inside a run of numbers that share a scale, or inside a block."""
        check_cuts(specs, self.size)

    def owners(self, specs: Mapping[Tensor, Specs], known: Mapping[Tensor, Owners]) -> dict[Tensor, Owners]:
        """See Placement. The rows are those of p; for a vector, they are its entries."""
        return {p: self._rows(p) for p in specs}

    def _rows(self, p: Tensor) -> Owners:
        if self.size == 1:
            return {0: None}
        total = len(p)
        each = -(-total // self.size)
        return {r: slice(min(r * each, total), min((r + 1) * each, total)) for r in range(self.size)}

    def sum(self, t: Tensor) -> Tensor:
        """See Placement. Replicas are averaged, so that they agree to the last bit: each group may sum in another order."""
        device = self.mesh.device_type
        x = t if t.device.type == device else t.to(device)  # the state may be on the CPU, with a GPU's process group
        replicas = 1
        for d in [self.dim, *self._replicated]:
            if d is not None and self.mesh.size(d) > 1:
                dist.all_reduce(x, group=self.mesh.get_group(d))
                replicas *= self.mesh.size(d) if d != self.dim else 1
        if replicas > 1:
            x /= replicas
        return t if x is t else t.copy_(x)

    def any(self, flag: bool, device: torch.device) -> bool:
        """See Placement."""
        return bool(self.sum(torch.tensor([float(flag)], device=device)).item())

    def gather(self, mine: object) -> list[Any]:
        """See Placement. The objects are ordered shard by shard."""
        everybody = [mine]
        for d in [self.dim, *self._replicated]:
            if d is not None and self.mesh.size(d) > 1:
                parts: list[Any] = [None] * self.mesh.size(d)
                dist.all_gather_object(parts, everybody, group=self.mesh.get_group(d))
                everybody = [one for part in parts for one in part]
        return everybody

    def outer(self, t: Tensor, spec: Spec, p: Tensor) -> Tensor:
        """See Placement. The result is a DTensor if the entry follows the rows."""
        from torch.distributed.tensor import DTensor

        t = t.int() if t.dtype == torch.int16 else t  # a full state dict needs messages: NCCL and gloo send no int16
        dim = spec.divided(p)
        if dim is None:
            return t
        shape = torch.Size(spec.shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(t, self.mesh, self._placed(dim), run_check=False, shape=shape, stride=stride)

    def inner(self, t: Any, spec: Spec, p: Tensor, rows: slice | None) -> Tensor:
        """See Placement."""
        dim = spec.divided(p)
        if is_sharded(t):
            mine = rows is not None and dim is not None and t.device_mesh == self.mesh
            if mine and dim is not None and tuple(t.placements) == self._placed(dim):
                return t.to_local()
            t = t.full_tensor()
        return cut(t, spec, p, rows)

    def _placed(self, dim: int) -> tuple[Any, ...]:
        """Give the placements of a state tensor whose dimension `dim` is divided as the parameter's rows are."""
        from torch.distributed.tensor import Replicate, Shard

        return tuple(Shard(dim) if d == self.dim else Replicate() for d in range(self.mesh.ndim))


def check_cuts(specs: Mapping[Tensor, Specs], processes: int) -> None:
    """Raise OptionError where FSDP2, on this number of processes, would cut an entry of state inside a run or a block."""
    for p, entries in specs.items():
        for spec in entries.values():
            if p.ndim == 1 and not spec.cuttable(p):
                raise OptionError(
                    "under FSDP2 1-D tensors cannot have blocks: use window_format='plain', and int8 or int4 errors only with an "
                    "exact window_dtype"
                )
        by = unit(entries)
        if p.ndim and processes > 1 and (rows := -(-len(p) // processes)) % by:
            raise OptionError(
                f"under FSDP2 on {processes} processes a parameter {tuple(p.shape)} would be cut inside a block of {by} rows: "
                f"each process has {rows}, which blocks have to divide"
            )
