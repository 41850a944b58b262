"""Compare optimizers on one task: BBC sentences by topic, the pretrained MiniLM-L6 BERT, the stock Trainer, several seeds.

    python recipes/optimizer_comparison.py --optim adamw_torch efcp_lowrank_mfac "efcp_lowrank_mfac:damping=1e6"

An entry is an `--optim` name, or name:optim_args. Everything else is Trainer's default (linear decay, clipping at 1.0).
Writes OUTPUT.json (every run) and OUTPUT.md (mean, standard error over seeds, and the difference to the first entry of the
same learning rate). Runs that OUTPUT.json has already are not repeated.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_efcp
from hf_efcp.demo.bbc import bbc_news, minilm_folder


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", required=True, help="optimizers to compare, name or name:optim_args")
    parser.add_argument("--learning_rate", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seed of data split, order, head and dropout")
    parser.add_argument("--max_steps", type=int, default=150)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_seq_length", type=int, default=64)
    parser.add_argument("--max_eval_samples", type=int, default=3000)
    parser.add_argument("--output", type=Path, default=Path("outputs/optimizer_comparison"), help="path without suffix")
    return parser.parse_args()


def tokenized(seed: int, options: argparse.Namespace, tokenizer):
    """Train and test split of one seed, tokenized."""
    data = bbc_news("sentences", seed=seed)
    data["test"] = data["test"].select(range(min(options.max_eval_samples, len(data["test"]))))
    return data.map(
        lambda batch: tokenizer(batch["text"], truncation=True, max_length=options.max_seq_length),
        batched=True,
        remove_columns=[c for c in data["train"].column_names if c != "label"],
    )


def run(entry: str, learning_rate: float, seed: int, data, tokenizer, options: argparse.Namespace) -> dict:
    """Train and evaluate once; returns the figures of the run."""
    name, _, optim_args = entry.partition(":")
    set_seed(seed)
    labels = data["train"].features["label"].num_classes
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=labels)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            optim=name,
            optim_args=optim_args or None,
            learning_rate=learning_rate,
            seed=seed,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.batch_size,
            per_device_eval_batch_size=64,
            logging_steps=min(25, options.max_steps),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=data["train"],
            eval_dataset=data["test"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        accuracy = trainer.evaluate()["eval_accuracy"]
    return {"optim": entry, "learning_rate": learning_rate, "seed": seed, "accuracy": accuracy, "losses": losses,
            "train_seconds": seconds, "eval_samples": len(data["test"])}  # fmt: skip


def key(r: dict) -> tuple:
    """What tells runs apart."""
    return r["optim"], r["learning_rate"], r["seed"]


def table(runs: list[dict], options: argparse.Namespace) -> str:
    """The runs as a markdown table, with what is needed to repeat them."""
    cases: dict[tuple, list[dict]] = {}
    for r in runs:
        cases.setdefault((r["optim"], r["learning_rate"]), []).append(r)
    lines = [
        f"# Optimizers on BBC sentences: {options.output.name}",
        "",
        f"`{' '.join(['python', 'recipes/optimizer_comparison.py', *(repr(a) if ':' in a else a for a in sys.argv[1:])])}`",
        "",
        f"Pretrained MiniLM-L6 (22.7M parameters), BBC sentences, 5 topics, {options.max_steps} steps at batch "
        f"{options.batch_size}, {runs[0]['eval_samples']} evaluation sentences a seed, seeds {options.seeds}. "
        f"{os.cpu_count()} CPU cores ({platform.machine()}), {torch.get_num_threads()} thread(s), Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, hf_efcp "
        f"{hf_efcp.__version__}.",
        "",
        "| optimizer | lr | accuracy, % | +- s.e. | minus first row | by seed | last training loss | s per run |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: dict[float, float] = {}
    for (optim, lr), group in cases.items():
        accuracies = [100 * r["accuracy"] for r in group]
        mean = statistics.mean(accuracies)
        first.setdefault(lr, mean)
        error = statistics.stdev(accuracies) / len(group) ** 0.5 if len(group) > 1 else float("nan")
        loss = statistics.mean(r["losses"][-1] if r["losses"] else float("nan") for r in group)
        seconds = statistics.median(r["train_seconds"] for r in group)
        by_seed = ", ".join(f"{a:.2f}" for a in accuracies)
        lines.append(
            f"| `{optim}` | {lr:g} | {mean:.2f} | {error:.2f} | {mean - first[lr]:+.2f} | {by_seed} | {loss:.3f} "
            f"| {seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run every case on every seed; an interrupted comparison goes on where it was."""
    options = parse_arguments()
    known = {*hf_efcp.list_optimizers(), *(member.value for member in transformers.training_args.OptimizerNames)}
    unknown = [entry for entry in options.optim if entry.partition(":")[0] not in known]
    if unknown:
        sys.exit(f"error: unknown --optim {unknown}; of this package: {', '.join(hf_efcp.list_optimizers())}")
    transformers.logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(minilm_folder())
    options.output.parent.mkdir(parents=True, exist_ok=True)
    results = options.output.with_suffix(".json")
    done = {key(r): r for r in (json.loads(results.read_text()) if results.exists() else [])}
    wanted = [(entry, lr, seed) for seed in options.seeds for lr in options.learning_rate for entry in options.optim]
    data, data_seed = None, None
    for case in wanted:
        if case not in done:
            if data_seed != case[2]:
                data, data_seed = tokenized(case[2], options, tokenizer), case[2]
            done[case] = run(*case, data, tokenizer, options)
            print({k: done[case][k] for k in ("optim", "learning_rate", "seed", "accuracy", "train_seconds")}, flush=True)
            results.write_text(json.dumps(list(done.values()), indent=1))
        options.output.with_suffix(".md").write_text(table([done[c] for c in wanted if c in done], options))
    runs = [done[case] for case in wanted]
    print(table(runs, options))


if __name__ == "__main__":
    main()
