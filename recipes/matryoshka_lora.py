"""One LoRA adapter for every rank, against an adapter trained for each rank, and against DyLoRA: accuracy over rank.

    python recipes/matryoshka_lora.py
    python recipes/matryoshka_lora.py --task sentences --learning_rates 2e-3 --ranks 1 2 4 8

A pretrained model adapts to a new task, and only the adapters train. For each seed MatryoshkaLoRA and DyLoRA train once, and
plain LoRA trains once for each rank. Then every adapter is evaluated at its ranks. Each method and rank has its best learning
rate, chosen on validation data; an adapter that is trained once has one learning rate for all ranks. Writes OUTPUT.json (every
run), OUTPUT.md (accuracies, AURAC, differences) and OUTPUT.png. Runs that OUTPUT.json has already are not repeated.

digits: a network that knows scikit-learn's digits upright adapts to digits that lie on their side. sentences: the first layers of
the pretrained MiniLM-L6 BERT, with a fitted head, classify sentences of BBC News.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoModel, AutoTokenizer

from hf_efcp.demo.bbc import bbc_news, minilm_folder
from hf_efcp.matryoshka import MatryoshkaConfig, at_rank, aurac

TOPICS = 5


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=["digits", "sentences"], default="digits")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="ranks to train for and to evaluate at")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of data split, order and adapters")
    parser.add_argument("--rank_scale", default="sqrt", help="none, sqrt or rank")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-2, 3e-2, 1e-1], help="of AdamW, with linear decay")
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_seq_length", type=int, default=32, help="of sentences")
    parser.add_argument("--layers", type=int, default=2, help="layers of MiniLM to keep, the first ones")
    parser.add_argument("--max_eval_samples", type=int, default=1000, help="test sentences, and as many for validation")
    parser.add_argument("--output", type=Path, default=Path("outputs/matryoshka_lora"), help="path without suffix")
    return parser.parse_args(argv)


Data = dict[str, list[torch.Tensor]]  # "train", "validation", "test": inputs, and labels last


def digits(seed: int, options: argparse.Namespace) -> tuple[Data, nn.Module, str]:
    """Digits on their side, a network that was trained on upright ones, and the modules to adapt."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 8 - 0.6
    labels = torch.tensor(load_digits().target)
    order = torch.randperm(len(labels))
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(300):
        batch = order[:600][torch.randint(600, (64,))]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    turned = images.rot90(1, (1, 2))
    splits = {"train": order[:600], "validation": order[600:1000], "test": order[1000:]}
    return {name: [turned[part], labels[part]] for name, part in splits.items()}, model.eval().requires_grad_(False), r"[135]"


class Classifier(nn.Module):
    """Mean of the token vectors, and a linear head."""

    def __init__(self, encoder: nn.Module, width: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, TOPICS)

    def features(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, tokens) to (n, width)."""
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(n, tokens) to logits, (n, topics)."""
        return self.head(self.features(ids, mask))


