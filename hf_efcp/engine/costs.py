"""The least that a phase of the step must do: operations and bytes, for the roofline (docs/benchmarks/roofline.md)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass
class Count:
    """Lower bounds of one phase.

    Attributes:
        fp32: operations in single precision; an addition or a multiplication is one.
        fp64: operations in double precision.
        bytes: bytes read plus bytes written.
    """

    fp32: float = 0.0
    fp64: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Count) -> Count:
        return Count(self.fp32 + other.fp32, self.fp64 + other.fp64, self.bytes + other.bytes)

    def seconds(self, rates: Mapping[str, float]) -> dict[str, float]:
        """Give the seconds of the operations ("compute") and of the bytes ("memory").

        Args:
            rates: of the machine, per second: "fp32_flops", "fp64_flops" and "bandwidth" (bytes).
        """
        compute = self.fp32 / rates["fp32_flops"] + self.fp64 / rates["fp64_flops"]
        return {"compute": compute, "memory": self.bytes / rates["bandwidth"]}
