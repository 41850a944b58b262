"""Local updates beside DDP: what the workers send each other, and what they learn. MiniLM-L6 on BBC sentences, on this machine.

    python recipes/local_updates.py --runs ddp lordo:sync_every=8 lordo:sync_every=32

A run is a name, or name:option=value,...  Names:

    ddp      AdamW, whose gradients are all-reduced at every step; optim=NAME for one of this package
    local    the workers train alone by AdamW (or optim=NAME), and average their weights
    diloco   the same, with DiLoCo's outer Nesterov step (outer_lr 0.7, outer_momentum 0.9)
    lordo    LoRDO

Options are those of LocalUpdates (sync_every, ...), of the optimizer (rank, omega, ...) and lr. The workers are processes of this
machine with one thread each, which gloo connects. Every worker takes its share of each batch. Writes OUTPUT.json (every run, also
its losses by step) and OUTPUT.md. Runs that OUTPUT.json has already are not repeated.

    python recipes/local_updates.py --runs lordo:sync_every=8 --num_processes 3 --batch_size 18 --min_workers 2 --kill_at_step 20

lets the last worker die after 20 steps: the others go on at their next synchronisation. Without --min_workers they stop.
"""

import argparse
import csv
import importlib.util
import json
import os
import platform
import shlex
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import hf_efcp
from hf_efcp.local import LocalUpdates, LoRDO
from hf_efcp.local.asked import LocalOptions
from hf_efcp.options import OptionError, field_types
from hf_efcp.registry import parse_optim_args

NAMES = ("ddp", "local", "diloco", "lordo")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["ddp", "lordo:sync_every=8"], help="what to compare, see above")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1], help="seeds of order, head and dropout")
    parser.add_argument("--num_processes", type=int, default=2, help="workers")
    parser.add_argument("--max_steps", type=int, default=96)
    parser.add_argument("--batch_size", type=int, default=16, help="of all workers together")
    parser.add_argument("--learning_rate", type=float, default=2e-4, help="falls to zero on a line; a run's lr=... overrides it")
    parser.add_argument("--max_grad_norm", type=float, default=1.0, help="norm to which every worker's own gradient is clipped")
    parser.add_argument("--max_seq_length", type=int, default=48)
    parser.add_argument("--max_eval_samples", type=int, default=1000)
    parser.add_argument("--model_name_or_path", default=None, help="another model than MiniLM-L6")
    parser.add_argument("--num_hidden_layers", type=int, default=None, help="keep this many of the model's layers")
    parser.add_argument("--freeze_embeddings", action="store_true", help="do not train the embeddings")
    parser.add_argument(
        "--train_file", default=None, help="a .csv file with the columns text and label, instead of BBC sentences"
    )
    parser.add_argument("--validation_file", default=None, help="the same, to evaluate on")
    parser.add_argument("--min_workers", type=int, default=None, help="go on without workers that die, while so many are left")
    parser.add_argument("--worker_timeout", type=float, default=20.0, help="seconds to wait for a worker, with --min_workers")
    parser.add_argument("--kill_at_step", type=int, default=None, help="after this step the last worker dies")
    parser.add_argument("--output", type=Path, default=Path("outputs/local_updates"), help="path without suffix")
    parser.add_argument(
        "--plot", type=Path, default=None, help="draw losses over steps and over bytes sent here (needs matplotlib)"
    )
    arguments = parser.parse_args(argv)
    try:
        for run in arguments.runs:
            options_of(run)
    except OptionError as error:
        parser.error(str(error))
    for name in ("num_processes", "max_steps", "batch_size"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)}: must be an integer >= 1")
    if (arguments.train_file is None) != (arguments.validation_file is None):
        parser.error("--train_file and --validation_file: give both, or none for BBC sentences")
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"--plot {arguments.plot}: needs matplotlib: pip install matplotlib")
    if arguments.batch_size % arguments.num_processes:
        parser.error(f"--batch_size {arguments.batch_size}: must be a multiple of --num_processes {arguments.num_processes}")
    if arguments.kill_at_step is not None and len(arguments.runs) * len(arguments.seeds) > 1:
        parser.error("--kill_at_step: one run and one seed at a time, as the worker is gone afterwards")
    return arguments


def options_of(run: str) -> tuple[str, dict, dict, float | None]:
    """Take a run apart: its name, the options of LocalUpdates, those of the optimizer, and its learning rate."""
    name, _, text = run.partition(":")
    if name not in NAMES:
        raise OptionError(f"unknown run {name!r}: valid: {', '.join(NAMES)}")
    given = parse_optim_args(text or None)
    lr = given.pop("lr", None)
    local = {k: given.pop(k) for k in list(given) if k in field_types(LocalOptions)}
    if name == "ddp" and local:
        raise OptionError(f"{run}: {', '.join(local)}: ddp has no options of local updates")
    if name == "diloco":
        local = {"outer_lr": 0.7, "outer_momentum": 0.9, **local}
    LocalUpdates.check(local)
    make_optimizer(name, torch.nn.Linear(2, 2), 0.0, given)  # raises for a bad option
    return name, local, given, None if lr is None else float(lr)