def sentences(seed: int, options: argparse.Namespace) -> tuple[Data, nn.Module, str]:
    """Sentences and their topics, MiniLM's first layers with a head that is fitted to them, and the modules to adapt."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    rows, data = bbc_news("sentences", validation=True, seed=seed), {}
    for split in ("train", "validation", "test"):
        count = options.max_steps * options.batch_size if split == "train" else options.max_eval_samples
        part = rows[split].select(range(min(count, len(rows[split]))))
        limits = {"truncation": True, "max_length": options.max_seq_length, "padding": "max_length"}
        tokens = tokenizer(list(part["text"]), return_tensors="pt", **limits)
        data[split] = [tokens["input_ids"], tokens["attention_mask"], torch.tensor(list(part["label"]))]
    encoder = AutoModel.from_pretrained(minilm_folder())
    encoder.encoder.layer = encoder.encoder.layer[: options.layers]
    encoder.pooler = None
    model = Classifier(encoder, encoder.config.hidden_size).eval()
    ids, mask, labels = data["train"]
    with torch.no_grad():
        features = torch.cat([model.features(*part) for part in zip(ids.split(64), mask.split(64), strict=True)])
    optimizer = torch.optim.Adam(model.head.parameters(), 1e-2)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model.head(features), labels).backward()
        optimizer.step()
    return data, model.requires_grad_(False), r".*(query|key|value|dense)"


def train(base: nn.Module, data: Data, targets: str, kind: str, r: int, rate: float, seed: int, options: argparse.Namespace):
    """Train one adapter; return the model."""
    torch.manual_seed(seed)
    ranks = {"lora": [r]}.get(kind, options.ranks)
    config = MatryoshkaConfig(r=r, kind=kind, train_ranks=ranks, rank_scale=options.rank_scale, target_modules=targets)
    model = get_peft_model(copy.deepcopy(base), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.max_steps)
    *inputs, labels = data["train"]
    for _ in range(options.max_steps):
        batch = torch.randint(len(labels), (options.batch_size,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(*(x[batch] for x in inputs)), labels[batch]).backward()
        optimizer.step()
        decay.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, split: list[torch.Tensor]) -> float:
    """The part of the examples whose class is found, in percent."""
    parts = zip(*(tensor.split(128) for tensor in split), strict=True)
    return 100 * sum(int((model(*inputs).argmax(1) == labels).sum()) for *inputs, labels in parts) / len(split[-1])


def at_ranks(model: nn.Module, data: Data, ranks: list, weights: str = "own") -> dict[str, list[float]]:
    """Accuracy at each rank: "validation" and "test"."""
    found: dict[str, list[float]] = {"validation": [], "test": []}
    for rank in ranks:
        with at_rank(model, rank, weights=weights):
            for split, values in found.items():
                values.append(accuracy(model, data[split]))
    return found


def run_seed(seed: int, options: argparse.Namespace) -> dict:
    """Train and evaluate everything of one seed: method -> learning rate -> accuracies."""
    start = time.process_time()
    data, base, targets = {"digits": digits, "sentences": sentences}[options.task](seed, options)
    found = {"seed": seed, "settings": settings(options), "eval_samples": len(data["test"][-1])}
    found |= {"base": accuracy(base, data["test"]), "runs": {}}
    largest = max(options.ranks)
    for rate in options.learning_rates:
        for kind in ("matryoshka", "dylora"):
            model = train(base, data, targets, kind, largest, rate, seed, options)
            found["runs"].setdefault(kind, {})[str(rate)] = at_ranks(model, data, options.ranks)
            if kind == "matryoshka":  # what is trained: the sum of all nested adapters, which no rank deploys
                found["runs"].setdefault("sum", {})[str(rate)] = at_ranks(model, data, ["sum"])
                found["runs"].setdefault("trained", {})[str(rate)] = at_ranks(model, data, options.ranks, "trained")
    for rank in options.ranks:
        for rate in options.learning_rates:
            model = train(base, data, targets, "lora", rank, rate, seed, options)
            found["runs"].setdefault(f"lora_{rank}", {})[str(rate)] = at_ranks(model, data, [rank])
            if rank == largest:  # what its leading columns give when they are cut out
                found["runs"].setdefault("cut", {})[str(rate)] = at_ranks(model, data, options.ranks)
    return found | {"cpu_seconds": time.process_time() - start}


def settings(options: argparse.Namespace) -> dict:
    """What tells runs apart, beside the seed."""
    return {k: v for k, v in vars(options).items() if k not in ("output", "seeds")}


def chosen(runs: list[dict], options: argparse.Namespace) -> dict[str, list[list[float]]]:
    """Method -> test accuracies of every seed, one a rank, at the rate whose mean validation accuracy (AURAC v2) is best."""

    def best(name: str, ranks: list[int]) -> list[list[float]]:
        def score(rate: float) -> float:
            return statistics.mean(aurac(ranks, r["runs"][name][str(rate)]["validation"]) for r in runs)

        rate = max(options.learning_rates, key=score)
        return [r["runs"][name][str(rate)]["test"] for r in runs]

    found = {kind: best(kind, options.ranks) for kind in ("matryoshka", "trained", "dylora", "cut")} | {"sum": best("sum", [1])}
    alone = [best(f"lora_{rank}", [rank]) for rank in options.ranks]
    return found | {"lora": [[values[i][0] for values in alone] for i in range(len(runs))]}


NAMES = {
    "matryoshka": "MatryoshkaLoRA, trained once",
    "trained": 'the same, with `weights="trained"`',
    "dylora": "DyLoRA, trained once",
    "lora": "LoRA, trained for each rank",
    "cut": "LoRA of the largest rank, its first columns",
}

BASES = {
    "digits": "The base model is a small network that knows scikit-learn's digits upright. Its adapters learn digits that lie on "
    "their side.",
    "sentences": "The base model is MiniLM's first layers with a fitted head. Its adapters learn the topics of BBC sentences.",
}


def mean_and_error(values: list[float]) -> str:
    """As "81.25 ± 0.31"."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def report(runs: list[dict], options: argparse.Namespace) -> str:
    """The runs as a page, with what is needed to repeat them."""
    ranks, command = options.ranks, " ".join(["python recipes/matryoshka_lora.py", *sys.argv[1:]])
    found = chosen(runs, options)
    lines = [
        "# MatryoshkaLoRA: accuracy over rank",
        "",
        f"`{command}`",
        "",
        f"{BASES[options.task]} AURAC is the area under the curve of accuracy over rank, divided by its width: version 1 over "
        "the rank, version 2 over the logarithm of the rank ([MatryoshkaLoRA](../matryoshka.md)).",
        "",
        f"Task {options.task}, {options.max_steps} steps at batch {options.batch_size}, AdamW with linear decay, the best of the "
        f"rates {', '.join(f'{rate:g}' for rate in options.learning_rates)} on validation data, rank_scale={options.rank_scale}, "
        f"{runs[0]['eval_samples']} test examples, seeds {[r['seed'] for r in runs]}. Without an adapter: "
        f"{mean_and_error([r['base'] for r in runs])}. {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"{torch.get_num_threads()} thread(s), {sum(r['cpu_seconds'] for r in runs) / 60:.1f} minutes of CPU time, Python "
        f"{platform.python_version()}, torch {torch.__version__}, peft {peft.__version__}.",
        "",
        "Accuracy in percent, mean and standard error over the seeds:",
        "",
        "| method | " + " | ".join(f"rank {r}" for r in ranks) + " | AURAC v1 | AURAC v2 |",
        "|---" * (len(ranks) + 3) + "|",
    ]
    for kind, name in NAMES.items():
        cells = [mean_and_error([values[i] for values in found[kind]]) for i in range(len(ranks))]
        cells += [mean_and_error([aurac(ranks, values, version=v) for values in found[kind]]) for v in (1, 2)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    whole = mean_and_error([values[0] for values in found["sum"]])
    lines += ["", f"Accuracy of the sum of all nested adapters, which MatryoshkaLoRA trains and no rank has: {whole}."]
    lines += ["", "Accuracy of MatryoshkaLoRA minus that of another method, paired by seed:", ""]
    lines += ["| minus | " + " | ".join(f"rank {r}" for r in ranks) + " | AURAC v2 |", "|---" * (len(ranks) + 2) + "|"]
    for kind in ("lora", "dylora"):
        pairs = list(zip(found["matryoshka"], found[kind], strict=True))
        cells = [mean_and_error([ours[i] - other[i] for ours, other in pairs]) for i in range(len(ranks))]
        cells.append(mean_and_error([aurac(ranks, ours) - aurac(ranks, other) for ours, other in pairs]))
        lines.append(f"| {NAMES[kind]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict], options: argparse.Namespace) -> None:
    """Accuracy over rank, as a .png file, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    found = chosen(runs, options)
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for marker, (kind, name) in zip("oPsD^", NAMES.items(), strict=True):
        means = [statistics.mean(column) for column in zip(*found[kind], strict=True)]
        axes.plot(options.ranks, means, marker=marker, markersize=5, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(options.ranks, [str(rank) for rank in options.ranks])
    axes.set_xlabel("rank")
    axes.set_ylabel("test accuracy, %")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False)
    figure.savefig(options.output.with_suffix(".png"), dpi=110)


def main(argv: list[str] | None = None) -> list[dict]:
    """Run every seed; an interrupted comparison goes on where it was."""
    options = parse_arguments(argv)
    options.ranks = sorted(set(options.ranks))
    if options.ranks[0] < 1 or options.max_steps < 1 or options.batch_size < 1:
        sys.exit(f"error: --ranks {options.ranks}, --max_steps, --batch_size: must be integers >= 1")
    MatryoshkaConfig(r=options.ranks[-1], rank_scale=options.rank_scale)  # raises before anything is loaded
    transformers.logging.set_verbosity_error()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    file = options.output.with_suffix(".json")
    done = json.loads(file.read_text()) if file.exists() else []
    runs = []
    for seed in options.seeds:
        found = next((r for r in done if (r["seed"], r["settings"]) == (seed, settings(options))), None)
        if found is None:
            found = run_seed(seed, options)
            done.append(found)
            file.write_text(json.dumps(done, indent=1) + "\n")
            print({k: v for k, v in found.items() if k not in ("settings", "runs")}, flush=True)
        runs.append(found)
    options.output.with_suffix(".md").write_text(report(runs, options))
    draw(runs, options)
    print(report(runs, options))
    return runs


if __name__ == "__main__":
    main()
