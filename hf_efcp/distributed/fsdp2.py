"""Parameters that are divided over a device mesh already (FSDP2's DTensors): the state follows their rows.

FSDP2 gives each process of the mesh's sharded dimension a run of ceil(rows / N) rows of dimension 0, the last ones perhaps
fewer or none. With a second mesh dimension (HSDP) the runs are replicated along it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .plan import Owners


def is_sharded(p: Tensor) -> bool:
    """Whether p is a DTensor."""
    return hasattr(p, "device_mesh") and hasattr(p, "placements")


def local(t: Tensor) -> Tensor:
    """What this process holds of t, in t's memory."""
    return t.detach().to_local() if is_sharded(t) else t.detach()


def local_gradient(p: Tensor) -> Tensor | None:
    """What this process holds of p's gradient."""
    g = p.grad
    if g is None or not is_sharded(g):
        return g
    if g.placements != p.placements:  # made by hand: FSDP2's own lie as the parameter does
        g = g.redistribute(p.device_mesh, p.placements)
    return g.detach().to_local()


def problem(p: Tensor) -> str | None:
    """What is wrong with the way in which the DTensor p is divided; None: nothing."""
    dims = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]
    rows = [d for d in dims if type(p.placements[d]).__name__ == "Shard" and p.placements[d].dim == 0]
    if len(dims) <= 1 and rows == dims:
        return None
    placements = ", ".join(map(repr, p.placements))
    return (
        f"a parameter is a DTensor placed as ({placements}); allowed is what FSDP2 makes: Shard(dim=0) over one dimension of "
        "the mesh, Replicate() over the others"
    )


class MeshShards:
    """A device mesh over which parameters are divided by rows; the counterpart of `Shards`.

    Args:
        params: DTensors for which `problem` is None, on the same mesh with the same placements.
    """

    # The state follows its parameters: nobody has to plan who holds what, or to hand out what was updated.
    follows = True

    def __init__(self, params: Sequence[Tensor]):
        self.mesh, self.placements = params[0].device_mesh, tuple(params[0].placements)
        self.dim = next((d for d, placement in enumerate(self.placements) if not placement.is_replicate()), None)
        self.rank = 0 if self.dim is None else self.mesh.get_local_rank(self.dim)
        self.size = 1 if self.dim is None else self.mesh.size(self.dim)
        self._replicated = [d for d in range(self.mesh.ndim) if d != self.dim]

    def fits(self, p: Tensor) -> bool:
        """Whether p is divided as the others are."""
        return is_sharded(p) and p.device_mesh == self.mesh and tuple(p.placements) == self.placements

    def owners(self, p: Tensor) -> Owners:
        """Which rows of p (entries, if it has one dimension) each process has."""
        if self.size == 1:
            return {0: None}
        total = len(p)
        each = -(-total // self.size)
        return {r: slice(min(r * each, total), min((r + 1) * each, total)) for r in range(self.size)}

    def sum(self, t: Tensor) -> Tensor:
        """The sum of `t` over the shards, in place; not-a-number anywhere is not-a-number everywhere.

        Replicas are averaged, so that they agree to the last bit although each group summed in an order of its own.
        """
        device = self.mesh.device_type
        x = t if t.device.type == device else t.to(device)  # state that is kept on the CPU, with a GPU's process group
        replicas = 1
        for d in [self.dim, *self._replicated]:
            if d is not None and self.mesh.size(d) > 1:
                dist.all_reduce(x, group=self.mesh.get_group(d))
                replicas *= self.mesh.size(d) if d != self.dim else 1
        if replicas > 1:
            x /= replicas
        return t if x is t else t.copy_(x)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set on any process."""
        return bool(self.sum(torch.tensor([float(flag)], device=device)).item())

    def gather(self, mine: object) -> list:
        """Everybody's object, shard by shard."""
        everybody = [mine]
        for d in [self.dim, *self._replicated]:
            if d is not None and self.mesh.size(d) > 1:
                parts = [None] * self.mesh.size(d)
                dist.all_gather_object(parts, everybody, group=self.mesh.get_group(d))
                everybody = [one for part in parts for one in part]
        return everybody

    def placed(self, dim: int) -> tuple:
        """The placements of a state tensor whose dimension `dim` is divided as the parameter's rows."""
        from torch.distributed.tensor import Replicate, Shard

        return tuple(Shard(dim) if d == self.dim else Replicate() for d in range(self.mesh.ndim))

    def whole(self, t: Tensor, dim: int, total: int) -> Tensor:
        """The DTensor of which `t` is this process's part: `total` long in dimension `dim`, which is divided."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size(total if d == dim else n for d, n in enumerate(t.shape))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(t, self.mesh, self.placed(dim), run_check=False, shape=shape, stride=stride)
