"""Real DeepSpeed on two gloo processes: ZeRO-1 and 2 train as one process does, and resume. Needs `pip install deepspeed`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState
from torch import nn

import hf_efcp
from hf_efcp import OptionError
from tests.distributed.processes import run
from tests.optim.helpers import differences, snapshot
from tests.reference import info, relative

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS, HALF = 12, 6
OPTIONS = {"lr": 0.05, "window_size": 4, "update_rms": 0.1, "weight_decay": 0.1}
SPARSE = {"density": 0.05, "block_size": 64}
GGT = {"eps": 1e-3}
BF16 = {**SPARSE, "dtype": "bf16"}
MASTER = {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")


def model_and_data():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 31), nn.Tanh(), nn.Linear(31, 5))
    x = torch.randn(STEPS, 8, 9)
    return model, x, x[..., :5].argmax(-1)


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def environment():
    os.environ |= {"LOCAL_RANK": str(dist.get_rank()), "RANK": str(dist.get_rank()), "WORLD_SIZE": str(dist.get_world_size())}
    AcceleratorState._reset_state(reset_partial_state=True)


def create(name, params, **options):
    damping = {} if info(name).family == "ggt" else {"damping": 1e-3}
    return hf_efcp.create_optimizer(name, params, **{**OPTIONS, **damping, **options})


def prepared(name, stage, groups=None, shard="auto", dtype=None, bf16=None, **options):
    environment()
    config = {"zero_optimization": {"stage": stage}, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}
    config["gradient_clipping"] = 0.0
    config["bf16"] = {"enabled": dtype == "bf16", **(bf16 or {})}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config), mixed_precision=dtype)
    model, x, y = model_and_data()
    params = model.parameters() if groups is None else groups(model)
    optimizer = create(name, params, shard=shard, **options)
    engine, wrapped = accelerator.prepare(model, optimizer)
    return accelerator, engine, wrapped, optimizer, x, y


def train(accelerator, engine, wrapped, x, y, start, stop, rank):
    part = slice(4 * rank, 4 * rank + 4)
    for step in range(start, stop):
        loss = nn.functional.cross_entropy(engine(x[step, part].to(engine.module[0].weight.dtype)).float(), y[step, part])
        accelerator.backward(loss)
        wrapped.step()
        wrapped.zero_grad()
    return flat(engine.module), float(loss)


def whole(rank, cases):
    """For each (name, options): the parameters, the first and last loss, bytes, figures."""
    found = []
    for name, stage, options in cases:
        accelerator, engine, wrapped, optimizer, x, y = prepared(name, stage, **options)
        _, first = train(accelerator, engine, wrapped, x, y, 0, 1, rank)
        end, _ = train(accelerator, engine, wrapped, x, y, 1, STEPS, rank)
        _, last = train(accelerator, engine, wrapped, x, y, 0, 1, rank)
        found.append((end, first, last, optimizer.memory_footprint(), optimizer.diagnostics()))
    return found


def alone(name, options):
    model, x, y = model_and_data()
    optimizer = create(name, model.parameters(), **options)
    for step in [*range(STEPS), 0]:
        end = flat(model)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[step]), y[step]).backward()
        optimizer.step()
    return end, optimizer


VARIANTS = [{}, {"momentum": 0.5, "window_momentum": 0.5, "weight_decay_mode": "l2"}]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_dense_is_as_on_one_process(stage):
    cases = [("efcp_dense_mfac", stage, options) for options in VARIANTS] + [("efcp_dense_ggt", stage, GGT)]
    first, second = run(2, whole, cases)
    for (name, _, options), a, b in zip(cases, first, second, strict=True):
        expected, optimizer = alone(name, options)
        assert torch.equal(a[0], b[0])
        assert relative(a[0], expected) <= 1e-6
        assert a[3]["window"] <= optimizer.memory_footprint()["window"] * (1 if stage == 0 else 0.51)
        for figure in ("row_norm", "update_rms", "kappa"):
            assert a[4][figure] == pytest.approx(optimizer.diagnostics()[figure], rel=1e-4)


def test_sparse_trains_on_flat_pieces():
    cases = [("efcp_sparse_mfac", 1, SPARSE), ("efcp_sparse_ggt", 2, {**SPARSE, **GGT}), ("efcp_sparse_mfac", 2, BF16)]
    first, second = run(2, whole, cases)
    dense = alone("efcp_dense_mfac", {})[1].memory_footprint()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[0], b[0])
        assert a[2] < 0.9 * a[1]
        assert a[3]["window"] <= 0.1 * dense["window"]
        assert a[4]["step"] == STEPS + 1 and "error_norm" not in a[4]


def with_measured_metric(rank):
    """The parts of this process's piece, the losses, and the state of the metric; nothing but the preset is given."""
    found = []
    for name, stage in (("efcp_sparse_mfac", 1), ("efcp_dense_mfac", 2)):
        sparse = SPARSE if info(name).compression == "sparse" else {}
        accelerator, engine, wrapped, optimizer, x, y = prepared(
            name, stage, preset="measured", lr=0.01, update_rms=1.0, weight_decay=0.0, **sparse
        )
        (piece,) = optimizer.param_groups[0]["params"]
        parts, before = [piece.detach()[part] for part in optimizer.builder.pieces.parts], flat(engine.module)
        parts = [part.clone() for part in parts]
        _, first = train(accelerator, engine, wrapped, x, y, 0, 1, rank)
        train(accelerator, engine, wrapped, x, y, 1, STEPS, rank)
        _, last = train(accelerator, engine, wrapped, x, y, 0, 1, rank)
        found.append((parts, before, first, last, optimizer.options.metric, optimizer.state[piece]["metric_mean"]))
    return found


