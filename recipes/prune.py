"""Prune a model by curvature, fine-tune what is left, and compare: magnitude, one-shot OBS, Iterative OBS, M-FAC's window.

    python recipes/prune.py
    python recipes/prune.py --task digits
    python recipes/prune.py --sparsity 0.8 --seeds 1 2 3 --finetune_steps 0 --output outputs/prune_seeds

Tasks, offline: `bbc` is the pretrained MiniLM-L6 BERT on BBC sentences by topic, `digits` a small vision transformer from scratch
on scikit-learn's digits. A dense model is trained once for each seed. Each method prunes a copy of it to each sparsity, and the
copy is fine-tuned while its zeros hold. Writes OUTPUT.json (every run), OUTPUT.md (means over seeds) and OUTPUT.png (accuracy
over sparsity). Runs that OUTPUT.json has already are not repeated.
"""

import argparse
import copy
import json
import os
import platform
import re
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ViTConfig, ViTForImageClassification

import hf_efcp
from hf_efcp import OptionError
from hf_efcp.demo.bbc import bbc_news, minilm_folder
from hf_efcp.options import unknown_name
from hf_efcp.pruning import prune
from hf_efcp.pruning.patterns import Pattern

# Name -> the options of `prune`.
METHODS = {
    "magnitude": {"method": "magnitude"},
    "one_shot": {"target": "layer", "iterations": 1},
    "iobs": {"target": "layer", "iterations": 3},
    "iobs_dense": {"target": "dense"},  # the default of `prune`
    "mfac": {"method": "mfac"},
    "banded": {"training": "banded"},
}
# Of a task: steps of the dense model and of fine-tuning, batch size, learning rate, rate of fine-tuning.
TASKS = {"bbc": (300, 60, 16, 1e-4, 1e-4), "digits": (400, 100, 64, 1e-3, 1e-3)}
COLOURS = dict(zip(METHODS, ("tab:gray", "tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple"), strict=True))
Batch = dict[str, torch.Tensor]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="bbc", help="model and data (default: bbc)")
    parser.add_argument("--methods", nargs="+", default=["magnitude", "one_shot", "iobs", "iobs_dense"], help=f"of {[*METHODS]}")
    parser.add_argument(
        "--sparsity", nargs="+", default=["0.5", "0.7", "0.8", "0.9", "2:4"], help="shares of zeros, or patterns N:M"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seed of data split, order, head and calibration")
    parser.add_argument("--optim", default="adamw", help="adamw, or a name of `hf-efcp list`")
    parser.add_argument("--train_steps", type=int, help="steps of the dense model (default: 300, digits 400)")
    parser.add_argument("--finetune_steps", type=int, help="steps after pruning (default: 60, digits 100); 0: none")
    parser.add_argument("--calibration_batches", type=int, default=16, help="batches of 32 training examples")
    parser.add_argument("--max_eval_samples", type=int, default=1000, help="test examples")
    parser.add_argument(
        "--layers", type=int, help="of task bbc: keep the first layers of MiniLM, out of 6, and freeze the embeddings"
    )
    parser.add_argument("--output", type=Path, help="path without suffix (default: outputs/prune_TASK)")
    return parser.parse_args(argv)


def bbc(seed: int, steps: int, batch: int, limit: int, layers: int | None = None) -> tuple[torch.nn.Module, Batch, Batch]:
    """MiniLM with a new head, sentences of at most 32 tokens to train on, and others to evaluate on."""
    data, tokenizer = bbc_news("sentences", seed=seed), AutoTokenizer.from_pretrained(minilm_folder())

    def encoded(rows, number: int) -> Batch:
        rows = rows.select(range(min(number, len(rows))))
        tokens = tokenizer(list(rows["text"]), truncation=True, max_length=32, padding="max_length", return_tensors="pt")
        return {**tokens, "labels": torch.tensor(rows["label"])}

    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=5, dtype=torch.float32)
    if layers is not None:
        model.bert.encoder.layer = model.bert.encoder.layer[:layers]
        model.bert.embeddings.requires_grad_(False)
    return model, encoded(data["train"], max(1000, steps * batch)), encoded(data["test"], limit)


