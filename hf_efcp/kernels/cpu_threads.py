"""Threads of the compiled CPU functions, which hold no lock. There are as many threads as torch uses.

Work is cut by rows of the tensors. One thread handles a row, and the shape alone says how sums over rows are cut. So the result
does not depend on the number of threads.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import itertools
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .devices import WRITTEN

# The parts that a sum over rows is cut into, whatever the number of threads.
PARTS = 16
# A turn has at least this many numbers: fewer are not worth another thread.
_SMALL = 2**16
# Turns for each thread: if a core has other work to do, that delays one turn, not half of the work.
_TURNS = 4


def divide_work(function: Callable[..., object], total: int, numbers: int, *args: Any) -> None:
    """Call function(lo, hi, *args) over range(total), by as many threads as torch uses. An item has `numbers` numbers."""
    turns = max(1, min(total, total * numbers // _SMALL))
    threads = min(torch.get_num_threads(), turns)
    turns = min(turns, _TURNS * threads) if threads > 1 else 1
    todo = collections.deque(itertools.pairwise([total * i // turns for i in range(turns + 1)]))
    done = []

    def work_off() -> None:
        while True:
            try:
                lo, hi = todo.popleft()  # gives a turn to one thread
            except IndexError:
                return
            function(lo, hi, *args)
            done.append(lo)

    try:
        if threads == 1:
            work_off()
        elif _gomp_parallel is not None and os.getpid() == _HOME:
            _in_team(work_off)
        else:
            _in_pool(work_off, threads)
    finally:
        WRITTEN.turns += len(done)


# torch's own threads do the work where torch has GNU's OpenMP. After each of torch's loops its threads look for work for some
# milliseconds, at full speed: other threads would share the cores with them. torch's threads do not survive a fork. (numba's
# pools would abort if two threads step at once, or in a process forked after a step, and a pool is chosen by a global setting.)
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_gomp_parallel: Any = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
_HOME = os.getpid()


def _in_team(work: Callable[[], None]) -> None:
    """Call work() in every thread of the team that torch's loops would use if called from this thread."""
    raised: list[BaseException] = []

    def guarded(_: object) -> None:
        try:
            work()
        except BaseException as error:  # otherwise it would be printed and forgotten
            raised.append(error)

    _gomp_parallel(_CALLBACK(guarded), None, ctypes.c_uint(torch.get_num_threads()), ctypes.c_uint(0))
    if raised:
        raise raised[0]


def _in_pool(work: Callable[[], None], threads: int) -> None:
    """Call work() in this thread, and in as many other threads as the system gives."""
    there, active, closed, raised = threading.Condition(), 0, False, []

    def guarded() -> None:
        nonlocal active
        with there:
            if closed:  # a call that found no thread at once may get one later, after the end
                return
            active += 1
        try:
            work()
        except BaseException as error:
            raised.append(error)
        with there:
            active -= 1
            there.notify()

    try:
        with contextlib.suppress(RuntimeError):  # no more threads: this one does the work
            for _ in range(threads - 1):
                _pool(os.getpid()).submit(guarded)
        work()
    finally:
        with there:
            closed = True
            there.wait_for(lambda: not active)
    if raised:
        raise raised[0]


@functools.cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Give the pool of a process, since threads do not survive a fork. The pool starts a thread when none is idle."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="hf_efcp")
