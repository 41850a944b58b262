"""Make the runs of a spec that have no result yet, in worker processes side by side, and write every result as it comes.

    python recipes/reproduce/run.py recipes/reproduce/specs/quality.yaml
    python recipes/reproduce/run.py recipes/reproduce/specs/quality.yaml --tasks llama lora --contenders adamw --stage grid
    python recipes/reproduce/run.py recipes/reproduce/specs/quality.yaml --list

Every run computes on one thread, so that its result does not depend on what runs beside it. To stop (Ctrl-C) loses the runs in
progress and no other: the same command goes on.
"""

import argparse
import multiprocessing
import os
import signal
import sys
import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

from reproduce.contenders import Unavailable  # noqa: E402
from reproduce.spec import Run, Spec, SpecError, check_device, read_results, read_spec, write_result  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
STAGES = ("grid", "final")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("spec", type=Path, help="a .yaml file; reproduce/spec.py says what is in it")
    parser.add_argument("--tasks", nargs="+", help="only these tasks of the spec")
    parser.add_argument("--contenders", nargs="+", help="only these contenders of the spec")
    parser.add_argument("--stage", choices=STAGES, help="only the grid, or only the runs of the table; default: both")
    parser.add_argument("--processes", type=int, default=2, help="runs side by side")
    parser.add_argument("--results", type=Path, help="folder of the results; default: reproduce/results/NAME_OF_SPEC")
    parser.add_argument("--again", action="store_true", help="repeat runs that have a result; the later one counts")
    parser.add_argument("--list", action="store_true", help="only list the runs that have no result")
    return parser.parse_args(argv)


# A worker -----------------------------------------------------------------------------------------------------------------


def work(connection: Connection, folder: Path, device: str) -> None:
    """Make the runs that come through the connection on `device`, write their results, and send them back, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's Ctrl-C
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    from reproduce.training import facts, train

    while True:
        try:
            run: Run = connection.recv()
        except EOFError:
            return
        try:
            start = time.perf_counter()
            record = train(run.task, run.contender.build, run.rate, run.seed, device)
            names = {"key": run.key(), "label": run.label, "contender": run.contender.name, **run.identity()}
            result = names | record | {"run_seconds": round(time.perf_counter() - start, 2)} | facts(device)
            write_result(folder, run.label, result)
            connection.send(result)
        except Exception:
            connection.send(traceback.format_exc())


# The parent ---------------------------------------------------------------------------------------------------------------


def usable(spec: Spec) -> Spec:
    """The spec without the contenders that cannot be built here; prints a line for each of them."""
    families = {}
    for family, contenders in spec.families.items():
        families[family] = []
        for contender in contenders:
            try:
                contender.check()
                families[family].append(contender)
            except Unavailable as error:
                print(f"left out: {error}", flush=True)
    families = {family: members for family, members in families.items() if members}
    return Spec(**{**vars(spec), "families": families})


def check_names(spec: Spec, options: argparse.Namespace) -> None:
    """Raise SpecError for a task or contender of the flags that the spec does not have."""
    contenders = {name for f, members in spec.families.items() for name in (f, *(c.name for c in members))}
    for flag, given, known in (("--tasks", options.tasks, spec.tasks), ("--contenders", options.contenders, contenders)):
        for name in given or []:
            if name not in known:
                raise SpecError(f"{flag} {name}: {options.spec.name} has {', '.join(sorted(known))}")


def selected(spec: Spec, results: dict, options: argparse.Namespace) -> list[Run]:
    """The wanted runs that the flags select."""
    names = {c.name for f, members in spec.families.items() for c in members if f in (options.contenders or [])}
    names |= set(options.contenders or [])
    return [
        run
        for run in spec.wanted(results)
        if (not options.tasks or run.label in options.tasks)
        and (not options.contenders or run.contender.name in names)
        and (not options.stage or run.stage == options.stage)
    ]


def seconds_left(runs: list[Run], results: dict, processes: int) -> float:
    """A guess from the runs of the same task, or of all tasks."""
    times: dict[str, list[float]] = {}
    for result in results.values():
        for label in (result["label"], ""):
            times.setdefault(label, []).append(result["run_seconds"])
    means = {label: sum(values) / len(values) for label, values in times.items()}
    return sum(means.get(run.label, means.get("", 60.0)) for run in runs) / processes


def describe(result: dict) -> str:
    """What a run reached, in a few words."""
    if result["diverged_at"] is not None:
        return f"diverged at step {result['diverged_at']}"
    return f"validation {result['validation']['loss']:.4f}, test {result['test']['loss']:.4f}, {result['run_seconds']:.0f} s"


def execute(spec: Spec, folder: Path, options: argparse.Namespace) -> list[Run]:
    """Make the runs; returns those that failed with an error."""
    os.environ.update(ONE_THREAD)  # of the workers, which start anew
    context = multiprocessing.get_context("spawn")
    results, fresh, failed = read_results(folder), set(), []
    idle: list[Connection] = []
    running: dict[Connection, Run] = {}

    def start() -> Connection:
        ours, theirs = context.Pipe()
        context.Process(target=work, args=(theirs, folder, spec.device), daemon=True).start()
        theirs.close()  # so that the end of a worker is seen
        return ours

    while True:
        stuck = {run.key() for run in [*failed, *running.values()]}
        wanted = selected(spec, results, options)
        left = [r for r in wanted if r.key() not in fresh and (options.again or r.key() not in results)]
        for run in [r for r in left if r.key() not in stuck][: options.processes - len(running)]:
            worker = idle.pop() if idle else start()
            running[worker] = run
            worker.send(run)
        if not running:
            return failed
        for worker in wait(list(running)):
            run = running.pop(worker)
            answer = worker.recv()  # EOFError: the worker was killed
            if isinstance(answer, str):
                worker.close()  # which ends it: after an error of CUDA nothing more can run in it
                failed.append(run)
                print(f"{run} failed:\n{answer}", file=sys.stderr, flush=True)
                continue
            idle.append(worker)
            results[run.key()] = answer
            fresh.add(run.key())
            left = [r for r in left if r.key() != run.key()]
            minutes = round(seconds_left(left, results, options.processes) / 60)
            count = f"{len(wanted) - len(left)} of {len(wanted)}, {minutes // 60} h {minutes % 60:02d} min left"
            print(f"[{count}] {run}: {describe(answer)}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    options = parse_arguments(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the workers too
    try:
        spec = read_spec(options.spec)
        check_names(spec, options)
        if spec.device == "cuda" and not options.list and not torch.cuda.is_available():
            raise SpecError(f"{options.spec}: device: cuda, but torch {torch.__version__} finds no GPU here")
        spec = usable(spec)
        folder = options.results or RESULTS / spec.name
        results = read_results(folder)
        check_device(spec, results)
    except SpecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(str(run) for run in selected(spec, results, options) if run.key() not in results))
        return 0
    try:
        failed = execute(spec, folder, options)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except (EOFError, ConnectionError):
        print("error: a worker was killed (out of memory?); the same command goes on", file=sys.stderr)
        return 1
    if failed:
        print("failed: " + "; ".join(map(str, failed)), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
