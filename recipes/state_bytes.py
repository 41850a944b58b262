"""Bytes of optimizer state per parameter, as a table.

python recipes/state_bytes.py              # at the `--optim` defaults, measured on the pretrained MiniLM-L6 BERT
python recipes/state_bytes.py --formats    # BERT-base: every format, a long window and a short one; nothing is allocated
"""

import argparse

import torch
from bbc_news import default_model_path
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import hf_efcp
from hf_efcp.registry import get_optimizer_info

# window, error feedback
FORMATS = {
    "fp32, fp32": {},
    "fp32, bf16": {"error_dtype": "bf16"},
    "bf16, bf16": {"window_dtype": "bf16", "error_dtype": "bf16"},
    "bf16, int8": {"window_dtype": "bf16", "error_format": "int8"},
    "low_bit, bf16": {"window_format": "low_bit", "error_dtype": "bf16"},
    "low_bit, int8": {"window_format": "low_bit", "error_format": "int8"},
    "low_bit, int4": {"window_format": "low_bit", "error_format": "int4"},
}


def defaults() -> None:
    """The table of the defaults; the dense methods are computed (4 bytes a row and parameter), not allocated."""
    model = AutoModelForSequenceClassification.from_pretrained(default_model_path(), num_labels=5)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f}M parameters, torch {torch.__version__}\n\n| name | bytes per parameter | of it |\n|---|---|---|")
    for name in hf_efcp.list_optimizers():
        info = get_optimizer_info(name)
        if "dense" in name:
            window = info.check({"window_size": info.hf_defaults.get("window_size", info.cls.options_type().window_size)})
            kinds = {"window": 4 * window["window_size"] * count}
        else:
            kinds = info.cls(model.parameters(), lr=1e-4, **info.hf_defaults).memory_footprint()
        parts = ", ".join(f"{kind} {size / count:.2f}" for kind, size in kinds.items() if size / count >= 0.005)
        print(f"| `{name}` | {sum(kinds.values()) / count:.1f} | {parts} |")


def formats() -> None:
    """The table of the formats, from shapes."""
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    count = sum(p.numel() for p in model.parameters())
    cases = [(name, m) for name in ("efcp_lowrank_mfac", "efcp_sparse_mfac") for m in (1024, 32)]
    print(f"BERT-base, {count / 1e6:.1f}M parameters: bytes of state per parameter, the error feedback's among them\n")
    print("| window, error | " + " | ".join(f"{name.split('_')[1]}, m = {m}" for name, m in cases) + " |")
    print("|---" * (len(cases) + 1) + "|")
    for title, options in FORMATS.items():
        sizes = []
        for name, m in cases:
            optimizer = hf_efcp.create_optimizer(name, model, lr=1e-4, window_size=m, **options)
            sizes.append(optimizer.expected_bytes() / count)
        print(f"| {title} | " + " | ".join(f"{size:.2f}" for size in sizes) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", action="store_true", help="compare the formats on BERT-base")
    formats() if parser.parse_args().formats else defaults()
