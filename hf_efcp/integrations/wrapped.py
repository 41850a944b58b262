"""The figures of our optimizer, if Accelerate has wrapped it."""

from __future__ import annotations

from typing import Any

from .checkpoints import unwrapped

# The methods that a wrapped optimizer passes on to ours.
_METHODS = ("memory_footprint", "diagnostics", "probe_next_step")


def diagnostics(optimizer: Any, prefix: str = "efcp_") -> dict[str, float]:
    """Give the figures of the last step, for `accelerator.log` and the like. A probed step has more figures.

    Args:
        optimizer: one of ours, or Accelerate's wrapper of it; any other optimizer has no figures.
        prefix: of all names.
    """
    ours = unwrapped(optimizer)
    return {} if ours is None else {prefix + name: value for name, value in ours.diagnostics().items()}


def answering(wrapper: Any) -> Any:
    """Change Accelerate's `AcceleratedOptimizer` so that it has the figures of our optimizer inside."""

    def __getattr__(self: Any, name: str) -> Any:
        if name in _METHODS and (ours := unwrapped(self.__dict__.get("optimizer"))) is not None:
            return getattr(ours, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    wrapper.__getattr__ = __getattr__
    return wrapper
