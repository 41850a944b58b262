"""memory_budget: chooses a window size, a rank or density, and formats that keep a model's state within a number of bytes.

The choice is a pure function of shapes and options, so that all processes and every restart choose the same:

1. at a window of 32 entries (or the class default, if that is less), the first formats of `_FORMATS` that fit;
2. then the longest window that fits, doubled up to the class default;
3. where the smallest formats do not fit at 32 entries: 16, 8; then less rank or density; then 4, 2, 1 entries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..options import OptionError

# The options that may be chosen. An option that the user gives stays as it is.
BUDGETED: tuple[str, ...] = ("window_size", "rank", "density", "window_dtype", "window_format", "error_dtype", "error_format")
_FORMATS = tuple(
    dict(zip(BUDGETED[3:], values, strict=True))
    for values in (
        (None, "plain", None, "plain"),
        (None, "plain", torch.bfloat16, "plain"),
        (torch.bfloat16, "plain", torch.bfloat16, "plain"),
        (None, "low_bit", None, "int8"),
        (None, "low_bit", None, "int4"),
    )
)
_FIRST_WINDOW = 32


def free_options(options: Any, given: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the options that the budget chooses: none without a budget. A given dtype settles the format too."""
    if options.memory_budget is None:
        return ()
    fixed = set(given) | {f"{kind}_format" for kind in ("window", "error") if given.get(f"{kind}_dtype") is not None}
    return tuple(f.name for f in dataclasses.fields(options) if f.name in BUDGETED and f.name not in fixed)


def choose(options: Any, free: tuple[str, ...], bytes_of: Callable[[Any], int]) -> tuple[Any, int]:
    """Choose the options that keep to `options.memory_budget`; give them and the bytes of their state.

    Args:
        options: of the optimizer; free ones have the defaults of the class.
        free: names of the options that may be chosen.
        bytes_of: options -> bytes of state.

    Raises:
        OptionError: even the smallest state is too large.
    """
    longest = options.window_size
    budget, first = options.memory_budget, min(_FIRST_WINDOW, longest)
    least = 0
    for candidate in candidates(options, free):
        size = bytes_of(candidate)
        least = min(size, least) if least else size
        if size > budget:
            continue
        while "window_size" in free and candidate.window_size >= first and candidate.window_size < longest:
            longer = dataclasses.replace(candidate, window_size=min(2 * candidate.window_size, longest))
            longer_size = bytes_of(longer)
            if longer_size > budget:
                break
            candidate, size = longer, longer_size
        return candidate, size
    fixed = ", ".join(f"{name}={getattr(options, name)}" for name in BUDGETED[:3] if hasattr(options, name) and name not in free)
    raise OptionError(
        f"memory_budget={shown(budget)} is too small: the least possible state of this model takes {least} bytes "
        f"({shown(least)})" + (f" with {fixed}" if fixed else "")
    )


def candidates(options: Any, free: tuple[str, ...]) -> Iterator[Any]:
    """Give the candidates in the order in which they are tried, each with the shortest window that is tried for it."""
    first = min(_FIRST_WINDOW, options.window_size)

    def changed(start: Any, **values: Any) -> Any:
        return dataclasses.replace(start, **{name: value for name, value in values.items() if name in free})

    smallest = None
    for formats in _FORMATS:
        for kind in ("window", "error"):
            if formats[f"{kind}_format"] != "plain" and f"{kind}_format" not in free:
                formats = {**formats, f"{kind}_dtype": torch.bfloat16}
        try:
            smallest = changed(options, window_size=first, **formats)
        except OptionError:  # a block_size that is too long for low-bit entries
            break
        yield smallest
    sizes = [m for m in (16, 8) if m < first]
    for m in sizes:
        yield changed(smallest, window_size=m)
    shortest = changed(smallest, window_size=min([first, *sizes]))
    for factor in (2, 4):
        less = {"rank": max(1, getattr(options, "rank", 1) // factor), "density": getattr(options, "density", 0.0) / factor}
        shortest = changed(shortest, **less)
        yield shortest
    for m in (4, 2, 1):
        yield changed(shortest, window_size=min(m, first))


def shown(size: float) -> str:
    """Write a number of bytes with a unit."""
    if size < 1024:
        return f"{size:.0f} bytes"
    power = min(3, int(math.log2(size) // 10))
    return f"{size / 1024**power:.2f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def described(options: Any) -> str:
    """Write the values of the options that a budget may choose."""
    values = {name: getattr(options, name, None) for name in BUDGETED}
    return ", ".join(f"{name}={str(v).removeprefix('torch.')}" for name, v in values.items() if v is not None)
