"""Clients that are libraries: fastai's fit and torchtune's recipe, which make the optimizer by a function or a component.

python tests/clients/libraries.py NAME, in an environment that has the client and hf_efcp; tests/clients/run.sh makes one.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

NAME = "efcp_lowrank_mfac"


def same(a, b):
    """Whether two states are equal bit for bit."""
    return all(torch.equal(t, b[i][k]) for i, entry in a.items() for k, t in entry.items()) and a.keys() == b.keys()


def fastai():
    """Learner: `fit`, `fit_flat_cos`, and a schedule of the rate alone; `save` and `load`."""
    from fastai.callback.schedule import ParamScheduler, combined_cos
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper

    import hf_efcp

    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(list(zip(x, (x.sum(1) > 0).long(), strict=True)), batch_size=8)

    def learner(**options):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        make = partial(OptimWrapper, opt=hf_efcp.LowRankMFAC, preset="measured", **options)
        return Learner(DataLoaders(loader, loader), model, loss_func=torch.nn.functional.cross_entropy, opt_func=make)

    def state(one):
        return one.opt.opt.state_dict()["state"]

    for fit in (
        lambda one: one.fit_flat_cos(1, 1e-2),
        lambda one: one.fit(1, cbs=ParamScheduler({"lr": combined_cos(0.25, 4e-4, 1e-2, 1e-7)})),  # fit_one_cycle's rate
    ):
        one = learner()
        before = [p.detach().clone() for p in one.model.parameters()]
        fit(one)
        assert not any(torch.equal(p, q) for p, q in zip(one.model.parameters(), before, strict=True))
    print("ok: it trains")

    whole, first, second = learner(), learner(), learner()
    whole.fit(2, 1e-2)
    first.fit(1, 1e-2)
    file = first.save(Path.cwd() / "first", with_opt=True)
    second.create_opt()
    second.load(Path(file).with_suffix(""), with_opt=True)
    second.fit(1, 1e-2)
    assert same(state(whole), state(second))
    print("ok: a resumed run is the uninterrupted one, bit for bit")

    try:
        learner(rnk=4).fit(1, 1e-2)
    except hf_efcp.OptionError as error:
        print(f"ok: a bad option is refused: {str(error)[:150]}")
    else:
        raise AssertionError("a bad option was taken")


def torchtune():
    """`tune run`, whose recipe makes the optimizer of a component: full fine-tuning of a LLaMA of a few thousand parameters."""
    import sentencepiece
    from torchtune.models.llama2 import llama2

    Path("text").write_text("".join(f"What is {i} and {i}? {2 * i}.\n" for i in range(200)))
    sentencepiece.SentencePieceTrainer.train(input="text", model_prefix="tokenizer", vocab_size=64, hard_vocab_limit=False)
    rows = [{"instruction": f"What is {i} and {i}?", "input": "", "output": f"{2 * i}"} for i in range(16)]
    Path("data.json").write_text(json.dumps(rows))
    vocabulary = sentencepiece.SentencePieceProcessor(model_file="tokenizer.model").vocab_size()
    sizes = {"vocab_size": vocabulary, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "embed_dim": 32, "max_seq_len": 512}
    torch.manual_seed(0)
    Path("start").mkdir()
    torch.save(llama2(**sizes).state_dict(), "start/model.pt")

    def tune(output, epochs, resume=None, fails=False, **options):
        """Run the recipe; give what it printed, and the optimizer's state at the end."""
        checkpointer = {"_component_": "torchtune.training.FullModelTorchTuneCheckpointer", "checkpoint_dir": "start"}
        checkpointer |= {"checkpoint_files": ["model.pt"], "output_dir": output, "model_type": "LLAMA2"}
        if resume:  # the recipe looks for the last epoch in its output folder
            shutil.copytree(resume, output, ignore=lambda folder, names: [n for n in names if n == "epoch_1"])
            files = [str(p.relative_to(output)) for p in Path(output, "epoch_0").glob("*.*") if p.stem != "config"]
            checkpointer |= {"checkpoint_files": [f for f in files if f.endswith((".pt", ".bin"))]}
        config = {"output_dir": output, "model": {"_component_": "torchtune.models.llama2.llama2", **sizes}}
        config |= {"tokenizer": {"_component_": "torchtune.models.llama2.llama2_tokenizer", "path": "tokenizer.model"}}
        data = {"_component_": "torchtune.datasets.alpaca_dataset", "source": "json", "data_files": "data.json"}
        config |= {"dataset": {**data, "split": "train"}, "checkpointer": checkpointer, "resume_from_checkpoint": bool(resume)}
        component = {"_component_": "hf_efcp.create_optimizer", "name": NAME, "preset": "measured", "lr": 1e-3, **options}
        config |= {"optimizer": component, "optimizer_in_bwd": False, "loss": {"_component_": "torch.nn.CrossEntropyLoss"}}
        config |= {"seed": 0, "shuffle": True, "batch_size": 4, "epochs": epochs, "max_steps_per_epoch": 2, "device": "cpu"}
        config |= {"gradient_accumulation_steps": 1, "dtype": "fp32", "compile": False, "log_every_n_steps": 1}
        config |= {"enable_activation_checkpointing": False, "enable_activation_offloading": False, "clip_grad_norm": None}
        config |= {"metric_logger": {"_component_": "torchtune.training.metric_logging.StdoutLogger"}}
        Path(f"{output}.yaml").write_text(json.dumps(config))  # JSON is YAML
        command = ["hf-efcp", "run", "tune", "run", "full_finetune_single_device", "--config", f"{output}.yaml"]
        done = subprocess.run(command, capture_output=True, text=True)
        text = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, text[-3000:]
        file = Path(output, "recipe_state", "recipe_state.pt")
        return text, torch.load(file, weights_only=True)["optimizer"] if file.exists() else None

    _, end = tune("whole", 3, rank=2)  # it saves the optimizer's state after each epoch but the last
    assert end["efcp"]["class"] == "LowRankMFAC" and end["efcp"]["options"]["rank"] == 2
    _, middle = tune("half", 2, rank=2)
    assert not same(middle["state"], end["state"])
    print("ok: it trains")
    _, again = tune("again", 3, resume="half", rank=2)
    assert same(again["state"], end["state"])
    print("ok: a resumed run is the uninterrupted one, bit for bit")
    text, _ = tune("bad", 1, fails=True, rnk=4)
    said = next(line for line in text.splitlines() if "unknown option 'rnk'" in line)
    print(f"ok: a bad option is refused: {said[:150]}")


if __name__ == "__main__":
    client = {f.__name__: f for f in (fastai, torchtune)}[sys.argv[1]]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        client()
