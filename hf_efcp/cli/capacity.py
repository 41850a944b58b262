"""`hf-efcp capacity`: what a number format or a compressed model is worth in parameters, before anything is trained."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.capacity import FITS, Fit, capacity, effective_bits, ideal, sparse
from ..core.cells import Layout
from ..engine.formats import LowRankFormat
from ..options import OptionError, unknown_name
from ..registry import get_optimizer_info
from ..report import figures
from .common import check_integers, check_plot, gibibytes, table, write_json
from .formats import SHOWN, Format, described, parse

NOTE = (
    "Gaussian capacity (indicative): from the error on standard normal numbers. The law was fitted to weights and\n"
    "activations that a model is trained with. Only ratios tell: the published fits have large errors."
)
_OF_STATES = "For states of optimizers, which have error feedback, the law was not fitted."
LEAST_SAMPLES = 10_000


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = commands.add_parser(
        "capacity",
        help="print what a number format or a compressed model is worth in parameters",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Prints what formats of numbers are worth: the part of a model's parameters that a smaller model without\n"
        "compression would need for the same loss (arXiv 2506.01863).\n\nFormats:\n" + described(),
    )
    parser.set_defaults(handler=run)
    parser.add_argument(
        "formats", metavar="FORMAT", nargs="*", help="names of formats, which --help lists (default: a selection of them)"
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="also a saved model: its quantization from config.json, its zeros from the .safetensors files",
    )
    parser.add_argument("--fit", default="llama", help="the published constants to take: llama (default) or olmo2")
    parser.add_argument(
        "--samples", type=int, default=1_000_000, help="number of random numbers where a format is sampled (default 1000000)"
    )
    parser.add_argument("--json", metavar="FILE", help="also write all figures to this file")
    parser.add_argument(
        "--plot", metavar="FILE", help="also draw capacity over bits into this file: .png, .svg or .pdf. This needs matplotlib"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status. Raises OptionError for bad input."""
    check_integers(args, samples=LEAST_SAMPLES)
    check_plot(args.plot)
    fit = fit_of(args.fit)
    names = args.formats or ([] if args.model else SHOWN)
    found = [parse(name, args.samples) for name in names]
    result: dict[str, Any] = {"fit": args.fit, "samples": args.samples, "formats": [as_json(f, fit) for f in found]}
    lines = [table([_HEAD, *(_row(f, fit) for f in found)])] if found else []
    if args.model:
        result["model"] = of_model(args.model, fit, args.samples)
        lines += [*([""] if lines else []), *_said_of_model(result["model"])]
    write_json(args.json, result)
    if args.plot:
        figures.save(_drawn(found, fit), args.plot)
    print("\n".join([*lines, "", NOTE]))
    return 0


def fit_of(name: str) -> Fit:
    """Constants by name; raises OptionError."""
    if name not in FITS:
        raise OptionError(unknown_name("fit", name, FITS))
    return FITS[name]


_HEAD = ("format", "bits per number", "GMSE", "s.e.", "effective bits", "capacity", "s.e.")


def as_json(found: Format, fit: Fit) -> dict[str, Any]:
    """All figures of a format, by name."""
    gmse = found.gmse
    return {
        "format": found.name,
        "bits": found.bits,
        "gmse": None if gmse is None else gmse.value,
        "gmse_error": None if gmse is None else gmse.error,
        "effective_bits": None if gmse is None else effective_bits(gmse.value),
        "capacity": found.capacity(fit),
        "capacity_error": found.capacity_error(fit),
        "parts": [as_json(part, fit) for part in found.parts],
    }


def _row(found: Format, fit: Fit) -> tuple[str, ...]:
    f = as_json(found, fit)
    error = f"{f['capacity_error']:.0e}" if f["capacity_error"] else "0"
    if f["gmse"] is None:
        return found.name, f"{found.bits:.3g}", "product", "", "", f"{f['capacity']:.3f}", error
    gmse_error = f"{f['gmse_error']:.0e}" if f["gmse_error"] else "0"
    return (
        *(found.name, f"{found.bits:.3g}", f"{f['gmse']:.3g}", gmse_error, f"{f['effective_bits']:.2f}"),
        *(f"{f['capacity']:.3f}", error),
    )


# A saved model ---------------------------------------------------------------------------------------------------------------


