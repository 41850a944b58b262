"""Bytes of optimizer state per parameter on BERT-base, in every format, with a long window and a short one; nothing is allocated.

python recipes/state_formats.py
"""

import torch
from transformers import BertConfig, BertForSequenceClassification

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
CASES = [(name, m) for name in ("efcp_lowrank_mfac", "efcp_sparse_mfac") for m in (1024, 32)]


def main() -> None:
    """Print the table."""
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig())
    count = sum(p.numel() for p in model.parameters())
    print(f"BERT-base, {count / 1e6:.1f}M parameters: bytes of state per parameter, the error feedback's among them\n")
    print("| window, error | " + " | ".join(f"{get_optimizer_info(name).compression}, m = {m}" for name, m in CASES) + " |")
    print("|---" * (len(CASES) + 1) + "|")
    for title, options in FORMATS.items():
        sizes = []
        for name, m in CASES:
            optimizer = hf_efcp.create_optimizer(name, model, lr=1e-4, window_size=m, **options)
            sizes.append(sum(optimizer.estimate_footprint().values()) / count)
        print(f"| {title} | " + " | ".join(f"{size:.2f}" for size in sizes) + " |")


if __name__ == "__main__":
    main()
