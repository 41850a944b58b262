import pytest


@pytest.fixture(params=["kernels", "plain torch"])
def kernels(request, monkeypatch):
    """The test runs twice: with the compiled kernels, and without them, as where numba is not installed."""
    if request.param == "kernels":
        pytest.importorskip("numba")
    monkeypatch.setenv("HF_EFCP_KERNELS", "1" if request.param == "kernels" else "0")
