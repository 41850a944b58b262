import importlib
import os

import pytest

from hf_efcp.kernels import calls

NEEDS = {"cpu": "numba", "gpu": "triton"}
OPERATIONS = ("top_k", "dots", "combine", "apply", "keep")


@pytest.fixture(params=["cpu", "gpu"])
def module(request, monkeypatch):
    pytest.importorskip(NEEDS[request.param])
    if request.param == "gpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("test_cuda.py is for GPUs")
    monkeypatch.setattr(calls, "FAILED", set())
    used = []
    for operation in OPERATIONS:
        modules = calls.MODULES[operation]
        if request.param == "gpu":
            modules = {"cpu": modules["cuda"]} if "cuda" in modules else {}
            monkeypatch.setitem(calls.MODULES, operation, modules)
        for module in modules.values():
            if module.startswith(request.param):
                loaded = importlib.import_module(f"hf_efcp.kernels.{module}")
                monkeypatch.setattr(loaded, operation, _counting(getattr(loaded, operation), used))
    yield used
    assert not calls.FAILED


def _counting(function, used):
    def counted(*args):
        result = function(*args)
        if result is not None:
            used.append(function.__name__)
        return result

    return counted


@pytest.fixture
def plain(monkeypatch):
    """Runs a function without the kernels."""

    def run(function, *args):
        monkeypatch.setenv("HF_EFCP_KERNELS", "0")
        try:
            return function(*args)
        finally:
            monkeypatch.delenv("HF_EFCP_KERNELS")

    return run
