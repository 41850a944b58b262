"""Measure how the package is built, before and after, as a table in Markdown.

    python tests/structure.py [--base COMMIT]

One gradient's way: the third step of LowRankMFAC on one (12, 30) parameter in one process, in plain torch (HF_EFCP_KERNELS=0),
traced by sys.setprofile. Counted are Python functions of hf_efcp; torch's in between are not seen. A change of file is a call
from one file of hf_efcp into another, or the return from it. The second count of files is of those alone whose functions are
handed the gradient: a tensor with its memory, a list of them, or an object that has the list.

Private names: one underscore in front; torch's own are left out. On an optimizer: of the class LowRankMFAC, and of an object of
it after a step, the object's attributes included. Shared between files: `self._x` in two or more files of optim/ and engine/.
Used elsewhere: defined in optim/ or engine/ and used, as `anything._x`, in a file of hf_efcp that does not define it.

Parsing of names: lines that look for a word such as mfac in an optimizer's name or at its ends, or split the name at a `_`.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from compare_trajectories import ROOT, in_tree, worktree

_PART = r"""["']_?(?:lowrank|sparse|dense|mfac|ggt)_?["']"""
_PARSED = re.compile(
    rf"""{_PART} (?:not )?in\b|\.(?:startswith|endswith|removeprefix|removesuffix)\({_PART}\)"""
    r"""|\bname\.(?:r?split|r?partition)\(["']_["']"""
)
# Row of the table -> what is aimed at; the functions below return these rows in this order.
TARGETS = {
    "files in a step of one gradient": "7",
    "changes of file in a step": "60",
    "files whose functions are handed the gradient": "7",
    "changes of file between those": "60",
    "functions in a step": "",
    "private names of the class LowRankMFAC": "25",
    "private names of one object after a step": "25",
    "private names shared between files of optim/, engine/": "0",
    "private names used in files that do not define them": "0",
    "type errors (mypy)": "0",
    "lines that parse an optimizer's name": "0",
    "lines of optim/ and engine/": "",
    "longest file in hf_efcp/": "350",
    "longest class in hf_efcp/": "250",
    "longest file in tests/": "350",
}


# The running package: called with PYTHONPATH set to the tree ----------------------------------------------------------------


def holds(value, memory):
    """Whether a value is the gradient, or has it."""
    if hasattr(value, "untyped_storage"):
        return value.device.type == "cpu" and value.untyped_storage().data_ptr() == memory
    if isinstance(value, list | tuple):
        return any(holds(one, memory) for one in value)
    return holds(getattr(value, "gradients", None), memory) if isinstance(getattr(value, "gradients", None), list) else False


def traced_step(optimizer, package, memory):
    """(files in the order in which control is in them, those of calls with the gradient, names of the functions) of one step."""
    stack, files, handed, functions = [], [], [], set()

    def profile(frame, event, _):
        file = frame.f_code.co_filename
        if not file.startswith(package):
            return
        if event == "call":
            stack.append(file)
            functions.add((file, frame.f_code.co_firstlineno, frame.f_code.co_name))
            files.append(file)
            if any(holds(value, memory) for value in frame.f_locals.values()):
                handed.append(file)
        elif event == "return":
            stack.pop()
            files.extend(stack[-1:])

    sys.setprofile(profile)
    optimizer.step()
    sys.setprofile(None)
    return files, handed, functions


def measure_running():
    """Print what a step and an optimizer object show, as JSON."""
    os.environ["HF_EFCP_KERNELS"] = "0"
    import torch

    import hf_efcp

    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(12, 30, generator=generator))
    optimizer = hf_efcp.LowRankMFAC([p], lr=0.01, rank=2, window_size=8, update_rms=0.1)
    for step in range(3):
        p.grad = torch.randn(12, 30, generator=generator)
        if step < 2:
            optimizer.step()
    files, handed, functions = traced_step(optimizer, str(Path(hf_efcp.__file__).parent), p.grad.untyped_storage().data_ptr())
    plain = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    names = [
        {n for n in dir(thing) if n.startswith("_") and not n.startswith("__")} - set(dir(plain))
        for thing in (type(optimizer), optimizer)
    ]
    counts = [n for way in (files, handed) for n in (len(set(way)), sum(a != b for a, b in pairwise(way)))]
    named = {f for f in functions if not f[2].startswith("<")}
    print(json.dumps([*counts, len(named), *map(len, names)]))


