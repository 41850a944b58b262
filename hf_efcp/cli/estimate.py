"""`hf-efcp estimate`: the memory that an optimizer will take, by kind, before anything is allocated."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.choices import BUDGETED, shown
from ..options import OptionError, as_text
from ..report import figures
from .capacity import beside_bytes, shown_beside_bytes
from .common import (
    GPU_HELP,
    add_command,
    build,
    check_integers,
    check_plot,
    chosen,
    dtype_of,
    gibibytes,
    size_of,
    spelled_out,
    table,
    write_json,
)
from .shapes import load, with_adapters

ADAMW = "adamw_torch"
# Kinds below this many bytes are shown as one.
_SMALL = 4096


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "estimate",
        run,
        help="print how many bytes of state an optimizer will take for a model",
        description="Prints how many bytes the optimizer's state will take for a model, beside AdamW's. The columns are "
        "the parts of the state: the window of gradients, the compression error, and so on. Nothing is allocated. "
        "In training the optimizer's state takes the same bytes, and optimizer.memory_footprint() measures them.",
    )
    parser.add_argument(
        "--num_processes",
        type=int,
        default=1,
        help="number of processes (GPUs) that share the state (default 1). The table shows the process that holds most",
    )
    parser.add_argument("--fsdp", action="store_true", help="the processes also share the parameters, as under FSDP2")
    parser.add_argument(
        "--gpu",
        metavar="SIZE",
        help=f"say which optimizers fit into this memory: {GPU_HELP}",
    )
    parser.add_argument(
        "--lora_r",
        type=int,
        metavar="R",
        help="count only LoRA adapters of this rank as trained, on the query and value matrices",
    )
    parser.add_argument(
        "--capacity",
        action="store_true",
        help="also print the capacity of the formats in which each optimizer keeps its window and its error, as "
        "`hf-efcp capacity` does",
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit status. Raises OptionError for bad input."""
    check_integers(args, num_processes=1, **({} if args.lora_r is None else {"lora_r": 1}))
    check_plot(args.plot)
    gpu = size_of(args.gpu) if args.gpu else None
    optimizers = chosen(args.optim, args.optim_args)
    model = load(args.model, dtype_of(args.dtype))
    if args.lora_r is not None:
        model = with_adapters(model, args.lora_r)
    result = estimate(model, optimizers, args.optim_target_modules, args.num_processes, args.fsdp, gpu)
    result = {"model": args.model, **result}
    if args.capacity:
        result["capacity"] = beside_bytes(result["optimizers"], _usual_shape(model), result["parameters"])
    write_json(args.json, result)
    _draw(result, args.plot)
    print(_report(result, single=args.optim is not None and len(optimizers) == 1))
    if args.capacity:
        print("\n".join(shown_beside_bytes(result["capacity"])))
    return 0


