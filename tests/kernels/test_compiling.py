"""Who waits for the compiler is told, once; compiled code is kept on disk, each variant for itself."""

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("numba")
import numba
from numba.core.event import Event, EventStatus

from hf_efcp.kernels import cpu_compiling, cpu_turns
from hf_efcp.kernels.cpu_compiling import Announcement, KernelCache
from hf_efcp.kernels.cpu_turns import Turn

ROOT = Path(__file__).parents[2]


def event(module, status=EventStatus.START):
    function = SimpleNamespace(__module__=module)
    return Event("numba:compile", status, data={"dispatcher": SimpleNamespace(py_func=function)}, exc_details=(None, None, None))


@pytest.mark.parametrize("kept, end", [(True, "they are kept on disk for later runs"), (False, "set NUMBA_CACHE_DIR")])
def test_it_is_said_once_for_a_row_of_our_functions(kept, end, caplog, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    caplog.set_level(logging.WARNING, "hf_efcp.compiling")
    announcement = Announcement()
    announcement.kept = kept
    for module in ("umap.layouts", "hf_efcp.kernels.cpu_sparse", "hf_efcp.kernels.cpu_keep"):
        announcement.notify(event(module))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "hf_efcp.compiling" and end in record.message
    later = time.monotonic() + 60
    monkeypatch.setattr(cpu_compiling.time, "monotonic", lambda: later)  # another optimizer
    announcement.notify(event("umap.layouts"))
    assert len(caplog.records) == 1
    announcement.notify(event("hf_efcp.kernels.cpu_min_max"))
    assert len(caplog.records) == 2


@pytest.mark.parametrize("module", ["umap.layouts", None])  # None: made by exec
def test_functions_of_others_do_not_silence_it(module, caplog, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    caplog.set_level(logging.WARNING, "hf_efcp.compiling")
    announcement = Announcement()
    for status in (EventStatus.START, EventStatus.END):
        announcement.notify(event(module, status))
    assert not caplog.records
    announcement.notify(event("hf_efcp.kernels.cpu_keep"))
    announcement.notify(event("hf_efcp.kernels.cpu_keep", EventStatus.END))
    announcement.notify(event("hf_efcp.kernels.cpu_sparse"))
    assert len(caplog.records) == 1


def test_other_processes_of_a_machine_are_silent(caplog, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    caplog.set_level(logging.WARNING, "hf_efcp.compiling")
    Announcement().notify(event("hf_efcp.kernels.cpu_sparse"))
    assert not caplog.records


def test_the_second_process_is_silent(tmp_path):
    program = (
        "import torch; from hf_efcp.kernels import cpu_tools; import numpy as np\n"
        "cpu_tools.bounds(np.zeros((1, 2), np.uint16), 0, np.zeros(1, np.float32))"
    )
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", program]
    said = [subprocess.run(command, env=env, capture_output=True, text=True, check=True).stderr for _ in range(2)]
    assert [text.count("compiling CPU kernels") for text in said] == [1, 0]


KERNEL = """
from hf_efcp.kernels.cpu_tools import compiled

@compiled
def total(x):
    s = x[0] - x[0]
    for i in range(x.size):
        s += x[i]
    return s
"""
# Waits before the writes of numba's cache, so that two processes overtake each other as they rarely do by themselves.
CALL = """
import sys, time
import numpy as np
from numba.core.caching import IndexDataCacheFile
from kernel import total

def late(write, wait):
    return lambda *args: (time.sleep(wait), write(*args))[1]

dtype, start, index, data = sys.argv[1], *map(float, sys.argv[2:])
for name, wait in (("_save_index", index), ("_save_data", data)):
    setattr(IndexDataCacheFile, name, late(getattr(IndexDataCacheFile, name), wait))
x = np.full(10, 1.5, dtype)
print("ready", flush=True)
time.sleep(max(0, start - time.time()))
print(total(x))
"""


@pytest.fixture
def call(tmp_path):
    """Start a process that calls a compiled function for numbers of a dtype."""
    (tmp_path / "kernel.py").write_text(KERNEL)
    (tmp_path / "call.py").write_text(CALL)
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path / "kept"), "NUMBA_DEBUG_CACHE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])

    def start(dtype, *times):
        command = [sys.executable, "call.py", dtype, *map(str, times or (0, 0, 0))]
        return subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)

    return start


def lines(process):
    said = process.communicate()[0].splitlines()
    assert process.returncode == 0
    return said


def test_two_processes_compile_one_function_for_two_dtypes_at_once(call):
    start = time.time() + 6
    both = call("float64", start, 2, 0), call("int64", start, 1, 3)  # one writes its index last, the other its data
    assert [lines(process)[-1] for process in both] == ["15.0", "10"]
    for dtype, expected in (("float64", "15.0"), ("int64", "10")):
        said = lines(call(dtype))
        assert said[-1] == expected
        assert any("data loaded" in line for line in said) and not any("data saved" in line for line in said)


def test_a_damaged_file_is_compiled_anew(call, tmp_path):
    assert lines(call("float64"))[-1] == "15.0"
    (file,) = (tmp_path / "kept").rglob("*.nbc")
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[:-100]):
        file.write_bytes(damaged)
        assert lines(call("float64"))[-1] == "15.0"
        assert len(file.read_bytes()) > len(whole) - 100


