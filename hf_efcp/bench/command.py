"""`hf-efcp bench`: times of optimizer steps, against each other and against what the machine could do (the roofline).

One run measures everything: the machine's rates, every optimizer and its peers take turns, so that what else the machine does
hits all alike. Gradients are random normal numbers, new ones each round, the same for all.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from ..cli.common import (
    add_command,
    build,
    check_integers,
    check_plot,
    chosen,
    dtype_of,
    gibibytes,
    size_of,
    spelled_out,
    write_json,
)
from ..cli.shapes import load
from ..options import OptionError
from ..report import figures
from . import roofline
from .contenders import Contender, Workload
from .launches import count, has_triton
from .measuring import Rates, cpu_time, machine
from .peers import PEERS, named, version
from .reporting import launches_text, text, versions_used
from .sweep import add_arguments as add_sweep_arguments
from .sweep import sweep

# The share of the free memory that parameters, gradients and states may take. The rest is for temporaries.
_SHARE = 0.8
# Exit status after Ctrl-C, as shells have it.
_CUT_SHORT = 130
# What a peer whose needs are not known is taken for, in bytes per parameter.
_PEER_BYTES = 16


def add_parser(commands: Any) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "bench",
        run,
        help="measure how long an optimizer's step takes for a model",
        description="Measures how long a step of each optimizer takes on this machine. The model is not trained: the "
        "gradients are random numbers of its shapes. Each time stands beside the least time in which this machine could "
        "move and compute the same numbers (docs/benchmarks/roofline.md says how that is found).",
        needs_model=False,
    )
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        nargs="?",
        const="all",
        help="measure optimizers of torch and of other installed packages too: all that there are, or those that have one of "
        "these words in their names, such as soap,muon. Some take half a minute for a step on a CPU. SparseMFAC of "
        "ista-daslab-optimizers runs only if it is named, because it can end the command",
    )
    parser.add_argument(
        "--steps", type=int, default=10, help="number of timed steps of each optimizer (default 10). The optimizers take turns"
    )
    parser.add_argument(
        "--warmup",
        type=int,
        default=2,
        help="number of steps before the first timed one (default 2). The window is full in all of them: copies of entries fill "
        "it first",
    )
    parser.add_argument("--device", help="cpu or cuda (default: cuda if there is a GPU)")
    parser.add_argument("--threads", type=int, help="number of CPU threads (default: torch's)")
    parser.add_argument(
        "--cpu_time",
        action="store_true",
        help="measure CPU time instead of wall time, on one CPU thread. Use this on a machine that is busy with other work",
    )
    parser.add_argument(
        "--memory", metavar="SIZE", help="memory that the command may use, such as 20GiB (default: most of what is free)"
    )
    parser.add_argument(
        "--launches",
        action="store_true",
        help="measure no time. Count, without a GPU, what a step would do on one: kernel launches, bytes read and "
        "written, and waits",
    )
    add_sweep_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print; returns the exit status. Raises OptionError for bad input."""
    check_integers(args, steps=1, warmup=0, threads=1)
    if args.launches:
        return _run_launches(args)
    device, dtype = _device(args.device), dtype_of(args.dtype)
    memory = size_of(args.memory, "memory") if args.memory else _free(device)
    check_plot(args.plot)
    if args.cpu_time and (device.type != "cpu" or args.threads not in (None, 1)):
        raise OptionError(f"cpu_time: it is that of one CPU thread; got --device {device.type} --threads {args.threads}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if args.cpu_time else args.threads or threads)
    if args.peers and args.model is None and not args.sweep:
        raise OptionError(f"--peers {args.peers}: this word is taken for peers; write MODEL before --peers")
    peers = named(args.peers) if args.peers else []
    settings = {"peers": peers, "steps": args.steps, "warmup": args.warmup, "memory": memory, "quick": args.quick}
    try:
        with cpu_time(args.cpu_time):
            result = _run_timed(args, device, dtype, settings)
    finally:
        torch.set_num_threads(threads)
    write_json(args.json, result)
    return _CUT_SHORT if result.get("cut_short") else 0


def _run_timed(args: argparse.Namespace, device: torch.device, dtype: torch.dtype, settings: dict[str, Any]) -> dict[str, Any]:
    """Measure, print and draw; see `run`."""
    if args.sweep:
        return sweep(args, lambda model, optimizers: bench(model, optimizers, device, **settings), dtype)
    if args.model is None:
        raise OptionError("MODEL is missing: a name, a file, or --sweep")
    optimizers = chosen(args.optim, args.optim_args)
    model = load(args.model, dtype)
    result = bench(model, optimizers, device, targets=args.optim_target_modules, **settings)
    result = {"model": args.model, "clock": "CPU time" if args.cpu_time else "wall time", **result}
    print(text(result))
    _draw(result, args.plot)
    return result


def _draw(result: dict[str, Any], file: str | None) -> None:
    """Draw the steps of all optimizers, each with the least that the machine needs for it, if a file is named."""
    if file is None:
        return
    rows = []
    for name, e in result["optimizers"].items():
        step, least = e["step_ms"]["median"], (e.get("roofline") or {}).get("ms")
        parts = {"a step": step} if least is None else {"least, by the roofline": least, "above it": max(0.0, step - least)}
        rows.append((name, parts))
    figures.save(figures.bars("median step", rows, f"ms, {result['model']}", *figures.ON_WHITE), file)


def _run_launches(args: argparse.Namespace) -> int:
    """Count and print; see `run`."""
    alien = [name for name in ("sweep", "peers", "device", "threads", "cpu_time", "memory", "plot") if getattr(args, name)]
    if alien:
        raise OptionError(f"launches are counted without a device, and nothing is timed: leave out --{', --'.join(alien)}")
    if args.model is None:
        raise OptionError("MODEL is missing: a name or a file")
    optimizers, dtype = chosen(args.optim, args.optim_args), dtype_of(args.dtype)
    model = load(args.model, dtype)
    result: dict[str, Any] = {
        "model": args.model,
        "parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "dtype": str(dtype).removeprefix("torch."),
        "triton": has_triton(),
        "versions": {"torch": torch.__version__, **versions_used(optimizers)},
        "optimizers": {},
    }
    for name, options in optimizers.items():
        found = count(model, name, options, targets=args.optim_target_modules)
        result["optimizers"][name] = {"options": spelled_out(name, options), **found.report()}
    print(launches_text(result))
    write_json(args.json, result)
    return 0


def bench(
    model: nn.Module,
    optimizers: dict[str, dict[str, Any]],
    device: torch.device,
    *,
    targets: str | None = None,
    peers: Collection[str] = (),
    steps: int = 10,
    warmup: int = 2,
    memory: int = 2**63,
    quick: bool = False,
) -> dict[str, Any]:
    """Measure optimizers on a model's shapes.

    Args:
        model: on the meta device; gets parameters and gradients of random numbers on `device`.
        optimizers: name -> options, as `chosen` gives them.
        device: where.
        targets: `optim_target_modules`.
        peers: names of `PEERS` that are measured too, if they are installed.
        steps, warmup: timed and untimed steps of each.
        memory: bytes that parameters, gradients and states may take; those that do not fit are skipped, those that do not fit
            together run one batch after the other.
        quick: rates from small samples, for tests.

    Returns:
        As written to JSON; see docs/benchmarks. After Ctrl-C: what was timed until then, and "cut_short" is true.

    Raises:
        KeyboardInterrupt: if nothing was timed.
    """
    skipped: dict[str, str] = {}
    contenders = [
        Contender(
            name,
            functools.partial(build, name, options, targets=targets),
            sum(build(name, options, model, targets).estimate_footprint().values()),
            spelled_out(name, options),
        )
        for name, options in optimizers.items()
    ]
    params = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in params)
    own = 2 * sum(p.nbytes for p in params)
    if peers:
        m = (contenders[0].options or {}).get("window_size", 1024)
        contenders += _installed_peers(peers, m, count * _PEER_BYTES, skipped)
    work = Workload(model, device)
    rates = Rates(device, quick)
    entries: dict[str, dict[str, Any]] = {}
    batches, cut = list(_batches(contenders, memory - own, skipped)), False
    for batch in batches:
        try:
            if not cut:
                _measure(batch, work, rates, steps, warmup, skipped)
        except KeyboardInterrupt:
            cut = True
        for c in batch:
            try:
                if c.optimizer is not None and c.times:
                    entries[c.name] = c.report(work, apart=not cut)
            except KeyboardInterrupt:
                cut = True
                entries[c.name] = c.report(work, apart=False)
            if cut and not c.times:
                skipped.setdefault(c.name, "the run was cut short before its first timed step")
            c.optimizer = None
        gc.collect()
    if cut and not entries:
        raise KeyboardInterrupt
    usual, best = ({name: rate[which] for name, rate in rates.report().items()} for which in ("median", "max"))
    for entry in entries.values():
        if entry["counts"] is not None:
            entry["roofline"] = roofline.report(entry["counts"], usual)
            entry["ratio"] = entry["step_ms"]["median"] / entry["roofline"]["ms"]
            entry["best_ratio"] = entry["step_ms"]["min"] / roofline.report(entry["counts"], best)["ms"]
        del entry["counts"]
    return {
        "parameters": count,
        "dtype": str(work.params[0].dtype).removeprefix("torch."),
        "device": device.type,
        "machine": machine(device),
        "versions": versions_used(entries),
        "steps": steps,
        "batches": [[c.name for c in batch] for batch in batches],
        "rates": rates.report(),
        "optimizers": entries,
        "skipped": skipped,
        "cut_short": cut,
    }


