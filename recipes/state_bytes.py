"""Bytes of optimizer state per parameter at the `--optim` defaults, measured on the pretrained MiniLM-L6 BERT, as a table.

python recipes/state_bytes.py
"""

import torch
from bbc_news import default_model_path
from transformers import AutoModelForSequenceClassification

import hf_efcp
from hf_efcp.registry import get_optimizer_info


def main() -> None:
    """Print the table; the dense methods are computed (4 bytes a row and parameter), not allocated."""
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


if __name__ == "__main__":
    main()
