"""`hf-efcp advise`: a command line for a model, a task and a GPU, with the reasons and the cost; warnings of what fails."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn

from ..options import OptionError, as_text, unknown_name
from ..registry import get_optimizer_info, list_optimizers, optim_defaults
from .common import GPU_HELP, add_command, chosen, dtype_of, gibibytes, size_of, table
from .estimate import ADAMW, estimate
from .shapes import load, with_adapters


@dataclasses.dataclass(frozen=True)
class Task:
    """What people train.

    Attributes:
        about: in words.
        learning_rate: usual with AdamW, as it is typed.
        adapters: whether LoRA adapters are trained.
        scratch: whether the weights start as random numbers.
    """

    about: str
    learning_rate: str
    adapters: bool = False
    scratch: bool = False


TASKS = {
    "classification": Task("fine-tuning a classifier or a tagger", "5e-5"),
    "sft": Task("supervised fine-tuning of a language model", "2e-5"),
    "lora": Task("LoRA adapters on a language model", "2e-4", adapters=True),
    "pretraining": Task("training from scratch", "1e-3", scratch=True),
}
# In the order in which they are tried: less memory with each. Measured: docs/benchmarks/quality.md, rows `ours` and `small`.
_FORMATS: tuple[dict[str, str], ...] = (
    {},
    {"window_format": "low_bit", "error_format": "int8"},
    {"window_format": "low_bit", "error_format": "int4"},
)


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "advise",
        run,
        help="suggest a command line for a model and a GPU",
        description="Prints a command line for a model, a task and a GPU. It says why it chose this optimizer and these "
        "options, and how much memory they take beside AdamW. It warns of settings that are known to fail.",
        writes=False,
        optim="an optimizer that you want, as `hf-efcp list` names it (default: the command chooses one)",
    )
    tasks = ", ".join(f"{name} ({task.about})" for name, task in TASKS.items())
    parser.add_argument("--task", default="classification", help=f"what is trained: {tasks}. Default: classification")
    parser.add_argument(
        "--gpu",
        metavar="SIZE",
        help=f"the memory of one GPU: {GPU_HELP}",
    )
    parser.add_argument("--num_processes", type=int, default=1, help="number of GPUs (default 1)")
    parser.add_argument(
        "--reserve",
        type=float,
        default=0.3,
        help="the fraction of the GPU's memory to leave for activations, from 0 to below 1 (default 0.3)",
    )
    parser.add_argument("--lora_r", type=int, default=8, help="rank of the LoRA adapters, with --task lora (default 8)")


def run(args: argparse.Namespace) -> int:
    """Print the advice; returns the exit status. Raises OptionError for bad input."""
    if args.task not in TASKS:
        raise OptionError(unknown_name("task", args.task, TASKS))
    for name, allowed, fine in (
        ("num_processes", "an integer >= 1", args.num_processes >= 1),
        ("lora_r", "an integer >= 1", args.lora_r >= 1),
        ("reserve", "a number in [0, 1)", 0 <= args.reserve < 1),
    ):
        if not fine:
            raise OptionError(f"{name}={getattr(args, name)}: must be {allowed}")
    if args.optim is not None and "," in args.optim:
        raise OptionError(f"optim={args.optim!r}: advise takes one name")
    model = load(args.model, dtype_of(args.dtype))
    task = TASKS[args.task]
    if task.adapters:
        model = with_adapters(model, args.lora_r)
    size = size_of(args.gpu) if args.gpu else None
    print(advice(model, args, task, None if size is None else int(size * (1 - args.reserve)), size))
    return 0


def advice(model: nn.Module, args: argparse.Namespace, task: Task, room: int | None, gpu: int | None) -> str:
    """Write the advice.

    Args:
        model: on the meta device.
        args: of the command.
        task: one of TASKS.
        room: bytes that parameters, gradients and state may take on a GPU; None: it is not asked.
        gpu: bytes of a GPU.
    """
    experts = any(p.ndim == 3 and p.requires_grad for p in model.parameters())
    name = args.optim or ("efcp_sparse_mfac" if experts else "efcp_lowrank_mfac")
    (given,) = chosen(name, args.optim_args).values()
    own = {option: value for option, value in given.items() if option not in ("lr", "preset", "shard")}
    tried = [tried for tried in _candidates(model, name, own, args) if "refused" not in tried]
    if not tried:
        estimate(model, {name: given}, args.optim_target_modules, args.num_processes)  # raises, and says why
    taken = next((one for one in tried if room is None or one["needs"] <= room), None)
    best = taken or min(tried, key=lambda one: one["needs"])
    count = f"{sum(p.numel() for p in model.parameters()):,} parameters, {args.dtype}, {task.about}"
    lines = [f"{args.model}: {count}", ""]
    if taken is None:
        lines += [*_does_not_fit(best, room or 0, gpu or 0, args, task), ""]
    else:
        lines += [f"    {_command(taken, args, task)}", "", "Why:", "", *_reasons(taken, tried[0], experts, args, task, gpu), ""]
    lines += ["What it costs on one GPU:", "", _costs(best), ""]
    lines += [
        f"Activations come on top; {args.reserve:.0%} of the GPU is left for them (--reserve)."
        if gpu
        else "Activations come on top."
    ]
    warned = list(known_to_fail(name, best["given"], task, experts))
    if warned:
        lines += ["", "Known to fail:", "", *(f"- {one}" for one in warned)]
    return "\n".join(lines)


def _candidates(model: nn.Module, name: str, own: dict[str, Any], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Give what may be taken, in order of preference: formats, then FSDP2 where there are several GPUs."""
    has = get_optimizer_info(name).options()
    for fsdp in (False, True) if args.num_processes > 1 else (False,):
        for formats in _FORMATS:
            if any(option not in has or option in own or "memory_budget" in own for option in formats):
                continue
            options = {**own, **formats}
            full = chosen(name, ",".join(f"{k}={as_text(v)}" for k, v in options.items()) or None)
            try:
                found = estimate(model, full, args.optim_target_modules, args.num_processes, fsdp)
            except OptionError:  # FSDP2 refuses some formats
                continue
            entries = found["optimizers"]
            yield {**found, **entries[name], "name": name, "given": options, "adamw": entries[ADAMW]}


