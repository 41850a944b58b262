"""The names in programs that know nothing of hf_efcp: `hf-efcp run PROGRAM`, and `hf-efcp enable`."""

import importlib.util
import os
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import transformers

import hf_efcp
from hf_efcp import list_optimizers
from hf_efcp.cli import enable
from hf_efcp.cli.main import main
from hf_efcp.integrations.patches import _PATCHES
from hf_efcp.startup.names import TRIGGERS
from tests.clients import check as clients
from tests.clients.model import write

CHECKOUT = Path(hf_efcp.__file__).parents[1]
STARTUP = CHECKOUT / "hf_efcp" / "startup"
VALID = "from transformers import TrainingArguments as T; T('o', use_cpu=True, report_to='none', optim=sys.argv[1]); print(1)"
SILENT = "import json, sys; print([n for n in ('torch', 'transformers', 'accelerate', 'hf_efcp') if n in sys.modules])"
IN_A_CHILD = "import subprocess, sys\nsubprocess.run([sys.executable, *sys.argv[1:]], check=True)\n"


# Needs no torch, so that nothing may be imported for it; what it parses for us is of a trigger's module.
PARSERS = {"transformers.hf_argparser", "trl.scripts._hf_argparser"}


def test_the_hook_waits_for_all_that_is_changed_in_transformers_and_accelerate():
    assert {*TRIGGERS, *PARSERS} == {patch.module for patch in _PATCHES} and not PARSERS & {*TRIGGERS}


# hf-efcp run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def child(tmp_path):
    (tmp_path / "child.py").write_text(IN_A_CHILD)
    return "child.py"


@pytest.fixture
def inside(tmp_path):
    """Run python as a program under `hf-efcp run` does: the folder of startup is on its PYTHONPATH."""

    def run(*argv, path=()):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (STARTUP, *path)))}
        command = [sys.executable, *map(str, argv)]
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


def test_what_a_program_starts_has_the_names(child, python):
    name = list_optimizers()[0]
    done = python("-m", "hf_efcp.run", "python", child, "-c", f"import sys; {VALID}", name)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert python(child, "-c", f"import sys; {VALID}", name).returncode == 1  # the control