def digits(seed: int, steps: int, batch: int, limit: int) -> tuple[torch.nn.Module, Batch, Batch]:
    """A vision transformer of four layers over patches of 2 x 2 pixels, images to train on (80%) and to evaluate on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise OptionError("--task digits needs scikit-learn: pip install scikit-learn") from None
    data = load_digits()
    pixels, labels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :][:limit]
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, **sizes, **dropout)
    parts = [{"pixel_values": pixels[part], "labels": labels[part]} for part in (train, test)]
    return ViTForImageClassification(config), *parts


def cut(data: Batch, rows: torch.Tensor) -> Batch:
    """Rows of the data; columns that are padding in all of them are left out."""
    batch = {name: column[rows] for name, column in data.items()}
    if "attention_mask" in batch:
        longest = int(batch["attention_mask"].sum(1).max())
        batch = {name: column[:, :longest] if column.ndim == 2 else column for name, column in batch.items()}
    return batch


def train(model, data: Batch, steps: int, batch: int, rate: float, seed: int, optim: str, masks=None) -> None:
    """Train with linear decay of the learning rate; zeros hold where there are masks."""
    if not steps:
        return
    torch.manual_seed(seed)
    if optim == "adamw":
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    else:
        optimizer = hf_efcp.create_optimizer(optim, model, lr=rate, preset="measured")
    if masks is not None:
        masks.hold(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    model.train()
    order = torch.cat([torch.randperm(len(data["labels"])) for _ in range(1 + steps * batch // len(data["labels"]))])
    for step in range(steps):
        optimizer.zero_grad()
        model(**cut(data, order[step * batch : (step + 1) * batch])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if masks is not None:
        masks.release()


@torch.no_grad()
def accuracy(model, data: Batch) -> float:
    """The share of examples whose class is predicted."""
    model.eval()
    right = 0
    for rows in torch.arange(len(data["labels"])).split(64):
        batch = cut(data, rows)
        right += int((model(**batch).logits.argmax(-1) == batch["labels"]).sum())
    return right / len(data["labels"])


def fits(method: str, sparsity: str) -> bool:
    """Whether the method can prune so: banded training has no patterns N:M."""
    return method != "banded" or ":" not in sparsity


def prune_and_finetune(dense, method: str, sparsity: str, seed: int, data: Batch, test: Batch, options) -> dict:
    """Prune a copy of the dense model, evaluate, fine-tune, evaluate; returns the figures of the run."""
    model, start = copy.deepcopy(dense), time.process_time()
    drawn = torch.randperm(len(data["labels"]), generator=torch.Generator().manual_seed(seed))
    calibration = [cut(data, rows) for rows in drawn[: 32 * options.calibration_batches].split(32)]
    share, pattern = (None, sparsity) if ":" in sparsity else (float(sparsity), "unstructured")
    masks = prune(model, calibration, share, pattern, **METHODS[method])
    seconds, before = time.process_time() - start, accuracy(model, test)
    _, _, batch, _, rate = TASKS[options.task]
    held = None if method == "banded" else masks  # its layers compute with zeros by themselves
    train(model, data, options.finetune_steps, batch, rate, seed + 1000, options.optim, held)
    masks = masks.finish() if method == "banded" else masks
    after = accuracy(model, test) if options.finetune_steps else None
    assert masks.are_zero()
    return {"method": method, "sparsity": sparsity, "seed": seed, "before": before, "after": after, "zeros": masks.sparsity(),
            "prune_cpu_seconds": seconds}  # fmt: skip


def cell(values: list[float]) -> str:
    """Mean and standard error in percent."""
    error = f" ± {100 * statistics.stdev(values) / len(values) ** 0.5:.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.2f}{error}" if values else ""


def table(results: dict, options, argv: list[str]) -> str:
    """The runs as a markdown table, with what is needed to repeat them."""
    dense = [results["dense"][str(seed)] for seed in options.seeds if str(seed) in results["dense"]]
    lines = [
        f"# Pruning: {options.output.name}",
        "",
        f"`{' '.join(['python', 'recipes/prune.py', *argv])}`",
        "",
        f"Task {options.task}, seeds {options.seeds}, dense model: {options.train_steps} steps of {options.optim}, accuracy "
        f"{cell(dense)} %. {options.finetune_steps} steps after pruning. At most {options.max_eval_samples} test examples, "
        f"{32 * options.calibration_batches} for calibration. {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"{torch.get_num_threads()} thread(s), Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, hf_efcp {hf_efcp.__version__}.",
        "",
        "| zeros | method | accuracy before fine-tuning, % | after, % | CPU seconds to prune |",
        "|---|---|---|---|---|",
    ]
    for sparsity in options.sparsity:
        for method in options.methods:
            runs = [r for r in results["runs"] if (r["method"], r["sparsity"]) == (method, sparsity)]
            runs = [r for r in runs if r["seed"] in options.seeds]
            if runs:
                after = [r["after"] for r in runs if r["after"] is not None]
                seconds = statistics.mean(r["prune_cpu_seconds"] for r in runs)
                lines.append(f"| {sparsity} | `{method}` | {cell([r['before'] for r in runs])} | {cell(after)} | {seconds:.1f} |")
    return "\n".join(lines) + "\n"


def plot(results: dict, options) -> None:
    """Draw accuracy over sparsity before and after fine-tuning, N:M patterns as crosses."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: pip install matplotlib")
        return
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(panels, ("before", "after"), strict=True):
        for method in options.methods:
            groups: dict[str, list[float]] = {}
            for r in results["runs"]:
                chosen = r["method"] == method and r["seed"] in options.seeds and r["sparsity"] in options.sparsity
                if chosen and r[name] is not None:
                    groups.setdefault(r["sparsity"], []).append(100 * r[name])
            shares = sorted((float(s), statistics.mean(v)) for s, v in groups.items() if ":" not in s)
            x, y = zip(*shares, strict=True) if shares else ((), ())
            hollow = {"linestyle": ":", "markerfacecolor": "none", "markersize": 8} if method == "banded" else {"markersize": 4}
            axes.plot(x, y, marker="o", label=method, color=COLOURS[method], **hollow)  # banded begins where magnitude does
            for s, v in groups.items():
                if ":" in s:
                    n, m = map(int, s.split(":"))
                    axes.plot([1 - n / m], [statistics.mean(v)], "x", color=COLOURS[method])
        dense = [value for seed, value in results["dense"].items() if int(seed) in options.seeds]
        axes.axhline(100 * statistics.mean(dense), color="black", linewidth=0.8, linestyle=":")
        axes.set(xlabel="share of zeros", title=f"{name} fine-tuning (dotted: dense; crosses: N:M)")
        axes.title.set_fontsize(9)
        axes.grid(alpha=0.25)
    panels[0].set(ylabel="test accuracy, %")
    panels[0].legend(frameon=False)
    figure.savefig(options.output.with_suffix(".png"), dpi=110)