def test_files_of_another_state_of_the_folder_are_removed(tmp_path, monkeypatch):
    def files(state):
        return cpu_compiling.Files(str(tmp_path), "cpu_x.f-[1].py311", state)

    other = tmp_path / "cpu_x.f-[1].py3110.nbc"
    other.touch()
    old = files("before")
    old.save("fp32", 1)
    old.save("fp64", 2)
    assert (old.load("fp32"), old.load("fp64"), old.load("bf16"), files("after").load("fp32")) == (1, 2, None, None)
    new = files("after")
    new.save("fp32", 3)
    assert (old.load("fp32"), old.load("fp64"), new.load("fp32"), new.load("fp64")) == (None, None, 3, None)
    monkeypatch.setattr(cpu_compiling, "_hash", lambda key: "same")  # two keys, one name
    new.save("fp32", 4)
    assert (new.load("fp32"), new.load("fp64")) == (4, None)
    new.flush()
    assert list(tmp_path.iterdir()) == [other]


def test_a_full_disk_keeps_nothing(tmp_path):
    files = cpu_compiling.Files(str(tmp_path / "missing"), "cpu_x.f-1.py311", "state")
    files.save("fp32", 1)
    assert files.load("fp32") is None


# One process compiles -----------------------------------------------------------------------------------------------------


def test_of_two_processes_one_compiles_and_the_other_loads(call):
    start = time.time() + 6
    said = [lines(process) for process in [call("float64", start, 0, 2) for _ in range(2)]]  # who saves takes two seconds for it
    assert [text[-1] for text in said] == ["15.0", "15.0"]
    counts = [[sum(f"data {what}" in line for line in text) for what in ("saved", "loaded")] for text in said]
    assert sorted(counts) == [[0, 1], [1, 0]]


def waits(process, seconds=3):
    """Whether a process is still at its call some seconds after it has begun it."""
    assert "ready\n" in iter(process.stdout.readline, "")
    time.sleep(seconds)
    return process.poll() is None


def test_a_process_that_dies_is_waited_for_no_longer(call, tmp_path):
    first = call("float64", 0, 0, 600)
    while not list(tmp_path.rglob("*.lock")):
        assert first.poll() is None
        time.sleep(0.05)
    second = call("float64")
    assert waits(second)
    first.kill()
    first.wait()
    assert lines(second)[-1] == "15.0"
    assert not list(tmp_path.rglob("*.lock"))


@pytest.fixture
def turns(tmp_path):
    """Two that want the same lock, and what they said."""
    return Turn(tmp_path / "x.lock"), Turn(tmp_path / "x.lock"), []


def test_a_turn_is_waited_for(turns, tmp_path):
    first, second, said = turns
    assert first.take(lambda: said.append("waits"), 10) is False and said == []
    thread = threading.Thread(target=lambda: said.append(second.take(lambda: said.append("waits"), 10)))
    thread.start()
    time.sleep(0.2)
    assert said == ["waits"]
    first.end()
    thread.join(10)
    assert said == ["waits", True]
    second.end()
    assert not (tmp_path / "x.lock").exists()


@pytest.mark.parametrize(("longest", "waited"), [(0.1, True), (0.0, False)])
def test_a_turn_is_not_waited_for_without_end(longest, waited, turns, tmp_path):
    first, second, said = turns
    first.take(lambda: None, 10)
    assert second.take(lambda: said.append("waits"), longest) is waited and len(said) == waited
    second.end()  # it never had it
    assert (tmp_path / "x.lock").exists()


def test_many_that_want_a_turn_have_it_one_after_the_other(tmp_path):
    inside, overlaps, done = [], [], []

    def work():
        for _ in range(15):
            turn = Turn(tmp_path / "x.lock")
            turn.take(lambda: None, 60)
            inside.append(1)
            overlaps.append(len(inside) > 1)
            time.sleep(0.001)
            inside.pop()
            turn.end()
            done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 60 and not any(overlaps) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("why", ["no fcntl", "no folder", "no locks"])
def test_where_nothing_can_be_locked_nobody_waits(why, turns, monkeypatch, tmp_path):
    first, second, said = turns
    if why == "no fcntl":
        monkeypatch.setattr(cpu_turns, "fcntl", None)
    elif why == "no folder":
        (tmp_path / "file").touch()
        first, second = Turn(tmp_path / "file/x.lock"), Turn(tmp_path / "file/x.lock")
    else:

        def refuse(*args):
            raise OSError(errno.ENOTSUP, "not supported")

        monkeypatch.setattr(cpu_turns.fcntl, "flock", refuse)
    assert [turn.take(lambda: said.append("waits"), 10) for turn in (first, second)] == [False, False]
    first.end(), second.end()
    assert said == [] and not (tmp_path / "x.lock").exists()


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """A function to compile -> its compiled form, whose variants are kept in a folder of the test."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(KernelCache, "waits", True)

    def compiled(function):
        dispatcher = numba.njit(function)
        dispatcher._cache = KernelCache(function)
        assert Path(dispatcher._cache.cache_path).is_relative_to(tmp_path)
        return dispatcher

    yield compiled
    monkeypatch.undo()
    numba.core.config.reload_config()


def test_a_function_that_cannot_be_compiled_is_given_up(kept, tmp_path):
    def wrong(x):
        return x.no_such_attribute

    function = kept(wrong)
    with pytest.raises(numba.TypingError):
        function(1.5)
    assert not function._cache._turns and not list(tmp_path.rglob("*.lock"))


def test_an_interrupted_wait_leaves_nothing(kept, tmp_path, monkeypatch):
    def twice(x):
        return 2 * x

    function = kept(twice)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(Turn, "take", interrupt)
    with pytest.raises(KeyboardInterrupt):
        function(1.5)
    assert not function._cache._turns


def test_who_waited_for_nothing_waits_no_more(kept, tmp_path, monkeypatch):
    """As for a process that hangs, or that has no room to save."""

    def twice(x):
        return 2 * x

    function, given = kept(twice), []
    monkeypatch.setattr(Turn, "take", lambda self, waiting, longest: given.append(longest) or True)
    assert function(1.5) == 3.0 and function(2) == 4
    assert given == [cpu_turns.LONGEST, 0.0]
