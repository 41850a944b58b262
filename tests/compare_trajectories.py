"""Show that the working tree trains every optimizer as another commit does, to the bit, and as fast.

    python tests/compare_trajectories.py --base COMMIT [--quick] [--times]

trajectories.py runs on a git worktree of the commit and on the working tree, both on this machine, since sums of matrix products
differ between CPUs. Every parameter and every tensor of state is compared after every step. The exit status is 1 if one differs.
On several processes the report also says whether a difference keeps the bound that such runs have (fp64: 1e-9).
`--quick`: one process, 12 steps. `--times` compares step times instead: one step of each tree in turn, medians.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
DRIVER = ROOT / "tests" / "trajectories.py"
BOUND = 1e-9  # of fp64 on several processes
ROUNDS, WARM_UP = 15, 3


@contextlib.contextmanager
def worktree(commit):
    """A folder with the files of the commit, for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "base")
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(path), commit], check=True, capture_output=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "remove", "--force", str(path)], check=True, capture_output=True)


def in_tree(tree, *command, **kwargs):
    """A Python process that imports the package of `tree`."""
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    environment = {**os.environ, **environment, "PYTHONPATH": str(tree), "HF_EFCP_TREE": str(tree)}
    return subprocess.Popen([sys.executable, *map(str, command)], env=environment, cwd=tree, **kwargs)


# Bits ---------------------------------------------------------------------------------------------------------------------


def both(trees, steps, processes):
    """The results of the driver on both trees, which run side by side."""
    with tempfile.TemporaryDirectory() as folder:
        outs = [Path(folder, f"{i}.pt") for i in range(2)]
        running = [in_tree(t, DRIVER, out, steps, processes) for t, out in zip(trees, outs, strict=True)]
        if any([process.wait() for process in running]):
            raise SystemExit("a tree's run failed: see above")
        return [torch.load(out, weights_only=True) for out in outs]


def first_difference(a, b):
    """Where two results of a configuration differ first, in words; None: nowhere."""
    if "error" in a or "error" in b:
        texts = [f"{name}: {r['error']}" for name, r in (("base", a), ("here", b)) if "error" in r]
        return "; ".join(texts)
    for step, (before, after) in enumerate(zip(a["hashes"], b["hashes"], strict=True), 1):
        for entry in [*before, *(after.keys() - before.keys())]:
            x, y = before.get(entry, "absent"), after.get(entry, "absent")
            if x != y:
                kinds = [hashed.partition(" ")[2] or hashed for hashed in (x, y)]  # dtype and length
                return f"step {step}, {entry}" + (f": {kinds[0]} -> {kinds[1]}" if kinds[0] != kinds[1] else "")
    return None


def distance(a, b):
    """How far the parameters are apart at the end, relative."""
    if "error" in a or "error" in b or a["end"].shape != b["end"].shape:
        return float("nan")
    return ((a["end"] - b["end"]).norm() / a["end"].norm()).item()


def report(base, here):
    """Print a line for each format and placement; returns whether all bits are equal."""
    rows, differences = {}, 0
    for key, before in base.items():
        name, form, placement, rank = key
        same, told = rows.setdefault((form, placement), [{}, []])
        text = first_difference(before, here[key]) if key in here else "not in this tree"
        same[name] = same.get(name, True) and text is None
        if text is None:
            continue
        differences += 1
        far = distance(before, here[key]) if key in here else float("nan")
        kept = ""
        if placement != "one process" and form.startswith("fp64"):
            kept = f" ({'within' if far <= BOUND else 'NOT within'} the bound of {BOUND})"
        told.append(f"{name}, rank {rank}: {text}; parameters {far:.1e} apart{kept}")
    print("| format | placement | equal bits | first difference |\n|---|---|---|---|")
    for (form, placement), (same, told) in rows.items():
        names = f"{sum(same.values())} of {len(same)}"
        print(f"| {form} | {placement} | {'yes' if all(same.values()) else 'NO'}, {names} | {told[0] if told else ''} |")
        for more in told[1:]:
            print(f"| | | | {more} |")
    added = sorted({key[0] for key in here} - {key[0] for key in base})
    if added:
        print(f"\nNot compared, since the base has no such optimizer: {', '.join(added)}")
    print(f"\n{len(base)} runs, {differences} differ, {sum(len(r.get('hashes', ())) for r in base.values())} steps of the base")
    return differences == 0


# Times --------------------------------------------------------------------------------------------------------------------


class Worker:
    """A process of one tree that takes steps when it is told to."""

    def __init__(self, tree):
        self.process = in_tree(tree, DRIVER.with_name("step_times.py"), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *command):
        """The answer to a command of step_times.py."""
        print(json.dumps(command), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a tree's run failed: see above")
        return json.loads(line)

    def end(self):
        """Let the process end by itself."""
        self.process.stdin.close()
        self.process.wait()


def times(trees, names):
    """Print the step times of both trees on MiniLM's shapes; both states have to fit in memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    workers = [Worker(tree) for tree in trees]
    print("| optimizer | window | base, ms | here, ms | ratio of medians | median of ratios |\n|---|---|---|---|---|---|")
    for name in names:
        for window_size in (32, 128):
            size = max(worker.ask("build", name, window_size) for worker in workers)
            if 2 * size > 0.7 * memory:
                print(f"| {name} | {window_size} | not run: states of {size / 1e9:.0f} GB in both trees do not fit | | | |")
                continue
            for _ in range(WARM_UP):
                for worker in workers:
                    worker.ask("step")
            pairs = [[worker.ask("step") for worker in workers] for _ in range(ROUNDS)]
            a, b = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = statistics.median(y / x for x, y in pairs)
            print(f"| {name} | {window_size} | {1e3 * a:.1f} | {1e3 * b:.1f} | {b / a:.3f} | {ratio:.3f} |", flush=True)
    for worker in workers:
        worker.end()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="COMMIT", help="the commit to compare with")
    parser.add_argument("--quick", action="store_true", help="one process, 12 steps")
    parser.add_argument("--times", action="store_true", help="step times instead of bits")
    arguments = parser.parse_args()
    with worktree(arguments.base) as base:
        trees = base, ROOT
        if arguments.times:
            listing = in_tree(base, "-c", "import hf_efcp; print(*hf_efcp.list_optimizers())", stdout=subprocess.PIPE, text=True)
            times(trees, listing.communicate()[0].split())
            return 0
        results = [{}, {}]
        for processes in ("one",) if arguments.quick else ("one", "several"):
            for all_, some in zip(results, both(trees, 12 if arguments.quick else 50, processes), strict=True):
                all_ |= some
    return 0 if report(*results) else 1


if __name__ == "__main__":
    sys.exit(main())
