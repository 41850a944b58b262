"""What DeepSpeed would do to the optimizer, on stand-ins with its names and shapes: set up, or refused before training.

tests/distributed/test_deepspeed.py does it with the real one.
"""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

import hf_efcp
from hf_efcp import OptionError, optimizer_cls_and_kwargs
from hf_efcp.integrations import deepspeed
from tests.reference import names

ZERO = {"zero_optimization": {"stage": 2}}
REFUSED = {
    "optimizer of its own \\(AdamW\\), which replaces SparseMFAC": {"optimizer": {"type": "AdamW"}, **ZERO},
    "replaces SparseMFAC by DeepSpeedCPUAdam": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "offload_optimizer.device to none": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}},
        "zero_force_ds_cpu_optimizer": False,
    },
    "stage=3: SparseMFAC allows 0, 1 and 2": {"zero_optimization": {"stage": 3}},
    "autotp_size: SparseMFAC has no tensor parallelism": {"tensor_parallel": {"autotp_size": 2}, **ZERO},
    "elastic_checkpoint=true": {"zero_optimization": {"stage": 1, "elastic_checkpoint": True}},
    "load_universal=true": {"checkpoint": {"load_universal": True}, **ZERO},
}


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def prepare(config, model, optimizer, replace=lambda ours: SimpleNamespace(optimizer=ours)):
    """Accelerator.prepare with a DeepSpeed that makes `replace(optimizer)` the engine's."""

    def original(self, *args):
        engine = nn.Sequential(model)
        engine.optimizer = replace(optimizer)
        return engine, SimpleNamespace(optimizer=engine.optimizer)

    accelerator = SimpleNamespace(deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    return deepspeed.prepare(original)(accelerator, model, optimizer)


class DeepSpeedZeroOptimizer:
    """One flat piece for each group, as the real one makes them."""

    dp_process_group = None

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.round_robin_bit16_groups = [group["params"] for group in optimizer.param_groups]
        self.round_robin_bit16_padding = [[0] * len(params) for params in self.round_robin_bit16_groups]
        self.partition_size = [sum(p.numel() for p in params) for params in self.round_robin_bit16_groups]
        for group in optimizer.param_groups:
            piece = torch.cat([p.detach().flatten() for p in group["params"]])
            group["params"] = [piece.requires_grad_()]


def test_accelerate_calls_us():
    assert Accelerator._prepare_deepspeed._hf_efcp_original.__name__ == "_prepare_deepspeed"


@pytest.mark.parametrize("message", REFUSED)
def test_refused_in_prepare_and_in_the_arguments(message, model, make_args):
    optimizer = hf_efcp.create_optimizer("efcp_sparse_mfac", model.parameters(), lr=0.1)

    def never(ours):
        raise AssertionError("DeepSpeed was called")

    with pytest.raises(OptionError, match=message):
        prepare(REFUSED[message], model, optimizer, never)
    args = make_args(optim="efcp_sparse_mfac")
    args.hf_deepspeed_config = SimpleNamespace(config=REFUSED[message])
    with pytest.raises(OptionError, match=message):
        optimizer_cls_and_kwargs(args)


@pytest.mark.parametrize("name", ["efcp_lowrank_mfac", "efcp_lowrank_ggt"])
def test_low_rank_is_told_of_its_relatives(name, model):
    optimizer = hf_efcp.create_optimizer(name, model.parameters(), lr=0.1)
    relative = type(optimizer).__name__.replace("LowRank", "Sparse")
    with pytest.raises(OptionError, match=f"stage=2 flattens the parameters.* needs matrices: use {relative} or .*DDP.*FSDP2"):
        prepare(ZERO, model, optimizer)


@pytest.mark.parametrize("name", names(windowed=False))
def test_methods_without_a_window_are_refused(name, model, make_args):
    optimizer = hf_efcp.create_optimizer(name, model.parameters(), lr=0.1)
    refused = f"stage=2 flattens the parameters.* {type(optimizer).__name__} needs matrices: use .*DDP.*FSDP2"
    with pytest.raises(OptionError, match=refused):
        prepare(ZERO, model, optimizer)
    args = make_args(optim=name)
    args.hf_deepspeed_config = SimpleNamespace(config=ZERO)
    with pytest.raises(OptionError, match=refused):
        optimizer_cls_and_kwargs(args)


def test_scope_layer_is_refused(model):
    optimizer = hf_efcp.create_optimizer("efcp_dense_mfac", model.parameters(), lr=0.1, scope="layer")
    with pytest.raises(OptionError, match=r"scope='layer': DeepSpeed .* leaves no layers"):
        prepare(ZERO, model, optimizer)


def test_stochastic_rounding_of_an_fp32_copy_is_refused(model, make_args):
    optimizer = hf_efcp.create_optimizer("efcp_dense_mfac", model.parameters(), lr=0.1, stochastic_rounding=True)
    args = make_args(optim="efcp_sparse_mfac", optim_args="stochastic_rounding=true")
    for stage in (1, 2):
        config = {"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
        args.hf_deepspeed_config = SimpleNamespace(config=config)
        message = f"stochastic_rounding=true has no effect: DeepSpeed zero_optimization.stage={stage} trains an fp32 copy"
        for attempt in (lambda config=config: prepare(config, model, optimizer), lambda: optimizer_cls_and_kwargs(args)):
            with pytest.raises(OptionError, match=message):
                attempt()


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 2}, "bf16": {"bf16_master_weights_and_grads": True}}])
def test_stochastic_rounding_of_the_parameters_themselves_is_not(config, model, make_args):
    args = make_args(optim="efcp_sparse_mfac", optim_args="stochastic_rounding=true")
    args.hf_deepspeed_config = SimpleNamespace(config=config)
    assert optimizer_cls_and_kwargs(args)[1]["stochastic_rounding"] is True


