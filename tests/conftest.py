"""For all tests."""

import gc
import logging
import os
import sys
import zlib

import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this when it is first imported, by whomever
    os.environ.setdefault("TRITON_INTERPRET", "1")
logging.getLogger("hf_efcp.compiling").setLevel(logging.ERROR)  # which test compiles first is chance


# Tests with more variants run these, and about an eighth of the others, which chance chose once for ever; the rest is `slow`.
VARIANTS = 2
OF_EVERY_PAGE = ("test_commands.py", "test_docs.py", "test_cli_page.py", "test_contributing.py")  # a page takes a moment


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Begin with what takes longest, since at the end one worker would wait for it; leave some variants to `-m slow`."""
    from tests.reference import briefly

    items.sort(key=lambda item: "test_every_kernel_compiles" not in item.nodeid)
    chosen, seen = briefly(), set()
    for item in items:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if name in chosen:
            key = item.nodeid.partition("[")[0], name
            if key in seen:
                item.add_marker(pytest.mark.slow)
            elif not item.get_closest_marker("slow"):
                seen.add(key)
    counts = {}
    for item in items:
        if item.get_closest_marker("slow") or item.get_closest_marker("gpu") or item.path.name in OF_EVERY_PAGE:
            continue
        test = item.nodeid.partition("[")[0]
        counts[test] = counts.get(test, 0) + 1
        if counts[test] > VARIANTS and zlib.crc32(item.nodeid.encode()) % 8:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """Exempt the millions of objects of the imports from the garbage collections that every Trainer and Accelerator asks for."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Let the interpreter find all of them when it ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def fresh_environment():
    """What is left for the next test to find: by TrainingArguments and Accelerator precision and more, in ACCELERATE_... and
    singletons; by `hf_efcp.run` the path of what it starts.
    """

    def ours():
        return {
            k: v
            for k, v in os.environ.items()
            if k.startswith("ACCELERATE_") or k in ("PYTHONPATH", "HF_EFCP", "HF_EFCP_STARTER")
        }

    before = ours()
    yield
    for name in ours():
        del os.environ[name]
    os.environ.update(before)
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.GradientState._reset_state()


@pytest.fixture(autouse=os.environ.get("NUMBA_BOUNDSCHECK") == "1")
def nothing_beside_a_buffer(caplog):
    """numba finds an access outside of an array: the kernel is given up then, and the log says why."""
    yield
    assert "IndexError" not in "".join(record.getMessage() for record in caplog.get_records("call"))