def _command(taken: dict[str, Any], args: argparse.Namespace, task: Task) -> str:
    """Write the command line."""
    start = "hf-efcp run train.py"
    if args.num_processes > 1:
        more = " --use_fsdp --fsdp_version 2" if taken["fsdp"] else " --multi_gpu"
        start = f"accelerate launch{more} --num_processes {args.num_processes} -m hf_efcp.run train.py"
    options = ",".join(f"{k}={as_text(v)}" for k, v in taken["given"].items())
    return (
        f"{start} --optim {taken['name']}"
        + (f" --optim_args {options}" if options else "")
        + f" --learning_rate {task.learning_rate}"
    )


def _reasons(
    taken: dict[str, Any], first: dict[str, Any], experts: bool, args: argparse.Namespace, task: Task, gpu: int | None
) -> Iterator[str]:
    """Give a sentence for each thing that was chosen."""
    name = taken["name"]
    if args.optim is None:
        yield f"- {name}: " + (
            "its test loss is lower than AdamW's on nine of nine small tasks (docs/benchmarks/quality.md)."
            if not experts
            else "the model has fused expert tensors, which low rank compresses badly and top-k does not."
        )
    if taken["given"] != first["given"] or taken["fsdp"] != first["fsdp"]:
        yield f"- With the defaults, parameters, gradients and state take {gibibytes(first['needs'])}, which is too much."
    if taken["given"] != first["given"]:
        formats = ", ".join(f"{k}={as_text(v)}" for k, v in taken["given"].items())
        yield f"- {formats}: the state takes {gibibytes(taken['total'])} instead of {gibibytes(first['total'])}."
    if taken["fsdp"]:
        yield f"- FSDP2: it divides parameters, gradients and state among the {args.num_processes} GPUs."
    elif args.num_processes > 1:
        yield f"- DDP: the {args.num_processes} GPUs share the optimizer's state (shard=auto)."
    yield f"- learning rate {task.learning_rate}: it is usual with AdamW here. Take yours if you have one: it works unchanged."


