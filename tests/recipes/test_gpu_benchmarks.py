"""recipes/gpu_benchmarks.sh without a GPU: its commands parse, their settings fit, and it says what failed."""

import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from hf_efcp.cli.common import build, chosen, dtype_of
from hf_efcp.cli.main import _parser
from hf_efcp.cli.shapes import load
from tests import dash_times
from tests.recipes.helpers import RECIPES  # and the recipes on the path

ROOT = RECIPES.parent
PARTS = ("checks", "figures")
# What a GPU of 80 GB has free, and the share of it that `hf-efcp bench` fills.
ROOM = 0.8 * 78 * 2**30


def script(*argv, **environment):
    command = ["bash", str(RECIPES / "gpu_benchmarks.sh"), *map(str, argv)]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def commands(part):
    """Name, seconds and words of every command of a part."""
    done = script(part, DRY_RUN="1")
    assert done.returncode == 0 and not done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return [(name, int(seconds), shlex.split(command)) for name, seconds, command in lines]


def of_python(words):
    """The arguments of the interpreter, without what stands before it."""
    return words[words.index(sys.executable) + 1 :]


@pytest.mark.parametrize("part", PARTS)
def test_every_command_parses_and_the_limits_stay_below_nine_minutes(part):
    import step_profile
    import training_step

    listed = commands(part)
    assert len({name for name, _, _ in listed}) == len(listed) >= 7
    limits = [seconds for _, seconds, _ in listed]
    assert (sum(limits) if part == "figures" else limits[0] + max(limits)) <= 535  # checks run side by side after the first
    for name, _, words in listed:
        match of_python(words):
            case ["-m", "hf_efcp.cli.main", *argv]:
                args = _parser().parse_args(argv)
                chosen(args.optim, args.optim_args)
                assert Path(args.json).name == f"{name}.json"
            case ["-m", "pytest", *argv]:
                files = [word for word in argv if word.endswith(".py")]
                assert files and all("mark.gpu" in (ROOT / file).read_text() for file in files)
            case ["recipes/training_step.py", *argv]:
                training_step.parse(argv)
            case ["recipes/step_profile.py", *argv]:
                args = step_profile.parse(argv)
                chosen(args.optim, args.optim_args)
            case ["tests/kernels/compile_kernels.py", capability]:
                assert int(capability) > 0 and (ROOT / "tests/kernels/compile_kernels.py").exists()
            case ["-m", "tests.dash_times", *argv]:
                dash_times.parse(argv)
            case ["-c", program]:
                compile(program, name, "exec")
            case other:
                raise AssertionError(f"{name}: {other}")


def test_all_that_is_timed_fits():
    largest = 0
    for _, _, words in commands("figures"):
        if "bench" not in words or "--launches" in words:
            continue
        args = _parser().parse_args(of_python(words)[2:])
        model = load(args.model, dtype_of(args.dtype))
        own = 2 * sum(p.nbytes for p in model.parameters())  # and gradients
        for name, options in chosen(args.optim, args.optim_args).items():
            state = sum(build(name, options, model, None).estimate_footprint().values())
            largest = max(largest, own + state)
    assert ROOM / 6 < largest <= ROOM


def test_the_sanitizer_gets_tests():
    (words,) = (words for name, _, words in commands("checks") if name == "memcheck")
    done = subprocess.run(
        [sys.executable, *of_python(words), "--collect-only"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    found = [line for line in done.stdout.splitlines() if "::" in line]
    assert 3 <= len(found) <= 12, done.stdout


@pytest.mark.parametrize("broken", [None, "test_on_gpu"])
def test_what_ran_and_what_failed_is_said_and_kept(broken, tmp_path):
    """The interpreter is one that runs nothing, and fails where a file is named."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\ncase "$*" in *{broken or "nobody"}*) echo oh >&2; exit 3;; esac\necho "fine: $*"\n')
    stub.chmod(0o755)
    for part in PARTS:
        done = script(part, tmp_path / "out", PYTHON=str(stub))
        names = [name for name, _, _ in commands(part) if name != "memcheck"]
        fails = ["kernels"] if broken and part == "checks" else []
        assert done.returncode == bool(fails)
        assert f"\nfailed: {' '.join(fails) or 'nothing'}\n" in done.stdout
        (ran,) = (line for line in done.stdout.splitlines() if line.startswith("ran: "))
        assert sorted(set(ran.split()[1:]) - {"memcheck"}) == sorted(names)
        with tarfile.open(tmp_path / "out" / f"{part}.tar.gz") as archive:
            files = set(archive.getnames())
        assert {f"{part}/summary.txt"} | {f"{part}/{name}.{end}" for name in names for end in ("md", "err")} <= files


def test_another_word_is_refused():
    for argv in ((), ("everything",)):
        done = script(*argv)
        assert done.returncode == 2 and "checks|figures" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes the way of a CPU")
def test_the_profile_of_a_tiny_model_on_the_cpu(tmp_path, capsys):
    import step_profile

    file = tmp_path / "shapes.json"
    file.write_text('{"a.weight": [24, 16], "a.bias": [24]}')
    step_profile.main(["--model", str(file), "--device", "cpu", "--steps", "2", "--optim_args", "window_size=4"])
    printed = capsys.readouterr().out
    assert "efcp_sparse_mfac, no graph: host" in printed and "a CUDA graph" not in printed
