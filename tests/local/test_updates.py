"""Local updates on one worker: what it leaves alone, the outer step, Accelerate, Trainer, and what is refused."""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hf_efcp
from hf_efcp.local import LocalUpdates, LocalUpdateTrainerMixin, LoRDO
from hf_efcp.options import OptionError
from tests.integration.accelerate_loop import batch_at, new_accelerator
from tests.local.runs import flat, model, optimizer_of, train
from tests.reference import relative
from tests.test_docs import tiny_bert


@pytest.mark.parametrize("kind", ["adamw", "lordo", "efcp_lowrank_mfac"])
def test_one_worker_is_the_optimizer_alone_bit_for_bit(kind):
    options = {"rank": 100, "omega": 1.0} if kind == "lordo" else {}  # K = 1: Adam
    nets = model(), model()
    optimizers = [optimizer_of(kind, net, **options) for net in nets]
    local = LocalUpdates(None, nets[0], optimizers[0], sync_every=1)
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, 6)
    assert torch.equal(flat(nets[0]), flat(nets[1]))
    assert local.rounds == 6 and local.bytes_sent == 0


def test_the_outer_step_is_nesterovs():
    net, lr, mu = model(), 0.7, 0.9
    start = flat(net)
    optimizer = optimizer_of("adamw", net)
    local = LocalUpdates(None, net, optimizer, sync_every=100, outer_lr=lr, outer_momentum=mu)
    theirs = nn.Parameter(start.clone())
    sgd = torch.optim.SGD([theirs], lr=lr, momentum=mu, nesterov=True)
    for r in range(4):
        before = flat(net)
        train(net, optimizer, 3, start=3 * r)
        theirs.grad = before - flat(net)
        sgd.step()
        local.synchronize()
        assert relative(flat(net), theirs.detach()) < 1e-14


def test_half_precision_keeps_small_differences():
    """theta_sync is in fp32: what one round adds is less than bf16 shows."""
    p = nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    net, optimizer = nn.ParameterList([p]), torch.optim.SGD([p], lr=2.0**-7)
    local = LocalUpdates(None, net, optimizer, sync_every=1, outer_lr=0.125)
    for _ in range(8):
        p.grad = -torch.ones_like(p)
        optimizer.step()
    assert local._master[p].dtype == torch.float32
    assert torch.equal(p.detach(), torch.full_like(p, 1 + 2.0**-7))


def test_buffers_and_parameters_that_are_not_trained_stay(tmp_path):
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    net[0].bias.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.1)
    local = LocalUpdates(None, net, optimizer, sync_every=1)
    net(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    assert local.rounds == 1 and net[1].running_mean.abs().sum() > 0


def test_accelerate_saves_and_resumes(tmp_path):
    def build():
        accelerator = new_accelerator()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(nn.Linear(12, 40), nn.Tanh(), nn.Linear(40, 3))
        optimizer = LoRDO(hf_efcp.parameter_groups(net), lr=0.01, rank=2)
        net, optimizer = accelerator.prepare(net, optimizer)
        return accelerator, net, optimizer, LocalUpdates(accelerator, net, optimizer, sync_every=4, outer_momentum=0.5)

    def go(accelerator, net, optimizer, start, stop):
        for t in range(start, stop):
            x, y = batch_at(t)
            accelerator.backward(nn.functional.cross_entropy(net(x), y))
            optimizer.step()
            optimizer.zero_grad()

    accelerator, net, optimizer, local = build()
    go(accelerator, net, optimizer, 0, 6)
    accelerator.save_state(tmp_path / "saved")  # brings the second synchronisation forward
    assert local.rounds == 2 and local.steps == 0
    go(accelerator, net, optimizer, 6, 12)
    expected = flat(net)
    accelerator, net, optimizer, local = build()
    accelerator.load_state(tmp_path / "saved")
    assert local.rounds == 2
    go(accelerator, net, optimizer, 6, 12)
    assert torch.equal(flat(net), expected)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x, labels=None):
        scores = self.layers(x)
        return {"loss": nn.functional.cross_entropy(scores, labels), "logits": scores}


def trainer(folder, **options):
    from transformers import Trainer, TrainingArguments

    class LocalTrainer(LocalUpdateTrainerMixin, Trainer):
        pass

    data = []
    for t in range(4):
        x, y = batch_at(t)
        data += [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = TrainingArguments(
        str(folder),
        max_steps=9,
        save_steps=5,
        logging_steps=1,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        seed=1,
    )
    torch.manual_seed(0)
    return LocalTrainer(model=Net(), args=arguments, train_dataset=data, eval_dataset=data[:4], local_updates=options)


def test_trainer_trains_and_resumes_bit_for_bit(tmp_path):
    options = {"sync_every": 3, "outer_lr": 0.9, "outer_momentum": 0.5, "lordo": {"rank": 2}}
    first = trainer(tmp_path / "first", **options)
    first.train()
    assert isinstance(first.optimizer.optimizer, LoRDO) and first.local.rounds == 4  # steps 3, 5 (saved), 8, 9
    assert (tmp_path / "first/checkpoint-5/local_updates/worker_0.pt").exists()
    again = trainer(tmp_path / "again", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "first/checkpoint-5"))
    assert torch.equal(flat(first.model), flat(again.model))
    assert not first.args.average_tokens_across_devices


