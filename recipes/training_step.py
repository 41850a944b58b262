"""What the optimizer adds to a whole training step: BERT with random weights and random tokens, against fused AdamW.

python recipes/training_step.py                                  # on a GPU: BERT-base, batch 32 x 128, TF32 and bf16 autocast
python recipes/training_step.py --device cpu --model tiny --batch 4 --length 16

Forward, backward and step of every optimizer, by turns; medians. Overhead is against `adamw_fused`. Windows are full.
"""

import argparse
import json
import statistics

import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_efcp.bench.measuring import fill, machine, seconds
from hf_efcp.cli.common import chosen, table
from hf_efcp.groups import parameter_groups
from hf_efcp.registry import get_optimizer_info

SIZES = {
    "bert-base": {},
    "bert-large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "tiny": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
}
PRECISIONS = ("fp32", "tf32", "bf16")
ADAMW = "adamw_fused"


def parse(argv=None) -> argparse.Namespace:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="bert-base")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--optim", default="efcp_lowrank_mfac,efcp_sparse_mfac", help="names with commas between them")
    parser.add_argument("--optim_args", default="window_size=128")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help="default: tf32 and bf16 autocast; on a CPU fp32")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", metavar="FILE")
    return parser.parse_args(argv)


class Run:
    """A model of its own with its optimizer."""

    def __init__(self, config: BertConfig, device: torch.device, name: str, options: dict | None):
        torch.manual_seed(0)
        self.model = BertForSequenceClassification(config).to(device).train()
        if options is None:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True)
        else:
            options = {**options, "lr": 1e-5}
            self.optimizer = get_optimizer_info(name).cls(parameter_groups(self.model), **options)
        self.is_ours, self.times, self.step_times = options is not None, [], []

    def train(self, batch: dict, autocast) -> None:
        """Forward and backward."""
        with autocast:
            loss = self.model(**batch).loss
        loss.backward()

    def step(self) -> None:
        """The optimizer's part."""
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(args: argparse.Namespace, precision: str, device: torch.device) -> dict[str, dict[str, float]]:
    """Name -> medians in milliseconds and the overhead over AdamW."""
    config = BertConfig(**SIZES[args.model])
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
    runs = {ADAMW: Run(config, device, ADAMW, None)}
    runs |= {name: Run(config, device, name, options) for name, options in chosen(args.optim, args.optim_args).items()}
    generator = torch.Generator().manual_seed(0)
    for number in range(args.steps + 6):
        tokens = torch.randint(0, config.vocab_size, (args.batch, args.length), generator=generator)
        labels = torch.randint(0, 2, (args.batch,), generator=generator)
        batch = {"input_ids": tokens.to(device), "labels": labels.to(device)}
        for run in runs.values():
            forward = seconds(lambda run=run, batch=batch: run.train(batch, autocast), device)
            step = seconds(run.step, device)
            if number == 3 and run.is_ours:
                fill(run.optimizer)
            if number >= 6:
                run.times.append(1e3 * (forward + step))
                run.step_times.append(1e3 * step)
    base = statistics.median(runs[ADAMW].times)
    return {
        name: {
            "ms": statistics.median(run.times),
            "optimizer_ms": statistics.median(run.step_times),
            "overhead": statistics.median(run.times) / base - 1,
        }
        for name, run in runs.items()
    }


def main(argv=None) -> dict:
    """Measure every precision, print a table of each, return everything."""
    args = parse(argv)
    device = torch.device(args.device)
    found = {"command": vars(args), "machine": machine(device), "precisions": {}}
    print(f"{args.model}, batch {args.batch} x {args.length}, {args.optim_args}; {found['machine']}")
    for precision in args.precision or (("tf32", "bf16") if device.type == "cuda" else ("fp32",)):
        results = found["precisions"][precision] = measure(args, precision, device)
        rows = [("optimizer", "training step ms", "of it the optimizer", "overhead")]
        rows += [(n, f"{r['ms']:.2f}", f"{r['optimizer_ms']:.2f}", f"{r['overhead']:+.1%}") for n, r in results.items()]
        print(f"\n{precision}:\n\n{table(rows)}")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)
    return found


if __name__ == "__main__":
    main()