def settings(options) -> dict:
    """What all runs of a file have in common."""
    return {k: v for k, v in vars(options).items() if k not in ("output", "seeds", "sparsity", "methods")}


def main(argv: list[str] | None = None) -> dict:
    """Make all runs that are missing; return them all."""
    options = parse_arguments(argv)
    argv = sys.argv[1:] if argv is None else argv
    for method in options.methods:
        if method not in METHODS:
            raise OptionError(unknown_name("method", method, METHODS, "--methods"))
    if options.optim != "adamw" and options.optim not in hf_efcp.list_optimizers():
        raise OptionError(unknown_name("optimizer", options.optim, ["adamw", *hf_efcp.list_optimizers()], "--optim"))
    for sparsity in options.sparsity:
        number = re.fullmatch(r"0?\.\d+", sparsity)
        Pattern.parse("unstructured" if number else sparsity).sparsity(float(sparsity) if number else None)
    for method, sparsity in [(m, s) for m in options.methods for s in options.sparsity if not fits(m, s)]:
        print(f"left out: {method} at {sparsity}, as banded training has no patterns")
    if options.layers is not None and (options.task != "bbc" or not 1 <= options.layers <= 6):
        raise OptionError(f"--layers {options.layers}: must be 1 to 6, with --task bbc")
    steps, finetune, batch, rate, _ = TASKS[options.task]
    options.train_steps = steps if options.train_steps is None else options.train_steps
    options.finetune_steps = finetune if options.finetune_steps is None else options.finetune_steps
    options.output = options.output or Path("outputs", f"prune_{options.task}")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    transformers.logging.set_verbosity_error()
    file = options.output.with_suffix(".json")
    results = json.loads(file.read_text()) if file.exists() else {"dense": {}, "runs": []}
    made_with = settings(options)
    if results["runs"] and results.get("settings") != made_with:
        changed = sorted(k for k in made_with if made_with[k] != results.get("settings", {}).get(k))
        raise OptionError(f"--output {options.output}: has runs with other {', '.join(changed)}; give another --output")
    results["settings"] = made_with
    done = {(r["method"], r["sparsity"], r["seed"]) for r in results["runs"]}
    for seed in options.seeds:
        wanted = [(m, s, seed) for s in options.sparsity for m in options.methods if fits(m, s) and (m, s, seed) not in done]
        if not wanted:
            continue
        sizes = seed, options.train_steps, batch, options.max_eval_samples
        dense, data, test = bbc(*sizes, options.layers) if options.task == "bbc" else digits(*sizes)
        train(dense, data, options.train_steps, batch, rate, seed, options.optim)
        results["dense"][str(seed)] = accuracy(dense, test)
        for method, sparsity, _ in wanted:
            results["runs"].append(prune_and_finetune(dense, method, sparsity, seed, data, test, options))
            print(results["runs"][-1], flush=True)
            file.write_text(json.dumps(results, indent=1))
    options.output.with_suffix(".md").write_text(table(results, options, argv))
    plot(results, options)
    print(table(results, options, argv))
    return results


if __name__ == "__main__":
    try:
        main()
    except OptionError as error:
        sys.exit(f"error: {error}")
