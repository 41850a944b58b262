"""Checksums of tensors, which show a bit that flips on a disk, or lost bytes, when a checkpoint is read.

A tensor's bytes are taken as words of 64 bits, filled up with zeros. Words are summed in blocks of 512 bytes, and block k counts
2 k + 1 times, all modulo 2^64. A word that changes changes the sum, and so do two blocks that change places. A checksum is
computed on the tensor's device, as fast as the tensor can be read. It is no protection against an attacker, who can write the
checksum too.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WORDS = 64
_BYTES = 8 * _WORDS


def checksum(t: Tensor) -> int:
    """Give the checksum of a tensor."""
    return int(checksums(t[None]))


def checksums(batch: Tensor) -> Tensor:
    """Give the checksum of each of n tensors, (n,) int64 on their device."""
    n = len(batch)
    if not batch.numel():
        return torch.zeros(n, dtype=torch.int64, device=batch.device)
    data = batch.detach().reshape(n, -1).contiguous()
    if data.nbytes % (n * _BYTES):
        data = data.view(torch.uint8)
        data = torch.nn.functional.pad(data, (0, -data.shape[1] % _BYTES))
    elif data.storage_offset() * data.element_size() % 8:
        data = data.clone()
    sums = data.view(torch.int64).view(n, -1, _WORDS).sum(2)
    return sums.mul_(torch.arange(1, 2 * sums.shape[1], 2, device=sums.device)).sum(1)
