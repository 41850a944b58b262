"""Does capacity rank number formats as training does? Small networks on scikit-learn's digits, trained in every format.

    python recipes/capacity.py

A network of three matrices trains with its weights in a format (gradients pass the format unchanged), and without compression at
several widths. The widths give the loss over the number of weights, and so the number of weights that a format is worth. Writes
OUTPUT.json, OUTPUT.md with predicted and measured capacity, and OUTPUT.png.
"""

import argparse
import itertools
import json
import math
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from hf_efcp.cli.formats import parse
from hf_efcp.core.banded import banded
from hf_efcp.core.capacity import FITS, at_best_scale

FORMATS = ("int8", "int6", "int4", "int3", "int2", "int1", "sparse=0.5", "sparse=0.75", "sparse=0.9", "2:4", "2:4*int4")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), help="intN, sparse=S, N:M, or two of them with * between")
    parser.add_argument("--width", type=int, default=12, help="of the networks that are trained in a format")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 10, 12], help="of those without compression")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--learning_rate", type=float, default=5e-3, help="of AdamW, with cosine decay")
    parser.add_argument(
        "--band", type=float, default=0.2, help="p of banded training, which sparse formats are also trained with"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs/capacity"), help="path without suffix")
    return parser.parse_args(argv)


def compress(w: Tensor, name: str) -> Tensor:
    """A matrix in a format, with the scale that is best for normal numbers of its size."""
    for part in name.split("*"):
        if part.startswith("int"):
            levels = (LEVELS[part] * w[w != 0].square().mean().sqrt()).to(w.dtype)
            nearest = levels[torch.bucketize(w, (levels[1:] + levels[:-1]) / 2)]
            w = torch.where(w == 0, 0.0, nearest)
        elif part[:7] == "sparse=":
            kept = max(1, round((1 - float(part[7:])) * w.numel()))
            w = w * (w.abs() >= w.abs().flatten().kthvalue(w.numel() - kept + 1).values)
        else:
            n, m = map(int, part.split(":"))
            if w.shape[1] % m:
                raise ValueError(f"{part}: the {w.shape[1]} columns are no multiple of {m}")
            groups = w.view(-1, m)
            w = torch.zeros_like(groups).scatter(1, (top := groups.abs().topk(n, 1).indices), groups.gather(1, top)).view_as(w)
    return w


LEVELS = {f"int{b}": at_best_scale(torch.arange(2**b, dtype=torch.float64) - (2**b - 1) / 2) for b in range(1, 9)}


def train(name: str, width: int, band: float | None, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train once; return the loss on the training images and the accuracy on the others."""
    torch.manual_seed(seed)
    digits = load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 8 - 0.6, torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    held, used = order[:360], order[360:]
    sizes = [64, width, width, 10]
    weights = [nn.Parameter(torch.randn(b, a) / math.sqrt(a)) for a, b in itertools.pairwise(sizes)]
    biases = [nn.Parameter(torch.zeros(b)) for b in sizes[1:]]
    optimizer = torch.optim.AdamW([*weights, *biases], options.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)

    def logits(x: Tensor) -> Tensor:
        for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
            if name[:7] == "sparse=" and band is not None:
                w = banded(w, 1 - float(name[7:]), p=band)
            elif name:
                w = w + (compress(w.detach(), name) - w).detach()
            x = functional.linear(torch.relu(x) if i else x, w, b)
        return x

    for _ in range(options.steps):
        batch = used[torch.randint(len(used), (128,))]
        optimizer.zero_grad()
        functional.cross_entropy(logits(pixels[batch]), labels[batch]).backward()
        optimizer.step()
        decay.step()
    with torch.no_grad():
        loss = functional.cross_entropy(logits(pixels[used]), labels[used])
        right = (logits(pixels[held]).argmax(1) == labels[held]).double().mean()
    return {"loss": float(loss), "accuracy": 100 * float(right), "weights": sum(w.numel() for w in weights)}


def worth(loss: float, dense: list[tuple[int, float]]) -> float:
    """The number of weights at which training without compression has this loss, between the measured ones in logarithms."""
    for (n, a), (m, b) in itertools.pairwise(dense):
        if a >= loss >= b:
            share = (math.log(a) - math.log(loss)) / (math.log(a) - math.log(b))
            return math.exp(math.log(n) + share * (math.log(m) - math.log(n)))
    return dense[-1][0] if loss < dense[-1][1] else dense[0][0]


def rank_correlation(x: list[float], y: list[float]) -> float:
    """Spearman's: the correlation of the places."""
    places = [[sorted(v).index(value) for value in v] for v in (x, y)]
    return statistics.correlation(*places) if len(set(x)) > 1 and len(set(y)) > 1 else float("nan")


def mean_and_error(values: list[float]) -> str:
    """As "0.52 ± 0.01"."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.3g} ± {float(f'{error:.1g}'):g}"


def report(rows: list[dict], dense: dict[int, list[dict]], seconds: float, options: argparse.Namespace) -> str:
    """The runs as a page, with what is needed to repeat them."""
    plain = [r for r in rows if not r["banded"]]
    predicted, measured = [r["predicted"] for r in plain], [r["measured"] for r in plain]
    accuracies = [statistics.mean(run["accuracy"] for run in r["runs"]) for r in plain]
    lines = [
        "# Capacity: predicted and measured",
        "",
        f"`{' '.join(['python recipes/capacity.py', *sys.argv[1:]])}`",
        "",
        f"Networks 64-{options.width}-{options.width}-10 on scikit-learn's digits (1437 images to train on, 360 others), "
        f"{options.steps} steps at batch 128, AdamW at {options.learning_rate:g}, {len(options.seeds)} seeds. "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s), {seconds / 60:.1f} minutes of "
        f"CPU time, Python {platform.python_version()}, torch {torch.__version__}.",
        "",
        "Predicted: `hf-efcp capacity`, the fit of LLaMA models. Measured: the number of weights of the uncompressed network "
        "with the same training loss, over the number of weights. `band`: trained by `hf_efcp.core.banded`. Losses and "
        "accuracies are means over the seeds ± standard errors.",
        "",
        "| format | predicted | measured | training loss | accuracy, % |",
        "|---|---|---|---|---|",
    ]
    for r in sorted(rows, key=lambda r: -r["predicted"]):
        losses, right = ([run[key] for run in r["runs"]] for key in ("loss", "accuracy"))
        name = f"`{r['format']}`" + (f", band p={options.band}" if r["banded"] else "")
        cells = f"{r['predicted']:.3f} | {r['measured']:.2f} | {mean_and_error(losses)} | {mean_and_error(right)}"
        lines.append(f"| {name} | {cells} |")
    lines += [
        "",
        f"Rank correlation (Spearman) of predicted capacity with measured capacity: {rank_correlation(predicted, measured):.2f}; "
        f"with accuracy: {rank_correlation(predicted, accuracies):.2f} ({len(plain)} formats, without those with a band).",
        "",
        "Without compression, at the widths of the two hidden layers:",
        "",
        "| width | weights | training loss | accuracy, % |",
        "|---|---|---|---|",
    ]
    for width, runs in dense.items():
        losses, right = ([run[key] for run in runs] for key in ("loss", "accuracy"))
        lines.append(f"| {width} | {runs[0]['weights']} | {mean_and_error(losses)} | {mean_and_error(right)} |")
    return "\n".join(lines) + "\n"


def draw(rows: list[dict], file: Path) -> None:
    """Measured over predicted capacity, as a .png file, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(5.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], "--", color="#8a94a3", linewidth=1)
    for r in rows:
        axes.plot([r["predicted"]], [r["measured"]], "s" if r["banded"] else "o", color="#c2410c" if r["banded"] else "#1f6fb4")
        if not r["banded"]:
            place = (r["predicted"], r["measured"])
            axes.annotate(r["format"], place, textcoords="offset points", xytext=(5, -9), fontsize=8)
    axes.set_xlabel("predicted capacity")
    axes.set_ylabel("measured capacity (squares: trained with a band)")
    axes.grid(alpha=0.2)
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> list[dict]:
    """Train everything; return a row for each format."""
    options = parse_arguments(argv)
    start = time.process_time()
    predicted = {name: parse(name, 200_000).capacity(FITS["llama"]) for name in options.formats}  # raises for a bad name
    unknown = [n for n in options.formats if any(p[:3] != "int" and p[:7] != "sparse=" and ":" not in p for p in n.split("*"))]
    if unknown:
        sys.exit(f"error: --formats {unknown[0]}: this recipe trains intN, sparse=S and N:M")
    dense = {w: [train("", w, None, seed, options) for seed in options.seeds] for w in sorted({*options.widths, options.width})}
    curve = [(runs[0]["weights"], statistics.mean(run["loss"] for run in runs)) for runs in dense.values()]
    rows = []
    for name in options.formats:
        for band in (None, options.band) if name[:7] == "sparse=" and "*" not in name else (None,):
            runs = [train(name, options.width, band, seed, options) for seed in options.seeds]
            found = worth(statistics.mean(run["loss"] for run in runs), curve) / runs[0]["weights"]
            row = {"format": name, "banded": band is not None, "predicted": predicted[name], "measured": found}
            print(row, flush=True)
            rows.append(row | {"runs": runs})
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_suffix(".json").write_text(json.dumps({"dense": dense, "formats": rows}, indent=1) + "\n")
    text = report(rows, dense, time.process_time() - start, options)
    options.output.with_suffix(".md").write_text(text)
    draw(rows, options.output.with_suffix(".png"))
    print(text)
    return rows


if __name__ == "__main__":
    main()
