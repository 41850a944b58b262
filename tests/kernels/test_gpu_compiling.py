"""A first run on a GPU is told that kernels are compiled; a run that finds them on disk, and every other process, is not."""

import pytest
import torch

from hf_efcp.kernels import gpu_compiling


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Triton's cache, on a machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("TRITON_INTERPRET", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def announced(caplog):
    with caplog.at_level("WARNING", "hf_efcp.compiling"):
        gpu_compiling.announce()
    return [r.message for r in caplog.records]


@pytest.mark.parametrize("others", [False, True])
def test_a_cache_without_our_kernels_is_announced(folder, others, caplog):
    if others:
        (folder / "ABC").mkdir(parents=True)
        (folder / "ABC" / "triton_poi_fused_add_0.json").touch()
    (said,) = announced(caplog)
    assert said.startswith("compiling GPU kernels")


def test_a_cache_with_our_kernels_is_not(folder, caplog):
    (folder / "XYZ").mkdir(parents=True)
    (folder / "XYZ" / "_keep.json").touch()
    assert announced(caplog) == []


@pytest.mark.parametrize(("name", "value"), [("LOCAL_RANK", "1"), ("TRITON_INTERPRET", "1")])
def test_other_processes_and_the_interpreter_are_silent(name, value, folder, monkeypatch, caplog):
    monkeypatch.setenv(name, value)
    assert announced(caplog) == []


def test_without_a_gpu_nothing_is_said(folder, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert announced(caplog) == []


def test_the_folder_is_where_triton_keeps_kernels(monkeypatch, tmp_path):
    """Triton's own answer, for each way of setting it."""
    knobs = pytest.importorskip("triton.knobs")
    for variables in ({"TRITON_CACHE_DIR": str(tmp_path / "a")}, {"TRITON_HOME": str(tmp_path)}, {}):
        for name in ("TRITON_CACHE_DIR", "TRITON_HOME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(gpu_compiling.cache_folder()) == knobs.cache.dir