def test_the_measured_metric_is_that_of_the_parts():
    for a, b in zip(*run(2, with_measured_metric), strict=True):
        assert torch.equal(torch.cat([*a[0], *b[0]]).double(), a[1])  # together all parameters, and no padding
        for parts, _, first, last, metric, mean in (a, b):
            assert metric == "tensor"
            assert mean.shape == (len(parts),) and (mean > 0).all()
            assert last < 0.9 * first


def small_steps(rank, rounding):
    """How many parameters 8 steps of less than half a unit have changed, where ZeRO trains bf16 pieces."""
    options = {**BF16, "stochastic_rounding": rounding, "lr": 1e-5, "weight_decay": 0.0, "update_rms": 1.0, "density": 1.0}
    accelerator, engine, wrapped, optimizer, x, y = prepared("efcp_sparse_mfac", 2, bf16=MASTER, **options)
    before = flat(engine.module)
    end, _ = train(accelerator, engine, wrapped, x, y, 0, 8, rank)
    (piece,) = optimizer.param_groups[0]["params"]
    return int((end != before).sum()), piece.dtype


def test_small_steps_of_bf16_pieces_count_by_stochastic_rounding():
    for (rounded, dtype), (nearest, _) in zip(run(2, small_steps, True), run(2, small_steps, False), strict=True):
        assert dtype == torch.bfloat16
        assert rounded > 2 * nearest


def save_and_resume(rank, folder, cases):
    for i, (name, stage, options) in enumerate(cases):
        accelerator, engine, wrapped, optimizer, x, y = prepared(name, stage, **options)
        train(accelerator, engine, wrapped, x, y, 0, HALF, rank)
        accelerator.save_state(str(folder / str(i)))
        end, _ = train(accelerator, engine, wrapped, x, y, HALF, STEPS, rank)
        state = snapshot(optimizer, [p for g in optimizer.param_groups for p in g["params"]])

        accelerator, engine, wrapped, optimizer, x, y = prepared(name, stage, **options)
        accelerator.load_state(str(folder / str(i)))
        again, _ = train(accelerator, engine, wrapped, x, y, HALF, STEPS, rank)
        assert torch.equal(again, end), name
        assert differences(state, snapshot(optimizer, [p for g in optimizer.param_groups for p in g["params"]])) == [], name