def test_the_python_of_local_md_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    blocks = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "docs/local.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    data = [{"input_ids": torch.arange(8), "labels": torch.tensor(i % 2)} for i in range(8)]
    for block in blocks:
        namespace = {"model": tiny_bert(), "data": data, "loader": torch.utils.data.DataLoader(data, batch_size=4)}
        exec(compile(block, "docs/local.md", "exec"), namespace)
    assert namespace["trainer"]._lordo == {"preset": "measured", "rank": 64}


def test_what_trainer_is_refused(tmp_path):
    for options, message in (
        ({"sync_evry": 3}, "did you mean 'sync_every'"),
        ({"min_workers": 1}, "min_workers: Trainer needs every process"),
        ({"lordo": {"rnk": 3}}, "did you mean 'rank'"),
    ):
        with pytest.raises(OptionError, match=message):
            trainer(tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sync_every": 0}, "sync_every=0: must be an integer >= 1"),
        ({"outer_lr": -1}, "outer_lr=-1.0: must be a finite number > 0"),
        ({"outer_momentum": 1}, r"outer_momentum=1.0: must be a number in \[0, 1\)"),
        ({"syncevery": 3}, "did you mean 'sync_every'"),
        ({"min_workers": 2}, "min_workers=2: there is one worker"),
        ({"average_state": {"exp_avg": 0}}, "exp_avg=0: must be an integer >= 1"),
    ],
)
def test_bad_options(options, message):
    net = model()
    with pytest.raises(OptionError, match=message):
        LocalUpdates(None, net, optimizer_of("adamw", net), **options)


def test_what_cannot_train_alone_is_refused(tmp_path):
    net = model()
    adamw = optimizer_of("adamw", net)
    for accelerator, optimizer, options, message in (
        (SimpleNamespace(distributed_type="DistributedType.FSDP"), adamw, {}, "FSDP divides it: use DDP"),
        (SimpleNamespace(distributed_type="DistributedType.NO", scaler=object()), adamw, {}, "mixed_precision='fp16'"),
        (None, optimizer_of("efcp_ldadamw", net, shard="auto"), {}, "shard='auto': each worker has a state of its own"),
        (None, optimizer_of("efcp_lowrank_mfac", net, comm="factors"), {}, "comm='factors'"),
        (None, optimizer_of("efcp_ldadamw", net), {"average_state": {"exp_avg": 1}}, "a basis or a window of its own"),
        (None, optimizer_of("lordo", net), {"average_state": {"error": 1}}, "LoRDO has no entry 'error' to average"),
        (None, optimizer_of("adamw", model()), {}, "trains no parameter of the model"),
        (None, "adamw", {}, "optimizer=str: expected a torch.optim.Optimizer"),
    ):
        with pytest.raises(OptionError, match=message):
            LocalUpdates(accelerator, net, optimizer, **options)
    local = LocalUpdates(None, net, adamw)
    with pytest.raises(OptionError, match=r"common\.pt is missing"):
        local.load(tmp_path)


def test_a_parameter_that_is_trained_later_is_refused():
    net = model()
    net[0].bias.requires_grad_(False)
    optimizer = optimizer_of("adamw", net)
    LocalUpdates(None, net, optimizer, sync_every=2)
    train(net, optimizer, 1)
    net[0].bias.requires_grad_(True)
    with pytest.raises(OptionError, match=r"a parameter of shape \(16,\) is trained now, and was frozen"):
        train(net, optimizer, 1)


def test_weights_that_are_not_finite_are_named(caplog):
    caplog.set_level(logging.ERROR)
    net = model()
    optimizer = optimizer_of("adamw", net)
    LocalUpdates(None, net, optimizer, sync_every=1)
    net[0].weight.data[0, 0] = torch.nan
    with pytest.raises(RuntimeError, match=r"worker 0: the weights of 1 of 1 workers are not finite after 1 steps"):
        train(net, optimizer, 1)


def test_an_entry_that_the_optimizer_does_not_have_is_named():
    net = model()
    optimizer = optimizer_of("adamw", net)
    LocalUpdates(None, net, optimizer, sync_every=2, average_state={"exp_avgs": 1})
    with pytest.raises(OptionError, match="unknown state entry 'exp_avgs': did you mean 'exp_avg'"):
        train(net, optimizer, 2)


def test_a_matrix_that_is_trained_later_gets_its_basis_with_all_workers():
    """Frozen at first, and then trained by new LocalUpdates: the frozen one's state does not stand in the way."""
    net = model()
    optimizer = optimizer_of("lordo", net)
    local = LocalUpdates(None, net, optimizer, sync_every=2)
    train(net, optimizer, 2)
    local.detach()
    first = next(p for p in net.parameters() if p.ndim == 2)
    first.requires_grad_(False)
    again = LocalUpdates(None, net, optimizer, sync_every=2)
    first.grad = None
    before = first.detach().clone()
    train(net, optimizer, 4)
    assert again.rounds == 2 and torch.equal(first, before)