def _measure(batch: list[Contender], work: Workload, rates: Rates, steps: int, warmup: int, skipped: dict[str, str]) -> None:
    """Make the optimizers of a batch, warm them up, and time them by turns."""
    for c in batch:
        _say(f"{c.name}: starting")
        _guarded(skipped, c, lambda c: c.start(work, warmup))
    for number in range(steps):
        work.new_gradients()
        rates.sample()
        running = [c for c in batch if c.optimizer is not None]
        first = number % max(1, len(running))
        _say(f"step {number + 1} of {steps}")
        for c in running[first:] + running[:first]:
            _guarded(skipped, c, lambda c: c.time_step(work))


def _guarded(skipped: dict[str, str], c: Contender, call: Callable[[Contender], None]) -> None:
    """call(c); a peer that raises is out, one of ours only where memory ends."""
    try:
        call(c)
    except Exception as error:
        out_of_memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if c.options is not None and not out_of_memory:
            raise
        c.optimizer = None
        lines = str(error).strip().splitlines() or [""]
        skipped[c.name] = f"raised {type(error).__name__}: {lines[0][:200]}"
        _say(f"{c.name}: {skipped[c.name]}")


def _installed_peers(names: Collection[str], m: int, size: int, skipped: dict[str, str]) -> Iterator[Contender]:
    for name in names:
        package, make = PEERS[name]
        if version(package) is None:
            skipped[name] = f"not installed: pip install {package}"
        else:
            yield Contender(name, _for_window(make, m), size)


def _for_window(make: Callable[[nn.Module, int], torch.optim.Optimizer], m: int) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return lambda model: make(model, m)


def _batches(contenders: list[Contender], memory: int, skipped: dict[str, str]) -> Iterator[list[Contender]]:
    """The contenders in lists that fit into memory together."""
    batch: list[Contender] = []
    used = 0
    for c in contenders:
        if c.size > memory:
            skipped[c.name] = f"its state of {gibibytes(c.size)} does not fit into the {gibibytes(max(0, memory))} that are left"
            continue
        if used + c.size > memory:
            yield batch
            batch, used = [], 0
        batch.append(c)
        used += c.size
    if batch:
        yield batch


def _device(name: str | None) -> torch.device:
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise OptionError(f"device={name!r}: must be cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise OptionError(f"device={name!r}: torch finds no CUDA device here")
    return torch.device(name)


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return int(_SHARE * torch.cuda.mem_get_info(device)[0])
    try:
        return int(_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (ValueError, OSError, AttributeError):  # not on this system
        return 2**63


def _say(line: str) -> None:
    print(f"[bench] {line}", file=sys.stderr, flush=True)