def test_what_a_script_starts_finds_the_folder_first(child, run, monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    monkeypatch.setenv("HF_EFCP", "0")  # that is about `enable`: an explicit run wins
    code = "import os; print(os.environ.get('HF_EFCP'), os.environ['PYTHONPATH'])"
    for _ in range(2):  # the second time it is there already
        assert run([child, "-c", code]) == 0
        assert capfd.readouterr().out == f"None {STARTUP}{os.pathsep}elsewhere\n"


@pytest.mark.skipif(transformers.__version__ < "5", reason="there the parser's import ends after ours: its own message stays")
def test_the_parser_is_changed_though_it_was_imported_before(inside):
    code = f"""
from transformers.hf_argparser import HfArgumentParser
import sys
assert "torch" not in sys.modules and "hf_efcp" not in sys.modules
from transformers.training_args import TrainingArguments
HfArgumentParser(TrainingArguments).parse_dict({{"output_dir": "o", "optim": {list_optimizers()[0]!r}, "window_size": 4}})
"""
    done = inside("-c", code)
    assert done.returncode == 2 and "window_size: " in done.stderr and "give --optim_args window_size=VALUE" in done.stderr


def test_where_nobody_trains_nothing_is_imported(inside):
    done = inside("-c", SILENT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[]\n", "")


ENDS = ["sys.exit('mine')", "1 / 0", "sys.exit(7)", "os.kill(os.getpid(), signal.SIGTERM)"]


@pytest.mark.parametrize("end", ENDS)
def test_a_child_that_fails_has_the_last_word(end, child, inside):
    code = f"import os, signal, sys; {end}"
    alone, done = inside("-c", code), inside(child, "-c", code)
    assert (done.returncode, done.stderr) == (alone.returncode, alone.stderr)
    assert done.returncode in (1, 7, -signal.SIGTERM)


@pytest.mark.parametrize("end", ENDS[:-1])
def test_a_child_of_a_script_that_fails_has_the_last_word(end, child, run, capfd, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "")
    assert run([child, "-c", f"import sys; {end}"]) in (1, 7)
    assert "CalledProcessError" not in capfd.readouterr().err


NOBODY_HEARS = ["stderr=subprocess.DEVNULL", "preexec_fn=lambda: os.close(2)"]


@pytest.mark.parametrize("how", [NOBODY_HEARS[0], pytest.param(NOBODY_HEARS[1], marks=pytest.mark.slow)])
@pytest.mark.parametrize("under", ["hf-efcp run", "a program"])
def test_what_nobody_heard_of_a_child_that_fails_is_told(how, under, tmp_path, inside, run, capfd, monkeypatch):
    (tmp_path / "starts.py").write_text(
        f"import os, subprocess, sys\nsubprocess.run([sys.executable, '-c', sys.argv[1]], check=True, {how})\n"
    )

    def told(code):
        if under == "a program":
            done = inside("starts.py", code)
            return done.returncode, done.stderr
        monkeypatch.setenv("PYTHONPATH", "")
        return run(["starts.py", code]), capfd.readouterr().err

    status, text = told("1 / 0")
    assert status == 1 and text.endswith("ZeroDivisionError: division by zero\n") and text.count("Traceback") == 1
    status, text = told(f"import sys; sys.path.insert(0, {str(CHECKOUT)!r}); import hf_efcp; hf_efcp.LowRankMFAC([], 1.0, rnk=3)")
    assert status == 2 and text.startswith("error: unknown option 'rnk'") and text.count("\n") == 1
    if how == NOBODY_HEARS[0]:
        status, text = told("import sys; sys.exit(7)")
        assert status == 7 and text.startswith("error: Command ") and "status 7" in text and text.count("\n") == 1


def test_a_child_that_may_fail_unheard_is_not_told(tmp_path, inside, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "tries.py").write_text("import subprocess as s, sys; s.run([sys.executable, '-c', '1 / 0'], stderr=s.DEVNULL)")
    done = inside("tries.py")
    assert (done.returncode, done.stderr) == (0, "") and not list(tmp_path.glob("hf_efcp_last_words_*"))


def test_other_errors_have_pythons_traceback(tmp_path, inside):
    for command in (["false"], [sys.executable, "-c", "1 / 0"]):  # another program; a Python whose message was caught
        (tmp_path / "fails.py").write_text(f"import subprocess\nsubprocess.run({command}, check=True, capture_output=True)\n")
        done = inside("fails.py")
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("subprocess.CalledProcessError: Command")


def test_a_bad_option_in_a_child_is_one_line(child, inside):
    code = "from hf_efcp import LowRankMFAC; LowRankMFAC([], 1.0, rnk=3)"
    done = inside(child, "-c", code, path=[CHECKOUT])
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown option 'rnk'") and done.stderr.count("\n") == 1


def test_a_bad_option_is_told_where_torch_distributed_reads_stderr(tmp_path, inside):
    code = """
from torch import distributed
from hf_efcp import LowRankMFAC
distributed.init_process_group("gloo", init_method="file://{}", rank=0, world_size=1)
LowRankMFAC([], 1.0, rnk=3)
"""
    done = inside("-c", code.format(tmp_path / "store"), path=[CHECKOUT])
    assert done.returncode == 2
    assert "error: unknown option 'rnk'" in done.stderr and "Traceback" not in done.stderr


def test_a_signal_reaches_the_program(tmp_path):
    code = "import time; print('ready', flush=True); time.sleep(60)"
    argv = [sys.executable, "-m", "hf_efcp.run", "python", "-c", code]
    started = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT)
    assert started.stdout.readline() == "ready\n"
    started.terminate()
    assert started.wait(timeout=20) == -signal.SIGTERM


def test_the_sitecustomize_that_is_hidden_runs(tmp_path, inside):
    hidden = tmp_path / "hidden" / "sitecustomize.py"
    hidden.parent.mkdir()
    hidden.write_text("import os\nos.environ['HIDDEN'] = __file__\n")
    code = "import os, sitecustomize as s, sys; print(os.environ['HIDDEN'], s.__file__, sys.path[1])"
    assert inside("-c", code, path=[hidden.parent]).stdout == f"{hidden} {hidden} {hidden.parent}\n"
    hidden.write_text("import no_such_module\n")
    assert "no_such_module" in inside("-c", "", path=[hidden.parent]).stderr  # as it would without us


def test_programs_that_are_not_there(capsys, tmp_path, monkeypatch):
    assert main(["run", "pythn", "sft"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: no such script, and no such program in ") and "did you mean 'python" in message
    (tmp_path / "broken").write_bytes(b"\x7fELF")
    (tmp_path / "broken").chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", "")
    assert main(["run", str(tmp_path / "broken")]) == 126
    assert "cannot be run" in capsys.readouterr().err


# hf-efcp enable -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(tmp_path):
    """A virtual environment without hf_efcp that finds what this one has; a function that runs its python."""
    venv.create(tmp_path / "venv", symlinks=True)
    site_packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "venv")}))
    (site_packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*argv, **variables):
        without = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        command = [tmp_path / "venv/bin/python", *argv]
        return subprocess.run(command, env={**without, **variables}, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.slow
def test_enabled_used_switched_off_and_disabled(environment, tmp_path):
    def command(name):
        done = environment("-m", "hf_efcp.cli.main", name, PYTHONPATH=str(CHECKOUT))
        assert done.returncode == 0, done.stderr
        return done.stdout

    def valid(**variables):
        return environment("-c", f"import sys; {VALID}", list_optimizers()[0], **variables)

    before = sorted(path for path in (tmp_path / "venv").rglob("*") if "__pycache__" not in path.parts)
    assert command("status").startswith("not enabled in ") and command("disable").endswith("nothing to do\n")
    assert valid().returncode == 1
    assert command("enable") == command("enable") == command("status") != ""
    done = valid()
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert valid(HF_EFCP="0").returncode == 1
    assert environment("-c", SILENT).stdout == "[]\n"
    assert command("disable").endswith("is removed\n")
    assert before == sorted(path for path in (tmp_path / "venv").rglob("*") if "__pycache__" not in path.parts)


def test_a_package_that_is_gone_or_broken_harms_nothing(environment, tmp_path):
    folder = tmp_path / "installed"
    (folder / "hf_efcp" / "startup").mkdir(parents=True)
    names = folder / "hf_efcp/startup/names.py"
    names.write_text((STARTUP / "names.py").read_text())
    (folder / "hf_efcp/__init__.py").write_text("import no_such_module\n")
    site_packages = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    (site_packages / enable.FILE).write_text(enable._LINE.format(file=str(names), run=enable._RUN))
    code = "import sys; import transformers.training_args; print('goes on')"
    broken = environment("-c", code)
    assert broken.stdout == "goes on\n"
    assert "the optimizers of hf_efcp are not there: ModuleNotFoundError: No module named 'no_such_module'" in broken.stderr
    names.unlink()
    gone = environment("-c", "print('goes on')")
    assert (gone.stdout, gone.stderr) == ("goes on\n", "")


def test_the_line_costs_a_few_milliseconds(tmp_path):
    (tmp_path / enable.FILE).write_text(enable._line())
    code = f"import site, sys, time; t = time.perf_counter(); site.addsitedir({str(tmp_path)!r}); print(time.perf_counter() - t)"
    times = [float(subprocess.check_output([sys.executable, "-c", code])) for _ in range(9)]
    assert min(times) < 5e-3, times  # 1 to 2 ms where nothing else runs; an import of torch takes seconds


def test_a_folder_that_cannot_be_written(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(enable, "_folders", lambda: [tmp_path / "file" / "site-packages"])
    assert main(["enable"]) == 2
    assert capsys.readouterr().err.startswith(f"error: cannot write {tmp_path / 'file'}")


def test_a_line_of_another_installation_is_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(enable, "_folders", lambda: [tmp_path])
    (tmp_path / enable.FILE).write_text("import os\n")
    assert main(["status"]) == 0
    assert "run `hf-efcp enable` again" in capsys.readouterr().out
    assert main(["enable"]) == 0 and main(["status"]) == 0
    assert "again" not in capsys.readouterr().out


# A real program -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # tests/recipes trains with TRL
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_trl_sft_trains_and_refuses(tmp_path):
    """Its command line starts a second Python by `accelerate launch`, as those of tests/clients do."""
    write(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def run(output, options):
        argv = [sys.executable, "-m", "hf_efcp.run", *clients.trl(output, options, None)]
        return subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    done = run("out", "rank=2")
    assert done.returncode == 0, done.stderr
    (middle, end), _ = clients.states("trl", tmp_path / "out")
    assert end["efcp"]["class"] == "LowRankMFAC" and end["efcp"]["options"]["rank"] == 2
    assert not clients.same(middle["state"], end["state"])
    done = run("bad", "rnk=2")
    assert (done.returncode, (tmp_path / "bad").exists()) == (2, False)
    assert done.stderr.splitlines()[-1].startswith("error: unknown option 'rnk'") and "Traceback" not in done.stderr