def make_optimizer(name: str, model: torch.nn.Module, lr: float, options: dict) -> torch.optim.Optimizer:
    """Make a run's optimizer."""
    options = dict(options)
    optim = options.pop("optim", "adamw")
    if name == "lordo":
        if optim != "adamw":
            raise OptionError(f"lordo:optim={optim}: lordo is an optimizer itself")
        return LoRDO(hf_efcp.parameter_groups(model), lr=lr, **{"preset": "measured", **options})
    trained = [p for p in model.parameters() if p.requires_grad]
    if optim == "adamw":
        if options:
            raise OptionError(f"{name}: {', '.join(options)}: AdamW has no such option here")
        return torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    return hf_efcp.create_optimizer(optim, hf_efcp.parameter_groups(model), lr=lr, **{"preset": "measured", **options})


# A worker ------------------------------------------------------------------------------------------------------------------


def texts_of(arguments: argparse.Namespace) -> tuple[list[tuple[str, int]], list[tuple[str, int]], int]:
    """Give (text, label) of the training and of the evaluation data, and the number of labels."""
    if arguments.train_file:
        rows = []
        for file in (arguments.train_file, arguments.validation_file):
            with open(file, newline="") as lines:
                rows.append([(row["text"], row["label"]) for row in csv.DictReader(lines)])
        labels = sorted({label for _, label in rows[0]})
        train, test = ([(text, labels.index(label)) for text, label in part] for part in rows)
        return train, test[: arguments.max_eval_samples], len(labels)
    from hf_efcp.demo.bbc import bbc_news

    data = bbc_news("sentences")
    train, test = (list(zip(data[split]["text"], data[split]["label"], strict=True)) for split in ("train", "test"))
    return train, test[: arguments.max_eval_samples], data["train"].features["label"].num_classes


def build_model(arguments: argparse.Namespace, labels: int) -> tuple[torch.nn.Module, transformers.PreTrainedTokenizerBase]:
    """Give the classifier and its tokenizer."""
    from hf_efcp.demo.bbc import minilm_folder

    source = arguments.model_name_or_path or minilm_folder()
    given = {} if arguments.num_hidden_layers is None else {"num_hidden_layers": arguments.num_hidden_layers}
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=labels, **given)
    if arguments.freeze_embeddings:
        model.get_input_embeddings().weight.requires_grad_(False)
    return model, AutoTokenizer.from_pretrained(source)


def train(run: str, seed: int, arguments: argparse.Namespace, texts: tuple, folder: Path) -> None:
    """Train one run on this worker with the texts of `texts_of`, evaluate its share, and write both into `folder`."""
    name, local_options, optimizer_options, lr = options_of(run)
    data, test, labels = texts
    set_seed(seed)
    accelerator = Accelerator(cpu=True)
    model, tokenizer = build_model(arguments, labels)

    def collate(rows):
        texts, targets = zip(*rows, strict=True)
        length = {"padding": True, "truncation": True, "max_length": arguments.max_seq_length}
        return {**tokenizer(list(texts), return_tensors="pt", **length), "labels": torch.tensor(targets)}

    optimizer = make_optimizer(name, model, lr or arguments.learning_rate, optimizer_options)
    share = arguments.batch_size // arguments.num_processes
    order = torch.Generator().manual_seed(seed)
    loader = DataLoader(data, batch_size=share, shuffle=True, generator=order, collate_fn=collate, drop_last=True)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer.optimizer, lambda step: max(0.0, 1 - step / arguments.max_steps))
    sent, local = {"bytes": 0}, None
    if name != "ddp":
        limits = {} if arguments.min_workers is None else {k: getattr(arguments, k) for k in ("min_workers", "worker_timeout")}
        local = LocalUpdates(accelerator, wrapped, optimizer, **{**limits, **local_options})
    elif accelerator.num_processes > 1:
        wrapped.register_comm_hook(sent, all_reduced)

    torch.manual_seed(1000 * seed + accelerator.process_index)  # dropout differs
    losses, bytes_by_step, batches, started = [], [], iter(loader), time.process_time()
    wrapped.train()
    while len(losses) < arguments.max_steps:
        batch = next(batches, None)
        if batch is None:
            batches = iter(loader)
            continue
        loss = wrapped(**batch).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), arguments.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        bytes_by_step.append(sent["bytes"] if local is None else local.bytes_sent)
        if len(losses) == arguments.kill_at_step and accelerator.process_index == arguments.num_processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if local is not None:
        local.synchronize()
        bytes_by_step[-1] = local.bytes_sent
    seconds = time.process_time() - started

    members = list(range(accelerator.num_processes)) if local is None else local.workers.members
    mine = test[members.index(accelerator.process_index) :: len(members)]
    right, total = 0, 0.0
    model.eval()
    with torch.no_grad():
        for start in range(0, len(mine), 64):
            batch = collate(mine[start : start + 64])
            out = model(**batch)
            right += (out.logits.argmax(-1) == batch["labels"]).sum().item()
            total += out.loss.item() * len(batch["labels"])
    result = {
        "members": members,
        "right": right,
        "loss": total,
        "samples": len(mine),
        "losses": losses,
        "bytes": bytes_by_step,
        "rounds": 0 if local is None else local.rounds,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "cpu_seconds": seconds,
    }
    written(folder / f"{accelerator.process_index}.json", json.dumps(result))
    accelerator.free_memory()