def test_resumes_bit_for_bit(tmp_path):
    cases = [("efcp_lowrank_mfac", 0, {}), ("efcp_sparse_mfac", 0, SPARSE), ("efcp_sparse_mfac", 1, {**SPARSE, "momentum": 0.5})]
    run(2, save_and_resume, tmp_path, [*cases, ("efcp_dense_ggt", 2, {**GGT, "metric": "tensor"}), ("efcp_sparse_mfac", 2, BF16)])


def refused(rank):
    def two(model):
        return [{"params": [model[0].weight]}, {"params": [model[2].weight]}]

    cases = {
        "flattens the parameters, and LowRankMFAC needs matrices": ("efcp_lowrank_mfac", 2, {}),
        "stage=3: SparseMFAC allows": ("efcp_sparse_mfac", 3, {}),
        "scope='layer'": ("efcp_dense_mfac", 1, {"scope": "layer"}),
        "metric='factored'": ("efcp_dense_mfac", 1, {"metric": "factored"}),
        "trains an fp32 copy": ("efcp_sparse_mfac", 2, {**BF16, "stochastic_rounding": True}),
        "one window takes one group, got 2": ("efcp_dense_mfac", 1, {"groups": two}),
        "finds a plain tensor|hands DenseMFAC copies": ("efcp_dense_mfac", 0, {"dtype": "bf16"}),
    }
    for message, (name, stage, options) in cases.items():
        with pytest.raises(OptionError, match=message):
            prepared(name, stage, **options)


def test_the_rest_is_refused_before_training():
    run(2, refused)


def without_accelerate(rank):
    import deepspeed

    environment()
    model, x, y = model_and_data()
    optimizer = hf_efcp.create_optimizer("efcp_dense_mfac", model.parameters(), **OPTIONS)
    config = {"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 4, "zero_allow_untested_optimizer": True}
    with pytest.raises(OptionError, match=r"finds a plain tensor \(\d+,\) in their place, as DeepSpeed does"):
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        engine.backward(nn.functional.cross_entropy(engine(x[0]), y[0]))
        engine.step()


def test_deepspeed_by_itself_is_refused():
    run(2, without_accelerate)


SCRIPT = """
import torch
from transformers import BertConfig, BertForSequenceClassification, HfArgumentParser, Trainer, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
torch.manual_seed(0)
sizes = {"vocab_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
x = torch.randint(0, 32, (64, 8))
data = [{"input_ids": row, "labels": int(row[0] > 15)} for row in x]
trainer = Trainer(BertForSequenceClassification(BertConfig(**sizes)), args, train_dataset=data)
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
"""


def launch(folder, out, config, *arguments):
    (folder / "script.py").write_text(SCRIPT)
    (folder / "ds.json").write_text(json.dumps(config))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "hf_efcp.run", "script.py"]
    common = "--report_to none --max_steps 6 --save_steps 3 --logging_steps 1 --per_device_train_batch_size 4 --deepspeed ds.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *torchrun, *common.split(), "--output_dir", out, *arguments]
    return subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def losses(folder):
    return [entry["loss"] for entry in json.loads((folder / "checkpoint-6/trainer_state.json").read_text())["log_history"]]


def test_the_stock_trainer_trains_resumes_and_is_refused(tmp_path):
    auto = {key: "auto" for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")}
    config = {"zero_optimization": {"stage": 1}, **auto}
    sparse = ["--optim", "efcp_sparse_mfac", "--optim_args", "density=0.05,window_size=4"]
    done = launch(tmp_path, "out", config, *sparse)
    assert done.returncode == 0, done.stderr
    done = launch(tmp_path, "again", config, *sparse, "--resume_from_checkpoint", "out/checkpoint-3")
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "again") == losses(tmp_path / "out")
    done = launch(tmp_path, "own", {**config, "optimizer": {"type": "AdamW", "params": {}}}, *sparse)
    assert done.returncode != 0 and "which replaces SparseMFAC" in done.stderr
    done = launch(tmp_path, "lowrank", config, "--optim", "efcp_lowrank_mfac")
    assert done.returncode != 0 and "use SparseMFAC or DenseMFAC" in done.stderr
