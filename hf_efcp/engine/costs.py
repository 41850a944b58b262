"""What a step must do, counted: see docs/benchmarks/roofline.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass
class Count:
    """Operations by precision, and bytes, of one phase."""

    fp32: float = 0.0
    fp64: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.fp32 + other.fp32, self.fp64 + other.fp64, self.bytes + other.bytes)

    def seconds(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Give the time of the operations and of the bytes at a machine's rates (operations and bytes per second)."""
        compute = self.fp32 / rates["fp32_flops"] + self.fp64 / rates["fp64_flops"]
        return {"compute": compute, "memory": self.bytes / rates["bandwidth"]}
