"""What is done with a trained adapter: choose its rank, cut an ordinary LoRA adapter out of it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from ..core.nested import rank_scale_of, staircase
from ..options import OptionError, unknown_name
from .config import MatryoshkaConfig
from .layers import SUM, WEIGHTS, NestedLayer, NestedLinear


def set_rank(model: nn.Module, rank: int | str | None = None, adapter: str = "default", weights: str = "own") -> None:
    """Choose the rank that an adapter has in evaluation mode, and when it is merged. Training does not see it.

    Args:
        model: a PeftModel, or a model that has adapters.
        rank: from 1 to r; None: r; "sum": the whole P, the sum of all nested adapters, which is none of the ranks.
        adapter: its name.
        weights: "own": the rank's own scale s_rho, in place of P, as the paper has it. "trained": the leading entries of P, as
            in training; this is ours, and for kind="matryoshka".

    Raises:
        OptionError: no such adapter, a rank or weights that are not allowed, or an adapter that is merged.
    """
    layers = _layers(model, adapter)
    if not layers:
        raise OptionError(f"adapter={adapter!r}: the model has no adapter of a MatryoshkaConfig with that name")
    if any(adapter in layer.merged_adapters for layer in layers):
        raise OptionError(f"rank={rank!r}: adapter {adapter!r} is merged; unmerge it first")
    kinds = {layer.lora_A[adapter].kind for layer in layers}
    _check_weights(weights, kinds.pop())
    for layer in layers:
        a = layer.lora_A[adapter]
        a.rank, a.weights = SUM if rank == SUM else _checked_rank(rank, a.out_features), weights


@contextlib.contextmanager
def at_rank(model: nn.Module, rank: int | str | None, adapter: str = "default", weights: str = "own") -> Iterator[None]:
    """Choose a rank within a `with` block; after it the adapter has its former rank. As `set_rank`."""
    before = {(layer.lora_A[adapter].rank, layer.lora_A[adapter].weights) for layer in _layers(model, adapter)}
    set_rank(model, rank, adapter, weights)
    try:
        yield
    finally:
        former, weights = before.pop()
        set_rank(model, former, adapter, weights)


def truncate(model: PeftModel, rank: int, name: str | None = None, adapter: str = "default", weights: str = "own") -> str:
    """Add an ordinary LoRA adapter to the model: the leading columns of a nested one, with the scale of that rank.

    PEFT can activate, merge, save and delete it like any other; `save_truncated` only writes it.

    Args:
        model: holds the nested adapter, and gets the new one, which is not activated and does not train.
        rank: from 1 to r.
        name: of the new adapter; None: "rank_4".
        adapter: the nested one.
        weights: as for `set_rank`; "trained" is folded into A.

    Returns:
        The name of the new adapter.

    Raises:
        OptionError: no such adapter, a rank or weights that are not allowed, or a name that is taken.
    """
    config, tensors = _truncated(model, rank, adapter, weights)
    name = f"rank_{rank}" if name is None else name
    if name in model.peft_config:
        raise OptionError(f"name={name!r}: the model has an adapter of that name")
    model.add_adapter(name, config)
    set_peft_model_state_dict(model, tensors, adapter_name=name)
    module: Any
    for module in model.modules():
        if name in getattr(module, "lora_dropout", ()):
            module.lora_dropout[name].train(module.training)  # PEFT leaves it in training mode
    return name


def save_truncated(model: PeftModel, rank: int, folder: str | Path, adapter: str = "default", weights: str = "own") -> None:
    """Write an ordinary LoRA adapter into a folder, as PEFT does: the leading columns of a nested one. As `truncate`."""
    config, tensors = _truncated(model, rank, adapter, weights)
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(Path(folder) / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _truncated(model: PeftModel, rank: int, adapter: str, weights: str) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of the adapter of that rank."""
    ours = {n: c for n, c in getattr(model, "peft_config", {}).items() if isinstance(c, MatryoshkaConfig)}
    if adapter not in ours:
        raise OptionError(unknown_name("adapter of a MatryoshkaConfig", adapter, ours) if ours else "the model has none")
    config = ours[adapter]
    rank = _checked_rank(rank, config.r)
    _check_weights(weights, config.kind)
    over_s = staircase(config.r, config.train_ranks or [], config.rank_scale)[:rank] / rank_scale_of(rank, config.rank_scale)
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(LoraConfig) if f.init and hasattr(config, f.name)}
    scale = config.scale(rank)
    fields |= {"r": rank, "lora_alpha": scale * (rank**0.5 if config.use_rslora else rank), "inference_mode": True}
    tensors = {}
    for name, tensor in get_peft_model_state_dict(model, adapter_name=adapter).items():
        if name.endswith("lora_A.weight"):
            tensor = tensor[:rank] if weights == "own" else (tensor[:rank] * over_s[:, None].to(tensor.device)).to(tensor.dtype)
        elif name.endswith("lora_B.weight"):
            tensor = tensor[:, :rank]
        tensors[name] = tensor.detach().clone().contiguous()
    return LoraConfig(**fields), tensors


def _check_weights(weights: str, kind: str) -> None:
    if weights not in WEIGHTS:
        raise OptionError(unknown_name("weights", weights, WEIGHTS))
    if weights == "trained" and kind == "dylora":
        raise OptionError("weights='trained': kind='dylora' trains with another P in each forward; allowed is own")


def _checked_rank(rank: Any, r: int) -> int:
    if rank is None:
        return r
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= r:
        raise OptionError(f"rank={rank!r}: must be an integer from 1 to r={r}")
    return rank


def _layers(model: nn.Module, adapter: str) -> list[Any]:
    """PEFT's layers that have our adapter of that name."""
    nested = (m for m in model.modules() if isinstance(m, NestedLayer))
    return [m for m in nested if adapter in m.lora_A and isinstance(m.lora_A[adapter], NestedLinear)]
