"""A program in each file of a checkpoint that Trainer or Accelerate resumes from: nothing of it runs, whoever reads the file."""

import os
import pickle
import shutil

import pytest
import torch
from accelerate import Accelerator
from transformers import Trainer

import hf_efcp

NAME = "efcp_lowrank_mfac"


class Program:
    """A pickle that makes a folder when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def programs(marker, tmp_path):
    """The program as torch.save writes it, and as pickle does."""
    torch.save(Program(marker), tmp_path / "program.pt")
    return (tmp_path / "program.pt").read_bytes(), pickle.dumps(Program(marker))


@pytest.fixture
def train(make_args, tiny_bert, token_data, tmp_path):
    def run(folder, **given):
        arguments = {"output_dir": str(tmp_path / folder), "optim": NAME, "optim_args": "window_size=4", "disable_tqdm": True}
        arguments |= {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 8}
        trainer = Trainer(tiny_bert, make_args(**arguments), train_dataset=token_data)
        trainer.train(**given)
        return trainer

    return run


def test_files_of_trainer(train, tmp_path):
    train("out")
    good, marker, refused = tmp_path / "out/checkpoint-1", tmp_path / "marker", set()
    files = {file.name for file in good.iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"} <= files
    for name in files:
        for data in programs(marker, tmp_path)[: 1 if name.endswith((".json", ".safetensors")) else 2]:
            bad = tmp_path / "out/checkpoint-9"
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            (bad / name).write_bytes(data)
            try:
                train("again", resume_from_checkpoint=str(bad))
            except Exception:
                refused.add(name)
            assert not marker.exists(), name
    assert refused >= files - {"training_args.bin", "config.json"}  # Trainer does not read these when it resumes


@pytest.mark.parametrize("file", [".metadata", "index.json"])
def test_shards_that_one_process_resumes_from(file, train, tmp_path):
    train("out")
    folder, marker = tmp_path / "out/checkpoint-1", tmp_path / "marker"
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    trained = [i for group in saved["param_groups"] for i in group["params"]]
    saved["state"], saved["efcp"]["sharded"] = {}, {"processes": 2, "origin": "1/2/3", "trained": trained}
    torch.save(saved, folder / "optimizer.pt")
    (folder / "efcp_optim").mkdir()
    for data in programs(marker, tmp_path):
        (folder / "efcp_optim" / file).write_bytes(data)
        with pytest.raises(hf_efcp.OptionError, match=f"{file} is damaged"):
            train("again", resume_from_checkpoint=str(folder))
        assert not marker.exists()


def test_files_of_accelerate(tiny_bert, tmp_path):
    def prepared():
        accelerator = Accelerator(cpu=True)
        optimizer = hf_efcp.create_optimizer(NAME, tiny_bert.parameters(), lr=1e-3, window_size=4)
        model, optimizer = accelerator.prepare(tiny_bert, optimizer)
        return accelerator, model, optimizer

    accelerator, model, optimizer = prepared()
    accelerator.backward(model(input_ids=torch.ones(2, 4, dtype=torch.long), labels=torch.tensor([0, 1])).loss)
    optimizer.step()
    good = tmp_path / "good"
    accelerator.save_state(str(good))
    marker, refused = tmp_path / "marker", set()
    for file in good.iterdir():
        for data in programs(marker, tmp_path):
            bad = tmp_path / "bad"
            shutil.rmtree(bad, ignore_errors=True)
            shutil.copytree(good, bad)
            (bad / file.name).write_bytes(data)
            try:
                prepared()[0].load_state(str(bad))
            except Exception:  # whose it is
                refused.add(file.name)
            assert not marker.exists(), file.name
    assert refused >= {"optimizer.bin", "model.safetensors"}  # of random states that it cannot read Accelerate only says so