def of_model(folder: str, fit: Fit, samples: int) -> dict[str, Any]:
    """The capacity of a saved model: of the format that its configuration names, times that of its zeros.

    Args:
        folder: with config.json, and .safetensors files for the zeros.
        fit: the constants.
        samples: as of `parse`.

    Returns:
        "quantization" (a format or None), "parameters" of its matrices, "zeros" (the part of them), "capacity" (mean over
        parameters).

    Raises:
        OptionError: no configuration, no matrix, or a quantization that is not known here.
    """
    place = Path(folder)
    try:
        config = json.loads((place / "config.json").read_text())
    except (OSError, ValueError):
        raise OptionError(f"model={folder!r}: must be a folder with a config.json") from None
    name = _quantization(config.get("quantization_config") or {})
    quantized = parse(name, samples).capacity(fit) if name else 1.0
    total = zeros = 0
    weighed = 0.0
    for count, none, codes in _matrices(place, name):
        total, zeros = total + count, zeros + none
        if codes:
            weighed += count * quantized
        else:
            weighed += count * (fit.L if none == 0 else capacity(sparse(none / count).value, fit))
    if not total:
        raise OptionError(f"model={folder!r}: its .safetensors files hold no matrix")
    return {"folder": folder, "quantization": name, "parameters": total, "zeros": zeros / total, "capacity": weighed / total}


# What quantized layers store beside their codes.
_BESIDE = ("scales", "qzeros", "g_idx", "absmax", "quant_map", "nested_absmax", "nested_quant_map", "position_ids", "SCB")


def _matrices(folder: Path, quantization: str | None) -> Iterator[tuple[int, int, bool]]:
    """Size in parameters, number of zeros, and whether it is quantized, of every matrix; codes are not looked into.

    GPTQ and AWQ pack their codes into integers of 32 bits, and bitsandbytes packs two of 4 bits into a byte.
    """
    from safetensors import safe_open

    bits = 8
    if quantization is not None and (found := re.match(r"minmax(\d+)=", quantization)):
        bits = int(found[1])
    elif quantization is not None and quantization.endswith("=64"):
        bits = 4

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name)
                if tensor.ndim < 2 or name.rpartition(".")[2] in _BESIDE:
                    continue
                if tensor.is_floating_point() and tensor.element_size() > 1:
                    yield tensor.numel(), int((tensor == 0).sum()), False
                else:
                    yield tensor.numel() * 8 * tensor.element_size() // bits, 0, True


def _quantization(config: dict[str, Any]) -> str | None:
    """The format that a `quantization_config` names; None: there is none."""
    if not config:
        return None
    method, bits, group = config.get("quant_method"), config.get("bits"), config.get("group_size")
    if method == "bitsandbytes" or config.get("load_in_4bit") or config.get("load_in_8bit"):
        return f"{config.get('bnb_4bit_quant_type', 'fp4')}=64" if config.get("load_in_4bit") else "window_int8"
    if method in ("gptq", "awq", "auto-round") and bits:
        return f"minmax{bits}={group if group and group > 0 else 4096}"
    raise OptionError(f"quantization_config: {method!r} is not known here; name its format, as in `hf-efcp capacity int4`")


def _said_of_model(found: dict[str, Any]) -> list[str]:
    kind = found["quantization"] or "no quantization"
    return [
        f"{found['folder']}: {found['parameters']:,} parameters in matrices, {kind}, {found['zeros']:.1%} zeros",
        f"capacity {found['capacity']:.3f}: worth {round(found['capacity'] * found['parameters']):,} parameters",
    ]


# States of optimizers --------------------------------------------------------------------------------------------------------


def of_optimizer(name: str, options: dict[str, Any], shape: Sequence[int]) -> list[tuple[str, str]]:
    """What an optimizer keeps in a format of its own: state kind, as `memory_footprint` has it, and format.

    Args:
        name: as registered.
        options: as the command has them.
        shape: of the matrix that stands for all.
    """
    info = get_optimizer_info(name)
    merged = info.merged(options)
    parts = []
    if info.windowed or info.family == "microadam":
        low_bit = getattr(merged, "window_format", None) == "low_bit"
        values = _dtype(getattr(merged, "window_dtype", None))
        if info.compression == "sparse":
            density = getattr(merged, "density", 0.01)
            parts.append(("window", f"low_bit_top={density:g}" if low_bit else f"top={density:g}*{values}"))
        elif info.compression == "low rank":
            form = LowRankFormat(Layout(shape[0], shape[1], torch.float32), merged)
            factors = "window_int8" if low_bit else values
            stored = f"rank={form.rank}/{shape[0]}x{shape[1]}*" if form.pays() else ""  # else whole
            parts.append(("window", stored + factors))
        else:
            parts.append(("window", "window_int8" if low_bit else values))
    if "error_format" in info.options():
        plain = merged.error_format == "plain"
        error = _dtype(merged.error_dtype) if plain else f"error_{merged.error_format}"
        parts.append(("residual" if getattr(merged, "residual", "") == "momentum" else "error", error))
    return parts