# The text of the package ------------------------------------------------------------------------------------------------------


def private(name):
    """Whether the name has one underscore in front."""
    return name.startswith("_") and not name.startswith("__")


def names_in(file):
    """(private names that the file defines, attributes `x._name` that it uses, those of `self`)."""
    defined, used, of_self = set(), set(), set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id == "self"
            used.add(node.attr)
            if own:
                of_self.add(node.attr)
            if own and isinstance(node.ctx, ast.Store):
                defined.add(node.attr)
    return set(filter(private, defined)), used, of_self


def shared_names(package):
    """(`self._x` in two files of optim/ and engine/, names used in a file that does not define them)."""
    engine = [f for part in ("optim", "engine") for f in (package / part).glob("*.py")]
    by_self, definitions = defaultdict(set), set()
    for file in engine:
        defined, _, of_self = names_in(file)
        definitions |= defined
        for name in of_self:
            by_self[name].add(file)
    elsewhere = set()
    for file in package.rglob("*.py"):
        defined, used, _ = names_in(file)
        elsewhere |= (used & definitions) - defined
    return {name for name, files in by_self.items() if len(files) > 1}, elsewhere


def type_errors(tree):
    """Of mypy with the tree's own settings, or with its default ones where there are none; none where it is not installed."""
    own = "[mypy]" in (tree / "setup.cfg").read_text()
    command = ["mypy", "--cache-dir=/dev/null", *([] if own else ["--config-file=", "--ignore-missing-imports", "hf_efcp"])]
    run = subprocess.run([sys.executable, "-m", *command], cwd=tree, capture_output=True, text=True)
    counted = re.search(r"Found (\d+) errors?", run.stdout)
    if counted:
        return int(counted[1])
    return 0 if "Success" in run.stdout else "not installed"


def longest(files, tree, classes=False):
    """Lines and place of the longest file, or class."""
    sizes = []
    for file in files:
        text = file.read_text()
        if classes:
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ClassDef):
                    sizes.append((node.end_lineno - node.lineno + 1, node.name))
        else:
            sizes.append((len(text.splitlines()), str(file.relative_to(tree))))
    lines, name = max(sizes)
    return f"{lines}: `{name}`"


def measure(tree, verbose=False):
    """The right-hand column of the table for a tree."""
    running = in_tree(tree, __file__, "--running", stdout=subprocess.PIPE, text=True)
    step = json.loads(running.communicate()[0])
    package, tests = tree / "hf_efcp", tree / "tests"
    shared, elsewhere = shared_names(package)
    # This file has the patterns, as text.
    own = ("structure.py", "test_structure_limits.py")
    python = [f for d in ("hf_efcp", "tests", "recipes") for f in (tree / d).rglob("*.py") if f.name not in own]
    parsed = [
        f"{f.relative_to(tree)}: {line.strip()}" for f in python for line in f.read_text().splitlines() if _PARSED.search(line)
    ]
    lines = sum(len(f.read_text().splitlines()) for d in ("optim", "engine") for f in (package / d).glob("*.py"))
    if verbose:
        print(*("shared: " + name for name in sorted(shared)), *("elsewhere: " + name for name in sorted(elsewhere)), sep="\n")
        print(*parsed, "", sep="\n")
    return [
        *step,
        len(shared),
        len(elsewhere),
        type_errors(tree),
        len(parsed),
        lines,
        longest(package.rglob("*.py"), tree),
        longest(package.rglob("*.py"), tree, classes=True),
        longest(tests.rglob("*.py"), tree),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", metavar="COMMIT", help="a commit to measure too")
    parser.add_argument("--verbose", action="store_true", help="list the names and lines that are counted")
    parser.add_argument("--running", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.running:
        return measure_running()
    columns = {}
    if arguments.base:
        with worktree(arguments.base) as base:
            columns[f"before ({arguments.base[:7]})"] = measure(base)
    columns["now"] = measure(ROOT, arguments.verbose)
    print("| | " + " | ".join(columns) + " | at most |\n|---|" + "---|" * (len(columns) + 1))
    for row in zip(TARGETS, *columns.values(), TARGETS.values(), strict=True):
        print("| " + " | ".join(map(str, row)) + " |")


if __name__ == "__main__":
    main()