def test_two_groups_are_refused(model):
    groups = hf_efcp.parameter_groups(model, 0.1)
    optimizer = hf_efcp.create_optimizer("efcp_dense_mfac", groups, lr=0.1)
    with pytest.raises(OptionError, match=f"one window takes one group, got {len(groups)}: pass the parameters as one list"):
        prepare(ZERO, model, optimizer)


@pytest.mark.parametrize("stage", [0, 1])
def test_another_optimizer_in_the_place_of_ours_is_found(stage, model, one_process):
    optimizer = hf_efcp.create_optimizer("efcp_dense_mfac", model.parameters(), lr=0.1)
    config = {"zero_optimization": {"stage": stage}}
    with pytest.raises(OptionError, match="DeepSpeed trains with SimpleNamespace in place of DenseMFAC"):
        prepare(config, model, optimizer, lambda ours: SimpleNamespace(optimizer=torch.optim.SGD(model.parameters(), lr=1.0)))


def test_copies_of_the_parameters_without_zero_are_refused(model):
    optimizer = hf_efcp.create_optimizer("efcp_dense_mfac", model.parameters(), lr=0.1)

    def copies(ours):
        group = ours.param_groups[0]
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
        return SimpleNamespace(optimizer=ours)

    with pytest.raises(OptionError, match="hands DenseMFAC copies of the parameters"):
        prepare({}, model, optimizer, copies)


def test_a_divider_that_is_not_known_is_refused(model, one_process):
    optimizer = hf_efcp.create_optimizer("efcp_dense_mfac", model.parameters(), lr=0.1)
    with pytest.raises(OptionError, match="DeepSpeed divides the parameters by SimpleNamespace"):
        prepare(ZERO, model, optimizer)


def test_an_optimizer_that_has_taken_steps_is_refused(model):
    optimizer = hf_efcp.create_optimizer("efcp_dense_mfac", model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()
    with pytest.raises(OptionError, match="has taken steps: under DeepSpeed prepare it first"):
        prepare(ZERO, model, optimizer)


def test_zero_steps_one_flat_piece(model, one_process):
    optimizer = hf_efcp.create_optimizer("efcp_sparse_mfac", model.parameters(), lr=0.1, shard="auto", density=0.2, block_size=8)
    prepare(ZERO, model, optimizer, DeepSpeedZeroOptimizer)
    (piece,) = optimizer.param_groups[0]["params"]
    before = piece.detach().clone()
    piece.grad = torch.arange(len(piece)).float()
    optimizer.step()
    assert "window_indices" in optimizer.state[piece]  # compressed, though it is 1-D
    assert (before != piece).sum() == len(range(0, len(piece), 8)) * 2 - 1  # 2 of each block of 8, 1 of the last, of 5


@pytest.mark.parametrize("metric", ["factored", "diagonal"])
def test_a_metric_that_needs_rows_is_refused_where_it_is_given(metric, model, make_args):
    args = make_args(optim="efcp_sparse_mfac", optim_args=f"metric={metric}")
    args.hf_deepspeed_config = SimpleNamespace(config=ZERO)
    optimizer = hf_efcp.create_optimizer("efcp_sparse_mfac", model.parameters(), lr=0.1, preset="measured", metric=metric)
    message = f"metric='{metric}': DeepSpeed .*stage=2 flattens the parameters, and rows are lost: use metric=tensor or none"
    for attempt in (lambda: optimizer_cls_and_kwargs(args), lambda: prepare(ZERO, model, optimizer)):
        with pytest.raises(OptionError, match=message):
            attempt()


def test_the_measured_metric_is_that_of_parts(model, make_args, one_process, caplog):
    args = make_args(optim="efcp_sparse_mfac")
    args.hf_deepspeed_config = SimpleNamespace(config=ZERO)
    cls, kwargs = optimizer_cls_and_kwargs(args)
    optimizer = cls(model.parameters(), **kwargs)
    lengths = [p.numel() for p in model.parameters()]
    prepare(ZERO, model, optimizer, DeepSpeedZeroOptimizer)
    assert [record.message for record in caplog.records if "metric" in record.message] == [
        "DeepSpeed zero_optimization.stage=2: metric=tensor, one for each parameter's part of a piece"
    ]
    (piece,) = optimizer.param_groups[0]["params"]
    piece.grad = torch.cat([torch.full((length,), 2.0**k) for k, length in enumerate(lengths)])
    optimizer.step()
    mean = optimizer.state[piece]["metric_mean"] / (1 - optimizer.options.metric_beta)
    torch.testing.assert_close(mean, torch.tensor([4.0**k for k in range(len(lengths))]))


def test_other_optimizers_are_left_alone(model):
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    config = {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 3}}
    assert prepare(config, model, sgd)[1].optimizer.optimizer is sgd


def test_the_trainers_groups_become_one(tiny_bert, make_args):
    args = make_args(optim="efcp_sparse_mfac")
    assert len(optimizer_cls_and_kwargs(args, model=tiny_bert)[1]["params"]) > 1
    args.hf_deepspeed_config = SimpleNamespace(config=ZERO)
    (group,) = optimizer_cls_and_kwargs(args, model=tiny_bert)[1]["params"]
    assert len(group["params"]) == len(list(tiny_bert.parameters()))
    args.weight_decay = 0.1
    with pytest.raises(OptionError, match="weight_decay is 0\\.0 and 0\\.1: use weight_decay=0, or use DDP"):
        optimizer_cls_and_kwargs(args, model=tiny_bert)