def _dtype(dtype: torch.dtype | None) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype or torch.float32, "fp32")


def beside_bytes(entries: dict[str, Any], shape: Sequence[int], count: int, samples: int = 200_000) -> list[dict[str, Any]]:
    """What each optimizer's window and error are worth, beside their bytes.

    Args:
        entries: "optimizers" of an estimate.
        shape: of the matrices that hold most parameters.
        count: of parameters.
        samples: as of `parse`.
    """
    fit, rows = FITS["llama"], []
    known: dict[str, Format] = {}
    for name, entry in entries.items():
        if "refused" in entry or not entry["options"]:
            continue
        for kind, text in of_optimizer(name, entry["options"], shape):
            if kind in entry["bytes"]:
                if text not in known:
                    known[text] = parse(text, samples)
                bytes_ = entry["bytes"][kind]
                rows.append(
                    {
                        "optimizer": name,
                        "state": kind,
                        "format": text,
                        "bytes": bytes_,
                        "bytes_per_parameter": bytes_ / count,
                        "capacity": known[text].capacity(fit),
                    }
                )
    return rows


def shown_beside_bytes(rows: list[dict[str, Any]]) -> list[str]:
    """The lines of `hf-efcp estimate --capacity`."""
    head = ("optimizer", "state", "format", "total", "bytes per parameter", "Gaussian capacity of an entry")
    cells = [
        (*(r[key] for key in ("optimizer", "state", "format")), gibibytes(r["bytes"]), f"{r['bytes_per_parameter']:.2f}",
         f"{r['capacity']:.3g}") for r in rows
    ]  # fmt: skip
    return ["", table([head, *cells]), "", NOTE, _OF_STATES]


# The plot --------------------------------------------------------------------------------------------------------------------


def _drawn(found: Sequence[Format], fit: Fit) -> Any:
    """Capacity over bits, one point a format, and the curve of the ideal code."""
    ink, colours = figures.ON_WHITE
    made, axes = figures.blank(7.0, 4.4, 11.0, ink)
    bits = [2 ** (i / 10) for i in range(-20, 51)]
    curve = [capacity(ideal(b).value, fit) for b in bits]
    axes.plot(bits, curve, color=colours[7], linestyle="--", linewidth=1.2, label="ideal code")
    kinds = {"quantized": 0, "sparse or low rank": 2, "both": 1}
    axes.set_xlim(0.11, 48)
    axes.set_ylim(-0.09, 1.09)
    places = _Places()
    for f in sorted(found, key=lambda f: -f.capacity(fit)):
        x, y, kind = max(f.bits, 0.15), f.capacity(fit), _kind(f)
        axes.plot([x], [y], "o", color=colours[kinds[kind]], markersize=5, label=kind)
        dx, dy = places.beside(math.log2(x) * 49, y * 210, f.name)
        axes.annotate(f.name, (x, y), textcoords="offset points", xytext=(dx, dy), fontsize=7.5, color=ink)
    axes.set_xscale("log", base=2)
    ticks = [0.25, 0.5, 1, 2, 4, 8, 16, 32]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("bits per number, with scales and indices")
    axes.set_ylabel("capacity")
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    made.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4, frameon=False, labelcolor=ink)
    return made


class _Places:
    """Places of labels, in points, which do not lie on one another as far as that is possible."""

    def __init__(self) -> None:
        self.taken: list[tuple[float, float, float]] = []  # left, right, bottom

    def beside(self, x: float, y: float, label: str) -> tuple[float, float]:
        """Give the offset of a label from its dot: to the right or the left, higher or lower."""
        width = 4.4 * len(label)
        offsets = [(dx, dy) for near in ((-3, 6, -12), (-21, 15, -30)) for dx in (6, -6 - width) for dy in near]
        dx, dy = next((o for o in offsets if self._free(x + o[0], x + o[0] + width, y + o[1])), offsets[0])
        self.taken += [(x + dx, x + dx + width, y + dy), (x - 3, x + 3, y - 3)]
        return dx, dy

    def _free(self, left: float, right: float, bottom: float) -> bool:
        return not any(left < b and a < right and abs(bottom - low) < 8 for a, b, low in self.taken)


def _kind(found: Format) -> str:
    if found.parts:
        return "both"
    few = re.match(r"\d|sparse|top|low_bit|rank", found.name)
    return "sparse or low rank" if few else "quantized"
