"""`bench --sweep`: is the cost linear in d, the number of parameters, and in m, the window size? As JSON and as a plot."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

from ..cli.common import chosen, table, write_json
from ..cli.shapes import module
from ..options import OptionError
from ..registry import get_optimizer_info

# d is made of matrices of this size, so that only their number changes.
_SIDE = 1024
_DEFAULT = "efcp_lowrank_mfac,efcp_sparse_mfac"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The sweep's flags."""
    parser.add_argument(
        "--sweep", action="store_true", help="measure every number of parameters with every window size, instead of a model"
    )
    parser.add_argument(
        "--sweep_parameters",
        default="1e6,4e6,16e6",
        help="the numbers of parameters, in matrices of 1024 x 1024 (default: 1e6,4e6,16e6)",
    )
    parser.add_argument("--sweep_windows", default="32,128,512", help="the window sizes (default: 32,128,512)")
    parser.add_argument("--quick", action="store_true", help=argparse.SUPPRESS)


def sweep(args: argparse.Namespace, bench: Callable[..., dict[str, Any]], dtype: torch.dtype) -> dict[str, Any]:
    """Measure all pairs (d, m), print a table, and draw it if asked to.

    Args:
        args: the command's.
        bench: of a model and optimizers.
        dtype: of the parameters.

    Returns:
        "points" (optimizer, parameters, window_size, step_ms, roofline_ms, ratio), "exponents" of the steepest growth, and what
        the last measurement says of the machine.
    """
    sizes, windows = _numbers("sweep_parameters", args.sweep_parameters), _numbers("sweep_windows", args.sweep_windows)
    optimizers = chosen(args.optim or _DEFAULT, args.optim_args)
    if args.model is not None:
        raise OptionError(f"model {args.model!r}: a --sweep has shapes of its own")
    points, skipped, last = [], [], {}
    for size in sizes:
        for window in windows:
            number = max(1, round(size / _SIDE**2))
            model = module({f"{i}.weight": (_SIDE, _SIDE) for i in range(number)}, dtype)
            last = bench(model, {name: _with_window(name, options, window) for name, options in optimizers.items()})
            skipped += [f"d={last['parameters']}, m={window}: {n}: {why}" for n, why in last["skipped"].items()]
            for name, e in last["optimizers"].items():
                point = {"optimizer": name, "parameters": last["parameters"], "window_size": window, "step_ms": e["step_ms"]}
                points.append({**point, "roofline_ms": e["roofline"]["ms"], "ratio": e["ratio"]})
            write_json(args.json, {"points": points})  # if the rest is not waited for
            if last["cut_short"]:
                raise KeyboardInterrupt
    result = {
        "points": points,
        "exponents": {name: {by: _exponent(points, name, by) for by in ("parameters", "window_size")} for name in optimizers},
        "skipped": skipped,
        **{key: last[key] for key in ("dtype", "device", "machine", "versions", "rates")},
    }
    rows = [("optimizer", "parameters", "window", "step ms", "roofline ms", "ratio")]
    for p in points:
        cells = f"{p['parameters']:,}", str(p["window_size"]), f"{p['step_ms']['median']:.3g}", f"{p['roofline_ms']:.3g}"
        rows.append((p["optimizer"], *cells, f"{p['ratio']:.2f}"))
    print(table(rows))
    for name, by in result["exponents"].items():
        shown = ", ".join(f"{symbol}^{by[key]:.2f}" for symbol, key in (("d", "parameters"), ("m", "window_size")) if by[key])
        print(f"{name}: time grows like {shown}" if shown else "")
    if args.plot:
        _draw(result, args.plot)
    return result


def _with_window(name: str, options: dict[str, Any], window: int) -> dict[str, Any]:
    """The options with this window size; as they are for a method without a window, whose time should not depend on m."""
    return {**options, "window_size": window} if get_optimizer_info(name).windowed else options


def _numbers(name: str, text: str) -> list[int]:
    try:
        values = [int(float(part)) for part in text.split(",") if part.strip()]
        if values and min(values) >= 1:
            return sorted(set(values))
    except (ValueError, OverflowError):
        pass
    raise OptionError(f"{name}={text!r}: must be numbers >= 1 with commas between them")


def _exponent(points: list[dict[str, Any]], name: str, by: str) -> float | None:
    """x in time ~ by^x, from the least to the most, where the other one is largest (fixed costs weigh least); None: one value."""
    other = "window_size" if by == "parameters" else "parameters"
    mine = [p for p in points if p["optimizer"] == name]
    most = max((p[other] for p in mine), default=0)
    line = sorted((p for p in mine if p[other] == most), key=lambda p: p[by])
    if len(line) < 2:
        return None
    xs, ys = (torch.tensor([f(p) for p in line], dtype=torch.float64).log() for f in (lambda p: p[by], _median))
    xs = xs - xs.mean()
    return float((xs * ys).sum() / xs.square().sum())


def _median(point: dict[str, Any]) -> float:
    return point["step_ms"]["median"]


def _draw(result: dict[str, Any], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["exponents"])
    figure, axes = pyplot.subplots(len(names), 2, figsize=(10, 4 * len(names)), squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for axis, by, other, symbol in (
            (row[0], "parameters", "window_size", "m"),
            (row[1], "window_size", "parameters", "d"),
        ):
            mine = [p for p in result["points"] if p["optimizer"] == name]
            for value in sorted({p[other] for p in mine}):
                line = sorted((p for p in mine if p[other] == value), key=lambda p: p[by])
                xs = [p[by] for p in line]
                (drawn,) = axis.plot(xs, [_median(p) for p in line], "o-", label=f"{symbol} = {value:,}")
                axis.plot(xs, [p["roofline_ms"] for p in line], ":", color=drawn.get_color())
            axis.set(xscale="log", yscale="log", xlabel=by.replace("_", " "), ylabel="ms per step", title=name)
            axis.legend()
            axis.grid(alpha=0.3)
    machine = result["machine"]
    figure.suptitle(f"Step (points) and roofline (dotted): {machine.get('gpu', machine['cpu'])}, torch {machine['torch']}")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
