import os
import subprocess
import sys
from pathlib import Path

# Before transformers or datasets is imported, here and in the processes that the tests start.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import hf_efcp
from hf_efcp.run import main

CHECKOUT = Path(hf_efcp.__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """These models are so small that threads only wait for each other; ten times slower on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_args(tmp_path):
    """TrainingArguments on the CPU that write below tmp_path and report nowhere."""

    def make(**given):
        return TrainingArguments(**{"output_dir": str(tmp_path / "out"), "use_cpu": True, "report_to": [], **given})

    return make


@pytest.fixture
def python(tmp_path):
    """Run python in a fresh process in tmp_path, with this checkout importable; returns the finished process."""

    def run(*argv):
        path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, *map(str, argv)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.fixture
def run(monkeypatch, tmp_path):
    """`hf_efcp.run` in tmp_path, in this process: that saves the seconds which importing transformers takes in another."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return main


@pytest.fixture
def arguments(tmp_path):
    """Those of test_scripts.py's run of glue_like.py, for two processes."""
    from tests.integration.test_scripts import COMMON, RUNS, save_model, write_data

    save_model("glue_like", tmp_path / "model")
    halved = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4}
    return {**COMMON, **write_data("glue_like", tmp_path), **RUNS["glue_like"], **halved}


@pytest.fixture
def launch(tmp_path):
    """Run glue_like.py by a launcher of processes; returns stderr."""
    from tests.integration.test_scripts import command

    def run(launcher, arguments, fails=False, module="hf_efcp.run"):
        path = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        argv = [sys.executable, "-m", *launcher, "-m", module, *command("glue_like", arguments)]
        done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert (done.returncode != 0) == fails, done.stderr
        return done.stderr

    return run


@pytest.fixture
def tiny_bert():
    """A BERT of two small layers with random weights, always the same ones."""
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForSequenceClassification(config)


@pytest.fixture
def token_data():
    """128 sequences of 8 tokens; the label says from which half of the vocabulary the tokens come."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(128) % 2
    tokens = torch.randint(0, 16, (128, 8), generator=generator) + 16 * labels[:, None]
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]