def estimate(
    model: nn.Module,
    optimizers: dict[str, dict[str, Any]],
    targets: str | None = None,
    processes: int = 1,
    fsdp: bool = False,
    gpu: int | None = None,
) -> dict[str, Any]:
    """Bytes of every optimizer for `model`, and of AdamW, on the process that holds most.

    Args:
        model: on any device; nothing of it is read but names, shapes, dtypes and kinds.
        optimizers: name -> options, as `chosen` gives them.
        targets: `optim_target_modules`.
        processes, fsdp: as of `estimate_footprint`.
        gpu: bytes; None: what fits is not asked.

    Returns:
        As written to JSON. An optimizer that would be refused has "refused", the reason, in place of bytes.

    Raises:
        OptionError: a model without parameters, or all optimizers would be refused.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in params)
    if not count:
        raise OptionError("the model has no trainable parameter")
    shares = processes if fsdp else 1
    held = [_chunk(p.shape, shares) * p.element_size() for p in model.parameters()]
    grads = [_chunk(p.shape, shares) * p.element_size() for p in params]
    kinds, refused, taken = {}, {}, {}
    for name, options in optimizers.items():
        optimizer = build(name, options, model, targets)
        try:
            taken[name], kinds[name] = optimizer.builder.estimate(optimizer.param_groups, optimizer.state, processes, fsdp)
        except OptionError as error:
            refused[name] = str(error)
    if refused and not kinds:
        raise OptionError(next(iter(refused.values())))
    kinds[ADAMW] = adamw_bytes(params, shares)
    entries = {}
    for name, bytes_ in kinds.items():
        total = sum(bytes_.values())
        needs = sum(held) + sum(grads) + total
        entry = {"bytes": bytes_, "total": total, "bytes_per_parameter": total / count, "needs": needs}
        if gpu is not None:
            entry["fits"] = needs <= gpu
        if getattr(taken.get(name), "memory_budget", None) is not None:
            entry["chosen"] = {option: getattr(taken[name], option) for option in BUDGETED if hasattr(taken[name], option)}
        entries[name] = {**entry, "options": spelled_out(name, optimizers[name]) if name in optimizers else {}}
    entries |= {name: {"refused": why, "options": spelled_out(name, optimizers[name])} for name, why in refused.items()}
    return {
        "parameters": count,
        "dtype": str(params[0].dtype).removeprefix("torch."),
        "processes": processes,
        "fsdp": fsdp,
        "parameter_bytes": sum(held),
        "gradient_bytes": sum(grads),
        "gpu_bytes": gpu,
        "optimizers": entries,
    }


def _usual_shape(model: nn.Module) -> tuple[int, int]:
    """Give rows and columns of the matrices that hold most of the trained parameters."""
    held: dict[tuple[int, int], int] = {}
    for p in model.parameters():
        if p.requires_grad and p.ndim >= 2 and p.numel():
            shape = p.shape[0], p[0].numel()
            held[shape] = held.get(shape, 0) + p.numel()
    if not held:
        raise OptionError("capacity: the model has no trainable matrix")
    return max(held, key=lambda shape: held[shape])


def adamw_bytes(params: Sequence[Tensor], shares: int = 1) -> dict[str, int]:
    """Give the bytes of torch's AdamW: two moments like the parameter, and a count of steps in fp32 for each tensor.

    Args:
        params: that are trained.
        shares: of so many processes, which divide the parameters (FSDP2), the one that holds most.
    """
    moment = sum(_chunk(p.shape, shares) * p.element_size() for p in params)
    return {"exp_avg": moment, "exp_avg_sq": moment, "step": 4 * len(params)}


def _chunk(shape: torch.Size, processes: int) -> int:
    """Numbers in the largest of the chunks that FSDP2 cuts a tensor into, by its first dimension."""
    numel = shape.numel()
    return numel if not len(shape) or not shape[0] else numel // shape[0] * -(-shape[0] // processes)


def _draw(result: dict[str, Any], file: str | None) -> None:
    """Draw the bytes for each parameter by kind, if a file is named."""
    if file is None:
        return
    rows = []
    for name, entry in result["optimizers"].items():
        if "refused" not in entry:
            large = {k: n / result["parameters"] for k, n in entry["bytes"].items() if n >= max(_SMALL, entry["total"] / 500)}
            other = entry["bytes_per_parameter"] - sum(large.values())
            rows.append((name, large | ({"other": other} if other > 0 else {})))
    made = figures.bars("optimizer state", rows, f"bytes for each parameter, {result['model']}", *figures.ON_WHITE)
    figures.save(made, file)


def _report(result: dict[str, Any], single: bool) -> str:
    entries = {name: entry for name, entry in result["optimizers"].items() if "refused" not in entry}
    where = "" if result["processes"] == 1 else f", the largest of {result['processes']} processes' parts"
    where += " under FSDP2" if result["fsdp"] else ""
    lines = [f"{result['model']}: {result['parameters']:,} trainable parameters, {result['dtype']}{where}", ""]
    kinds = list(dict.fromkeys(k for e in entries.values() for k, n in e["bytes"].items() if n >= _SMALL and k[:3] != "exp"))
    if single:
        (name,) = (n for n in entries if n != ADAMW)
        kinds_of_one = [(k, f"{n:,}") for k, n in entries[name]["bytes"].items()]
        lines += [table([(name, "bytes"), *kinds_of_one, ("total", f"{entries[name]['total']:,}")]), ""]
    head = ["optimizer", *kinds, "other", "total bytes", "total", "bytes per parameter"]
    gpu = result["gpu_bytes"]
    rows = [[*head, "with parameters and gradients", f"fits {gibibytes(gpu)}"] if gpu else head]
    for name, entry in entries.items():
        cells = [gibibytes(entry["bytes"].get(k, 0)) for k in kinds]
        other = sum(n for k, n in entry["bytes"].items() if k not in kinds)
        row = [name, *cells, gibibytes(other), f"{entry['total']:,}", gibibytes(entry["total"])]
        row.append(f"{entry['bytes_per_parameter']:.2f}")
        rows.append([*row, gibibytes(entry["needs"]), "yes" if entry["fits"] else "no"] if gpu else row)
    lines.append(table(rows))
    for name, entry in entries.items():
        if "chosen" in entry:
            values = ", ".join(f"{option}={as_text(value)}" for option, value in entry["chosen"].items() if value is not None)
            lines += ["", f"{name}: memory_budget={shown(entry['options']['memory_budget'])} chooses {values}"]
    size = gibibytes(result["parameter_bytes"]), gibibytes(result["gradient_bytes"])
    lines += ["", f"Beside it: parameters {size[0]}, gradients {size[1]}; activations and temporaries are not counted."]
    lines += [f"refused: {name}: {entry['refused']}" for name, entry in result["optimizers"].items() if "refused" in entry]
    return "\n".join(lines)