def _does_not_fit(best: dict[str, Any], room: int, gpu: int, args: argparse.Namespace, task: Task) -> Iterator[str]:
    """Say what to do where nothing fits."""
    yield (
        f"Nothing fits. {best['name']} needs at least {gibibytes(best['needs'])} for parameters, gradients and state, and "
        f"{gibibytes(room)} of {gibibytes(gpu)} are free for them."
    )
    yield ""
    if args.dtype in ("float32", "fp32"):
        yield "- Keep the parameters in 16 bits: --dtype bfloat16 shows what it needs then."
    if not task.adapters:
        yield "- Train LoRA adapters: --task lora shows what they need."
    yield f"- Use more GPUs: --num_processes {2 * args.num_processes} shows what each of them needs."


def _costs(one: dict[str, Any]) -> str:
    """Write the table of bytes beside AdamW."""
    rows = [["", "parameters", "gradients", "state", "sum", "state, bytes per trained parameter"]]
    for name, entry in ((one["name"], one), ("AdamW", one["adamw"])):
        sizes = one["parameter_bytes"], one["gradient_bytes"], entry["total"], entry["needs"]
        rows.append([name, *map(gibibytes, sizes), f"{entry['bytes_per_parameter']:.2f}"])
    return table(rows)


def known_to_fail(name: str, options: dict[str, Any], task: Task, experts: bool = False) -> Iterator[str]:
    """Give a sentence for each setting that is known to train badly, with the measurement that says so.

    Args:
        name: the optimizer.
        options: those that are given, on top of the --optim defaults.
        task: what is trained.
        experts: whether the model has fused expert tensors.
    """
    info = get_optimizer_info(name)
    merged = info.merged(optim_defaults(name, **options))
    value = {field.name: getattr(merged, field.name) for field in dataclasses.fields(merged)}.get
    if value("scope") == "layer" and value("rms_mode") == "adam":
        yield (
            "scope=layer with rms_mode=adam: every tensor's update gets the same norm, whatever its size, and nothing is "
            "learned (docs/benchmarks/matrix.md, k_per_tensor). Take scope=model."
        )
    if info.windowed and value("update_rms") is None:
        yield "update_rms=none: the update has another size than Adam's. AdamW's learning rates do not work: search the rate."
    if info.windowed and value("metric") == "none" and task.scratch:
        yield (
            "metric=none from scratch: the test loss on digits was 0.84, with metric=factored 0.11 "
            "(docs/benchmarks/quality.md). Take metric=factored."
        )
    if info.windowed and value("metric") != "none" and value("window_momentum") == 0:
        yield "window_momentum=0: the test loss on digits was 0.16, at the default 0.11 (docs/benchmarks/quality.md)."
    if info.family == "microadam" and (value("density") or 1) < 0.1:
        yield (
            "MicroAdam at a density of 1% in short runs: after 300 steps on digits its loss was 1.68, AdamW's 0.34 "
            "(docs/benchmarks/family.md). Take density=0.1, or a run of thousands of steps."
        )
    if experts and info.compression == "low rank":
        yield "Low rank on fused expert tensors: it takes them for one matrix with a row per expert. Take efcp_sparse_mfac."
    if info.compression == "dense":
        others = ", ".join(list_optimizers("*lowrank*"))
        yield f"{name} keeps whole gradients: it is for comparisons on small models. Take one of {others}."
