"""One LoRA adapter for every rank, against an adapter trained for each rank, and against DyLoRA: accuracy over rank.

    python recipes/matryoshka_lora.py

The first layers of the pretrained MiniLM-L6 BERT classify single sentences of BBC News. The head is fitted to the frozen model's
features first and then stays as it is, so that only the adapters differ. For each seed MatryoshkaLoRA and DyLoRA train once, and
plain LoRA trains once for each rank. Then every adapter is evaluated at its ranks. Writes OUTPUT.json (every run), OUTPUT.md
(accuracies, AURAC, differences) and OUTPUT.png. Runs that OUTPUT.json has already are not repeated.
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
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8], help="ranks to train for and to evaluate at")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds of data split, order and adapters")
    parser.add_argument("--rank_scale", default="sqrt", help="none, sqrt or rank")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="of AdamW, the same for all; linear decay")
    parser.add_argument("--max_steps", type=int, default=80)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_seq_length", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2, help="layers of MiniLM to keep, the first ones")
    parser.add_argument("--max_eval_samples", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("outputs/matryoshka_lora"), help="path without suffix")
    return parser.parse_args(argv)


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


def load_data(seed: int, options: argparse.Namespace) -> dict[str, list[torch.Tensor]]:
    """Tokens, masks and topics of the sentences that are used, as "train" and "test"."""
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    data, found = bbc_news("sentences", seed=seed), {}
    for split, count in (("train", options.max_steps * options.batch_size), ("test", options.max_eval_samples)):
        rows = data[split].select(range(min(count, len(data[split]))))
        limits = {"truncation": True, "max_length": options.max_seq_length, "padding": "max_length"}
        tokens = tokenizer(list(rows["text"]), return_tensors="pt", **limits)
        found[split] = [tokens["input_ids"], tokens["attention_mask"], torch.tensor(list(rows["label"]))]
    return found


def load_base(data: dict[str, list[torch.Tensor]], seed: int, options: argparse.Namespace) -> Classifier:
    """MiniLM's first layers, with a head that is fitted to their features."""
    torch.manual_seed(seed)
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
    return model.requires_grad_(False)


def train(base: Classifier, data: dict[str, list[torch.Tensor]], kind: str, r: int, seed: int, options: argparse.Namespace):
    """Train one adapter; return the model."""
    torch.manual_seed(seed)
    ranks = {"lora": [r]}.get(kind, options.ranks)
    targets = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    config = MatryoshkaConfig(r=r, kind=kind, train_ranks=ranks, rank_scale=options.rank_scale, target_modules=targets)
    model = get_peft_model(copy.deepcopy(base), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], options.learning_rate, weight_decay=0.0)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / options.max_steps)
    order = torch.randperm(len(data["train"][2])).split(options.batch_size)
    for step in range(options.max_steps):
        ids, mask, labels = (tensor[order[step % len(order)]] for tensor in data["train"])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids, mask), labels).backward()
        optimizer.step()
        decay.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: dict[str, list[torch.Tensor]]) -> float:
    """The part of the test sentences whose topic is found, in percent."""
    ids, mask, labels = (tensor.split(64) for tensor in data["test"])
    right = sum(int((model(i, m).argmax(1) == y).sum()) for i, m, y in zip(ids, mask, labels, strict=True))
    return 100 * right / len(data["test"][2])


def run_seed(seed: int, options: argparse.Namespace) -> dict:
    """Train and evaluate everything of one seed: method -> accuracies, one a rank."""
    start = time.process_time()
    data = load_data(seed, options)
    base = load_base(data, seed, options)
    found = {"seed": seed, "settings": settings(options), "base": accuracy(base, data), "eval_samples": len(data["test"][2])}
    for kind in ("matryoshka", "dylora"):
        model = train(base, data, kind, max(options.ranks), seed, options)
        found[kind] = []
        for rank in options.ranks:
            with at_rank(model, rank):
                found[kind].append(accuracy(model, data))
    found["lora"], found["cut"] = [], []
    for rank in options.ranks:
        model = train(base, data, "lora", rank, seed, options)
        found["lora"].append(accuracy(model, data))
    # What the adapter of the largest rank gives when its leading columns are cut out.
    for rank in options.ranks[:-1]:
        with at_rank(model, rank):
            found["cut"].append(accuracy(model, data))
    found["cut"].append(found["lora"][-1])
    return found | {"cpu_seconds": time.process_time() - start}


def settings(options: argparse.Namespace) -> dict:
    """What tells runs apart, beside the seed."""
    return {k: v for k, v in vars(options).items() if k not in ("output", "seeds")}


NAMES = {
    "matryoshka": "MatryoshkaLoRA, trained once",
    "dylora": "DyLoRA, trained once",
    "lora": "LoRA, trained for each rank",
    "cut": "LoRA of the largest rank, cut",
}


def mean_and_error(values: list[float]) -> str:
    """As "81.25 ± 0.31"."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):.2f} ± {error:.2f}"


def report(runs: list[dict], options: argparse.Namespace) -> str:
    """The runs as a page, with what is needed to repeat them."""
    ranks, command = options.ranks, " ".join(["python recipes/matryoshka_lora.py", *sys.argv[1:]])
    lines = [
        "# MatryoshkaLoRA: accuracy over rank",
        "",
        f"`{command}`",
        "",
        f"First {options.layers} layers of MiniLM-L6, BBC sentences, 5 topics, {options.max_steps} steps at batch "
        f"{options.batch_size}, AdamW at {options.learning_rate:g} with linear decay, rank_scale={options.rank_scale}, "
        f"{runs[0]['eval_samples']} test sentences, seeds {[r['seed'] for r in runs]}. The frozen model with its fitted head: "
        f"{mean_and_error([r['base'] for r in runs])}. {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"{torch.get_num_threads()} thread(s), {sum(r['cpu_seconds'] for r in runs) / 60:.0f} minutes of CPU time, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, peft "
        f"{peft.__version__}.",
        "",
        "Accuracy in percent, mean and standard error over the seeds:",
        "",
        "| method | " + " | ".join(f"rank {r}" for r in ranks) + " | AURAC v1 | AURAC v2 |",
        "|---" * (len(ranks) + 3) + "|",
    ]
    for kind, name in NAMES.items():
        cells = [mean_and_error([r[kind][i] for r in runs]) for i in range(len(ranks))]
        cells += [mean_and_error([aurac(ranks, r[kind], version=v) for r in runs]) for v in (1, 2)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "Differences of MatryoshkaLoRA, paired by seed:", "", "| to | " + " | ".join(f"rank {r}" for r in ranks)]
    lines[-1] += " | AURAC v2 |"
    lines.append("|---" * (len(ranks) + 2) + "|")
    for kind in ("lora", "dylora"):
        cells = [mean_and_error([r["matryoshka"][i] - r[kind][i] for r in runs]) for i in range(len(ranks))]
        cells.append(mean_and_error([aurac(ranks, r["matryoshka"]) - aurac(ranks, r[kind]) for r in runs]))
        lines.append(f"| {NAMES[kind]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(runs: list[dict], options: argparse.Namespace) -> None:
    """Accuracy over rank, as a .png file, where matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for marker, (kind, name) in zip("osD^", NAMES.items(), strict=True):
        means = [statistics.mean(r[kind][i] for r in runs) for i in range(len(options.ranks))]
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
            print({k: v for k, v in found.items() if k != "settings"}, flush=True)
        runs.append(found)
    options.output.with_suffix(".md").write_text(report(runs, options))
    draw(runs, options)
    print(report(runs, options))
    return runs


if __name__ == "__main__":
    main()