def all_reduced(sent: dict, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Do what DDP does without a hook, and count the bytes (8 kB of BERT's positions, sent by the first one, are not)."""
    sent["bytes"] += bucket.buffer().nbytes
    mean = bucket.buffer().div_(dist.get_world_size())
    return dist.all_reduce(mean, async_op=True).get_future().then(lambda done: done.value()[0])


def worker(rank: int, arguments: argparse.Namespace, wanted: list[tuple[str, int]], folder: str) -> None:
    """Make all runs on one worker."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if arguments.num_processes > 1:
        ranks = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": arguments.num_processes,
            "LOCAL_WORLD_SIZE": arguments.num_processes,
        }
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(ACCELERATE_USE_CPU="true", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # Accelerate wants to be told
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        # A store in a file outlives every worker; that of torchrun would too, but torchrun ends all workers when one dies.
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=arguments.num_processes)
    texts = texts_of(arguments)
    for number, (run, seed) in enumerate(wanted):
        place = Path(folder, str(number))
        place.mkdir(exist_ok=True)
        train(run, seed, arguments, texts, place)
        if rank == 0:
            print(f"{run}, seed {seed}: trained", flush=True)
    if arguments.num_processes > 1:
        Path(folder, f"{rank}.done").touch()
        sys.stdout.flush()
        os._exit(0)  # a group with a dead worker cannot be left in order


def written(file: Path, text: str) -> None:
    """Write a file that is never there in part."""
    part = file.with_suffix(".part")
    part.write_text(text)
    part.replace(file)


# All of them -----------------------------------------------------------------------------------------------------------------


def make_runs(wanted: list[tuple[str, int]], arguments: argparse.Namespace) -> Iterator[dict]:
    """Start the workers, and give the result of each run when all of them have finished it."""
    with tempfile.TemporaryDirectory() as folder:
        started = []
        if arguments.num_processes == 1:
            worker(0, arguments, wanted, folder)
        elif wanted:
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an orderly end takes the workers along
            context = mp.get_context("spawn")
            for rank in range(arguments.num_processes):
                started.append(context.Process(target=worker, args=(rank, arguments, wanted, folder), daemon=True))
                started[-1].start()
        for number, (run, seed) in enumerate(wanted):
            if (result := awaited(Path(folder, str(number)), run, seed, arguments, started)) is None:
                print(f"error: {run}, seed {seed}: a worker did not finish, see above", file=sys.stderr)
                break
            yield result
        for process in started:
            process.join()


def awaited(folder: Path, run: str, seed: int, arguments: argparse.Namespace, workers: list) -> dict | None:
    """Give the result of a run as soon as it is there; None: all workers have ended without it."""
    while True:
        alive = any(process.is_alive() for process in workers)  # asked first: who ends meanwhile has written
        result = collected(folder, run, seed, arguments)
        if result is not None or not alive:
            return result
        time.sleep(0.5)


def collected(folder: Path, run: str, seed: int, arguments: argparse.Namespace) -> dict | None:
    """Put together what the workers have written of a run; None: not all have."""
    files = sorted(folder.glob("*.json"))
    parts = [json.loads(file.read_text()) for file in files]
    if not parts or {int(file.stem) for file in files} < set(parts[0]["members"]):
        return None
    samples = sum(part["samples"] for part in parts)
    return {
        "run": run,
        "seed": seed,
        "settings": settings(arguments),
        "accuracy": sum(part["right"] for part in parts) / samples,
        "eval_loss": sum(part["loss"] for part in parts) / samples,
        "eval_samples": samples,
        "losses": [round(statistics.mean(step), 5) for step in zip(*(part["losses"] for part in parts), strict=True)],
        "bytes": [max(step) for step in zip(*(part["bytes"] for part in parts), strict=True)],
        "rounds": parts[0]["rounds"],
        "workers_left": len(parts[0]["members"]),
        "trained": parts[0]["trained"],
        "cpu_seconds": sum(part["cpu_seconds"] for part in parts),
    }


def settings(arguments: argparse.Namespace) -> dict:
    """Give what a run depends on beside its name and seed."""
    left_out = {"runs", "seeds", "output", "plot"}
    return {name: value for name, value in vars(arguments).items() if name not in left_out}


def command() -> str:
    """Give the command line."""
    return " ".join(["python", "recipes/local_updates.py", *map(shlex.quote, sys.argv[1:])])


def table(results: list[dict], arguments: argparse.Namespace) -> str:
    """Write the results as a page of Markdown, with what is needed to repeat them."""
    cases: dict[str, list[dict]] = {}
    for result in results:
        cases.setdefault(result["run"], []).append(result)
    first = next(iter(cases.values()))
    base = {r["seed"]: r for r in first}
    what = arguments.model_name_or_path or "MiniLM-L6"
    lines = [
        f"{what}, {first[0]['trained'] / 1e6:.1f}M trained parameters, {arguments.train_file or 'BBC sentences'}, "
        f"{arguments.max_steps} steps at batch {arguments.batch_size} of {arguments.num_processes} workers, "
        f"{first[0]['eval_samples']} evaluation texts, seeds {', '.join(map(str, arguments.seeds))}; differences to the first "
        f"row are paired by seed. {os.cpu_count()} CPU cores ({platform.machine()}), one thread a worker, Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}, hf_efcp "
        f"{hf_efcp.__version__}.",
        "",
        "| run | MB sent by a worker | of the first row's | accuracy, % | to the first row | test loss | to the first row |",
        "|---|---|---|---|---|---|---|",
    ]
    for run, group in cases.items():
        sent, whole = (statistics.mean(r["bytes"][-1] for r in rs) for rs in (group, first))
        paired = [(r, base[r["seed"]]) for r in group if r["seed"] in base]
        accuracy, loss = [100 * r["accuracy"] for r in group], [r["eval_loss"] for r in group]
        by_accuracy = (
            "" if run == next(iter(cases)) else with_error([100 * (r["accuracy"] - b["accuracy"]) for r, b in paired], 2, "+")
        )
        by_loss = "" if run == next(iter(cases)) else with_error([r["eval_loss"] - b["eval_loss"] for r, b in paired], 4, "+")
        ratio = f"1/{whole / sent:.1f}" if sent and run != next(iter(cases)) else ""
        cells = f"`{run}`", f"{sent / 1e6:.1f}", ratio, with_error(accuracy, 2), by_accuracy, with_error(loss, 4), by_loss
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def with_error(numbers: list[float], digits: int, sign: str = "") -> str:
    """Write a mean with its standard error, if there are several numbers."""
    text = f"{statistics.mean(numbers):{sign}.{digits}f}"
    return text if len(numbers) < 2 else f"{text} ± {statistics.stdev(numbers) / len(numbers) ** 0.5:.{digits}f}"


def plot(results: list[dict], file: Path) -> None:
    """Draw the running mean of the training loss over steps, and over megabytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for run in dict.fromkeys(r["run"] for r in results):
        group = [r for r in results if r["run"] == run]
        losses = torch.tensor([r["losses"] for r in group]).mean(0)
        sent = torch.tensor([r["bytes"] for r in group], dtype=torch.float64).mean(0) / 1e6
        width = min(8, len(losses))
        smooth = losses.unfold(0, width, 1).mean(1)
        left.plot(range(width, len(losses) + 1), smooth, label=run)
        right.plot(sent[width - 1 :], smooth, label=run, marker=".", markersize=3)
    left.set(xlabel="steps", ylabel="training loss, mean of 8 steps")
    right.set(xlabel="MB sent by a worker", xscale="symlog")
    right.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main(argv: list[str] | None = None) -> list[dict]:
    """Make the runs that are not there yet, and write and print the table."""
    arguments = parse_arguments(argv)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    file = arguments.output.with_suffix(".json")
    there = json.loads(file.read_text()) if file.exists() else []
    known = {(r["run"], r["seed"]): r for r in there if r["settings"] == json.loads(json.dumps(settings(arguments)))}
    wanted = [(run, seed) for seed in arguments.seeds for run in arguments.runs]
    for result in make_runs([w for w in wanted if w not in known], arguments):
        known[result["run"], result["seed"]] = result
        there.append(result)
        written(file, "[\n" + ",\n".join(json.dumps(r) for r in there) + "\n]\n")
    if len(done := [w for w in wanted if w in known]) < len(wanted):
        sys.exit(1)
    results = [known[w] for w in done]
    page = f"`{command()}`\n\n{table(results, arguments)}" if argv is None else table(results, arguments)
    arguments.output.with_suffix(".md").write_text(page)
    print(page)
    if arguments.plot:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(results, arguments.plot)
    return results


if __name__ == "__main__":
    main()
