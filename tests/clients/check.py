"""What every client must show: the name is accepted, it trains, it resumes bit for bit, a bad option ends it before any data.

python tests/clients/check.py NAME, in an environment that has the client and hf_efcp; tests/clients/run.sh makes one.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
NAME = "efcp_lowrank_mfac"
# Trainer's arguments, which most clients take.
TRAINING = {"optim": NAME, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "per_device_train_batch_size": 4}
TRAINING |= {"report_to": "none", "use_cpu": "true", "logging_steps": 1, "dataloader_num_workers": 0}
CHECKPOINT = "**/checkpoint-{step}/optimizer.pt"


def dashed(arguments):
    """`--name value` for each."""
    return [word for name, value in arguments.items() for word in (f"--{name}", str(value))]


def trl(output, options, resume):
    """TRL."""
    own = {"model_name_or_path": "model", "dataset_name": "data", "output_dir": output, "bf16": "false", "optim_args": options}
    return ["trl", "sft", *dashed(TRAINING | own | ({"resume_from_checkpoint": resume} if resume else {}))]


def llamafactory(output, options, resume):
    """LLaMA-Factory, under torchrun."""
    os.environ |= {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1"}
    own = {"stage": "sft", "do_train": "true", "model_name_or_path": "model", "template": "default", "finetuning_type": "full"}
    own |= {"dataset": "toy", "dataset_dir": "data", "output_dir": output, "optim_args": options}
    arguments = TRAINING | own | ({"resume_from_checkpoint": resume} if resume else {})
    return ["llamafactory-cli", "train", *dashed(arguments)]


def swift(output, options, resume):
    """ms-swift."""
    own = {"model": "model", "model_type": "llama", "template": "dummy", "use_hf": "true", "dataset": "data/train.jsonl"}
    own |= {"tuner_type": "full", "torch_dtype": "float32", "output_dir": output, "optim_args": options, "add_version": "false"}
    own |= {"split_dataset_ratio": 0, "load_from_cache_file": "false", "gradient_checkpointing": "false"}
    return ["swift", "sft", *dashed(TRAINING | own | ({"resume_from_checkpoint": resume} if resume else {}))]


def axolotl(output, options, resume):
    """Axolotl."""
    config = {"base_model": "model", "optimizer": NAME, "optim_args": dict([options.split("=")]), "learning_rate": 1e-3}
    config |= {"datasets": [{"path": "data/train.jsonl", "type": "chat_template"}], "dataset_prepared_path": f"{output}-data"}
    config |= {"output_dir": output, "max_steps": 4, "save_steps": 2, "micro_batch_size": 4, "gradient_accumulation_steps": 1}
    config |= {"sequence_len": 64, "bf16": False, "fp16": False, "tf32": False, "logging_steps": 1, "num_epochs": 1}
    config |= {
        "lr_scheduler": "linear",
        "save_safetensors": True,
        "val_set_size": 0,
        "resume_from_checkpoint": resume and str(resume),
    }
    Path(f"{output}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return ["axolotl", "train", f"{output}.yaml", "--launcher", "accelerate"]


def lightning(output, options, resume):
    """LightningCLI."""
    own = {"trainer.max_epochs": 2, "trainer.accelerator": "cpu", "trainer.logger": "false", "trainer.default_root_dir": output}
    own |= {"trainer.callbacks": "ModelCheckpoint", "trainer.callbacks.save_top_k": -1}
    own |= {"optimizer": "hf_efcp.LowRankMFAC", "optimizer.lr": 1e-3, "optimizer.preset": "measured"}
    own |= dict([f"optimizer.{options}".split("=")]) | ({"ckpt_path": resume} if resume else {})
    return [sys.executable, str(HERE / "lightning_cli.py"), "fit", *dashed(own)]


CLIENTS = {client.__name__: client for client in (trl, llamafactory, swift, axolotl, lightning)}


def states(client, output):
    """The optimizer's state of both checkpoints, and what one resumes from."""
    if client == "lightning":
        files = sorted(Path(output).rglob("*.ckpt"), key=lambda file: torch.load(file, weights_only=False)["global_step"])
        return [torch.load(file, weights_only=False)["optimizer_states"][0] for file in files], files[0]
    files = [next(Path(output).glob(CHECKPOINT.format(step=step))) for step in (2, 4)]
    return [torch.load(file, weights_only=True) for file in files], files[0].parent


def same(a, b):
    """Whether two states are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


def run(command, name, fails=False):
    """Run a command by `hf-efcp run`; its output goes into NAME.log."""
    with open(f"{name}.log", "w") as log:
        status = subprocess.run(["hf-efcp", "run", *command], stdout=log, stderr=log).returncode
    text = Path(f"{name}.log").read_text()
    assert (status != 0) == fails, f"{name}: status {status}\n{text[-3000:]}"
    return text


def check(client):
    """Run the checks of one client in the current folder."""
    command = CLIENTS[client]
    run(command("whole", "rank=2", None), "whole")
    (middle, end), resume = states(client, "whole")
    assert end["efcp"]["class"] == "LowRankMFAC" and end["efcp"]["options"]["rank"] == 2, end["efcp"]
    assert end["efcp"]["options"]["window_size"] == 16, "the preset is in force"
    assert not same(middle["state"], end["state"])
    print("ok: the name is accepted, and trains", flush=True)

    shutil.copytree("whole", "again", ignore=lambda folder, names: [n for n in names if n == "checkpoint-4"])
    for file in Path("again").rglob("*.ckpt"):
        file.unlink()
    run(command("again", "rank=2", resume.resolve()), "again")
    resumed = states(client, "again")[0][-1] if client != "lightning" else resumed_by_lightning("again")
    if client == "axolotl":  # it goes on with other samples, so that torch's AdamW differs in the same way
        assert [int(entry["step"]) for entry in resumed["state"].values() if "step" in entry] == [4]
        assert resumed["efcp"] == end["efcp"]
        print("ok: a run is resumed", flush=True)
    else:
        assert same(end["state"], resumed["state"])
        print("ok: a resumed run is the uninterrupted one, bit for bit", flush=True)

    text = run(command("bad", "rnk=4", None), "bad", fails=True)
    said = [line for line in text.splitlines() if "rnk" in line and "option" in line.lower()]
    assert said and not list(Path("bad").rglob("checkpoint-*")), text[-3000:]
    assert not any(word in text for word in ("data is loaded", "Tokenizing", "Generating train split")), text[-3000:]
    print(f"ok: a bad option is refused before any data is loaded: {said[-1][:150]}", flush=True)


def resumed_by_lightning(output):
    """The state at the end of a run that was resumed."""
    last = max(Path(output).rglob("*.ckpt"), key=lambda file: torch.load(file, weights_only=False)["global_step"])
    return torch.load(last, weights_only=False)["optimizer_states"][0]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, str(HERE / "model.py")], cwd=folder, check=True) if sys.argv[1] != "lightning" else None
        os.chdir(folder)
        check(sys.argv[1])
