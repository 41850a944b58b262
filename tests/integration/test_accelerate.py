"""Plain Accelerate loops: what prepare, accumulate, save_state and their relatives do to an optimizer, for all six names."""

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState
from torch.optim.lr_scheduler import LambdaLR

import hf_efcp
from tests.optim.helpers import count, differences, same, snapshot
from tests.reference import NAMES, lossy_options

by_name = pytest.mark.parametrize("name", NAMES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
CHECKOUT = Path(hf_efcp.__file__).parents[1]
M = 4  # a few steps wrap around


def _reset():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def new_accelerator(**given):
    """On the CPU, as in a new process."""
    _reset()
    return Accelerator(cpu=True, **given)


def make(name, model, **options):
    """As under --optim, but for a window and rows so small that every format compresses and wraps around."""
    defaults = {"lr": 5e-3, "window_size": M, "update_rms": 0.5, "error_dtype": "bf16", **lossy_options(name)}
    return hf_efcp.create_optimizer(name, model, **{**defaults, **options})


def small_model(seed=0, dtype=torch.float32):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = torch.nn.Linear(12, 40), torch.nn.LayerNorm(40), torch.nn.Dropout(0.2), torch.nn.Linear(40, 3)
        return torch.nn.Sequential(*layers).to(dtype)


def batch_at(t, dtype=torch.float32, size=8):
    """Batch t: inputs, and classes that depend on them."""
    inputs = torch.randn(size, 12, generator=torch.Generator().manual_seed(100 + t), dtype=torch.float64)
    return inputs.to(dtype), inputs[:, :3].argmax(-1)


def train(accelerator, model, optimizer, start, stop, scheduler=None, max_norm=None):
    """Steps start ... stop - 1; returns their losses."""
    losses = []
    for t in range(start, stop):
        inputs, labels = batch_at(t, next(model.parameters()).dtype)
        with accelerator.accumulate(model):
            loss = torch.nn.functional.cross_entropy(model(inputs).float(), labels)
            accelerator.backward(loss)
            if max_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def look(optimizer, model):
    """A snapshot of a bare or a wrapped optimizer and its model."""
    return snapshot(getattr(optimizer, "optimizer", optimizer), list(model.parameters()))


def dtypes(optimizer):
    return {f"{i} {name}": t.dtype for i, entry in enumerate(optimizer.state.values()) for name, t in entry.items()}


# prepare ------------------------------------------------------------------------------------------------------------------


@by_name
@DTYPES
def test_prepare_before_the_first_step_changes_nothing(name, dtype):
    accelerator, model = new_accelerator(), small_model(dtype=dtype)
    optimizer = make(name, model)
    twin = copy.deepcopy((model, optimizer))
    before = look(optimizer, model)
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(prepared, AcceleratedOptimizer)
    assert prepared.optimizer is optimizer
    assert differences(before, look(prepared, model)) == []
    assert not optimizer.state
    torch.manual_seed(0)
    losses = train(accelerator, prepared_model, prepared, 0, M + 2)
    torch.manual_seed(0)
    assert losses == train(accelerator, *twin, 0, M + 2)
    assert differences(look(prepared, model), look(twin[1], twin[0])) == []


@by_name
@DTYPES
def test_prepare_after_some_steps_changes_no_bit_and_no_dtype(name, dtype):
    model = small_model(dtype=dtype)
    optimizer = make(name, model, momentum=0.5)
    accelerator = new_accelerator()
    train(accelerator, model, optimizer, 0, M + 2)
    twin = copy.deepcopy((model, optimizer))
    before, kinds = look(optimizer, model), dtypes(optimizer)
    assert {torch.float64, torch.float32} <= set(kinds.values())  # K, and rows
    assert ("sparse" in name) == (torch.int16 in kinds.values())

    prepared_model, prepared = accelerator.prepare(model, optimizer)
    assert differences(before, look(prepared, model)) == []
    assert dtypes(optimizer) == kinds
    torch.manual_seed(0)
    train(accelerator, prepared_model, prepared, M + 2, M + 5)
    torch.manual_seed(0)
    train(accelerator, *twin, M + 2, M + 5)
    assert differences(look(prepared, model), look(twin[1], twin[0])) == []
    again = accelerator.prepare(prepared)  # what is prepared is left alone
    assert again is prepared


@by_name
def test_a_prepared_optimizer_offers_diagnostics_and_bytes(name):
    accelerator, model = new_accelerator(), small_model()
    model, optimizer = accelerator.prepare(model, make(name, model))
    assert optimizer.optimizer.diagnostics() == {}
    train(accelerator, model, optimizer, 0, 3)
    figures = optimizer.optimizer.diagnostics()
    assert (figures["step"], figures["rows"]) == (3, 3)
    assert figures["update_rms"] == pytest.approx(0.5, rel=1e-5)
    held = sum(t.numel() * t.element_size() for entry in optimizer.state.values() for t in entry.values())
    assert sum(optimizer.optimizer.memory_footprint().values()) == held > 0
    assert optimizer.param_groups is optimizer.optimizer.param_groups
    assert optimizer.state is optimizer.optimizer.state


@by_name
def test_a_learning_rate_set_through_the_wrapper_counts(name):
    accelerator, model = new_accelerator(), small_model()
    model, optimizer = accelerator.prepare(model, make(name, model))
    train(accelerator, model, optimizer, 0, 2)
    weights = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 0.0
    train(accelerator, model, optimizer, 2, 3)
    assert all(same(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert count(optimizer) == 3


@by_name
def test_free_memory_lets_the_state_go(name):
    accelerator, model = new_accelerator(), small_model()
    model, optimizer = accelerator.prepare(model, make(name, model))
    train(accelerator, model, optimizer, 0, 2)
    gone = [weakref.ref(optimizer.optimizer), weakref.ref(model), weakref.ref(optimizer.optimizer._stacks[0].window)]
    model, optimizer = accelerator.free_memory(model, optimizer)
    gc.collect()
    assert model is optimizer is None
    assert [ref() for ref in gone] == [None] * 3


# Checkpoints --------------------------------------------------------------------------------------------------------------


def started(name, seed, dtype=torch.float32, wrap=lambda model: model, **options):
    """Accelerator, model, optimizer and a scheduler that falls to 0 in 20 steps, all prepared."""
    accelerator, model = new_accelerator(), wrap(small_model(seed, dtype))
    optimizer = make(name, model, **options)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 20)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


@by_name
@DTYPES
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
def test_load_state_continues_bit_for_bit(name, dtype, safe, tmp_path):
    """In a fresh model and optimizer that start elsewhere; dropout draws from the restored generator."""
    torch.manual_seed(0)
    accelerator, model, optimizer, scheduler = started(name, 0, dtype, momentum=0.5, weight_decay=0.01)
    train(accelerator, model, optimizer, 0, M + 2, scheduler)
    accelerator.save_state(tmp_path, safe_serialization=safe)
    losses = train(accelerator, model, optimizer, M + 2, M + 7, scheduler)
    expected, figures = look(optimizer, model), optimizer.optimizer.diagnostics()
    assert (tmp_path / ("model.safetensors" if safe else "pytorch_model.bin")).is_file()

    torch.manual_seed(1)
    accelerator, model, optimizer, scheduler = started(name, 1, dtype, momentum=0.5, weight_decay=0.01)
    train(accelerator, model, optimizer, 50, 51, scheduler)  # a state that must not survive
    accelerator.load_state(tmp_path)
    assert train(accelerator, model, optimizer, M + 2, M + 7, scheduler) == losses
    assert differences(expected, look(optimizer, model)) == []
    assert optimizer.optimizer.diagnostics() == figures
    assert scheduler.get_last_lr() == [5e-3 * (1 - (M + 7) / 20)]


@by_name
def test_a_state_saved_before_the_first_step_starts_afresh(name, tmp_path):
    accelerator, model, optimizer, _ = started(name, 0)
    accelerator.save_state(tmp_path)
    torch.manual_seed(0)
    losses = train(accelerator, model, optimizer, 0, 3)
    accelerator.load_state(tmp_path)
    torch.manual_seed(0)
    assert train(accelerator, model, optimizer, 0, 3) == losses


@by_name
def test_another_optimizers_checkpoint_is_refused_and_changes_nothing(name, tmp_path):
    accelerator, model, optimizer, scheduler = started(name, 0)
    train(accelerator, model, optimizer, 0, 2, scheduler)
    accelerator.save_state(tmp_path)
    accelerator, model, optimizer, scheduler = started(NAMES[NAMES.index(name) - 1], 0)
    train(accelerator, model, optimizer, 0, 2, scheduler)
    before = look(optimizer, model)
    with pytest.raises(hf_efcp.OptionError, match="checkpoint is of "):
        accelerator.load_state(tmp_path)
    assert [d for d in differences(before, look(optimizer, model)) if d.startswith("state")] == []


@by_name
def test_two_optimizers_with_two_schedulers_in_one_checkpoint(name, tmp_path):
    def both(seed):
        accelerator, model = new_accelerator(), small_model(seed)
        optimizers = make(name, model[0]), make(name, [*model[1].parameters(), *model[3].parameters()], lr=1e-3)
        schedulers = [LambdaLR(o, lambda step, k=k: 0.9 ** (k * step)) for k, o in enumerate(optimizers, 1)]
        return accelerator, *accelerator.prepare(model, *optimizers, *schedulers)

    def advance(accelerator, model, first, second, *schedulers, start, stop):
        class Both:
            def step(self):
                for part in (first, second, *schedulers):
                    part.step()

            def zero_grad(self):
                first.zero_grad()
                second.zero_grad()

        torch.manual_seed(start)
        train(accelerator, model, Both(), start, stop)
        rates = [scheduler.get_last_lr()[0] for scheduler in schedulers]
        assert rates == pytest.approx([5e-3 * 0.9**stop, 1e-3 * 0.81**stop])
        return [look(optimizer, model) for optimizer in (first, second)]

    run = both(0)
    advance(*run, start=0, stop=3)
    run[0].save_state(tmp_path)
    assert {"optimizer.bin", "optimizer_1.bin", "scheduler_1.bin"} <= {path.name for path in tmp_path.iterdir()}
    expected = advance(*run, start=3, stop=M + 3)
    run = both(1)
    run[0].load_state(tmp_path)
    for a, b in zip(expected, advance(*run, start=3, stop=M + 3), strict=True):
        assert differences(a, b) == []


@by_name
def test_an_optimizer_registered_for_checkpointing(name, tmp_path):
    """One that is not prepared; accelerate reads such files with weights_only."""
    accelerator, model = new_accelerator(), small_model()
    optimizer = make(name, model)
    accelerator.register_for_checkpointing(optimizer)
    train(accelerator, model, optimizer, 0, M + 1)
    before = look(optimizer, model)
    accelerator.save_state(tmp_path)
    train(accelerator, model, optimizer, M + 1, M + 3)
    accelerator.load_state(tmp_path)
    assert [d for d in differences(before, look(optimizer, model)) if not d.startswith("parameter")] == []


@by_name
def test_a_compiled_model(name, tmp_path):
    """Names gain `_orig_mod.`; the optimizer's file fits a model that is not compiled as well."""

    def compiled(model):
        return torch.compile(model, backend="eager")

    torch.manual_seed(0)
    accelerator, model, optimizer, scheduler = started(name, 0, wrap=compiled)
    assert all(n.startswith("_orig_mod.") for n in optimizer.param_groups[0]["param_names"])
    train(accelerator, model, optimizer, 0, 3, scheduler)
    accelerator.save_state(tmp_path)
    losses = train(accelerator, model, optimizer, 3, M + 3, scheduler)
    expected = look(optimizer, model)

    accelerator, model, optimizer, scheduler = started(name, 1, wrap=compiled)
    accelerator.load_state(tmp_path)
    assert train(accelerator, model, optimizer, 3, M + 3, scheduler) == losses
    assert differences(expected, look(optimizer, model)) == []

    _, _, optimizer, _ = started(name, 1)
    names = optimizer.param_groups[0]["param_names"]
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.bin", weights_only=True))
    assert (count(optimizer), optimizer.param_groups[0]["param_names"]) == (3, names)


# Steps --------------------------------------------------------------------------------------------------------------------


@by_name
def test_steps_off_sync_do_nothing(name):
    accelerator, model = new_accelerator(gradient_accumulation_steps=3), small_model().eval()
    optimizer = make(name, model)
    scheduler = LambdaLR(optimizer, lambda step: 1 - step / 20)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    train(accelerator, model, optimizer, 0, 3, scheduler)
    assert (count(optimizer), scheduler.get_last_lr()) == (1, [pytest.approx(5e-3 * 19 / 20)])
    before = look(optimizer, model)
    for t in (3, 4):
        train(accelerator, model, optimizer, t, t + 1, scheduler)
        assert not accelerator.sync_gradients
        assert differences(before, look(optimizer, model)) == []
        assert all(p.grad is not None for p in model.parameters())
    train(accelerator, model, optimizer, 5, 6, scheduler)
    assert (count(optimizer), scheduler.get_last_lr()) == (2, [pytest.approx(5e-3 * 18 / 20)])
    assert all(p.grad is None for p in model.parameters())


@by_name
def test_accumulated_batches_are_one_large_batch(name):
    def run(parts):
        accelerator, model = new_accelerator(gradient_accumulation_steps=parts), small_model(dtype=torch.float64).eval()
        model, optimizer = accelerator.prepare(model, make(name, model, error_dtype=None))
        for t in range(M + 2):
            inputs, labels = batch_at(t, torch.float64)
            for x, y in zip(inputs.chunk(parts), labels.chunk(parts), strict=True):
                with accelerator.accumulate(model):
                    accelerator.backward(torch.nn.functional.cross_entropy(model(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
        assert count(optimizer) == M + 2
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    whole, parts = run(1), run(4)
    assert (whole - parts).norm() < 1e-9 * whole.norm()


@by_name
def test_clipping_bounds_the_row(name):
    accelerator, model = new_accelerator(), small_model()
    model, optimizer = accelerator.prepare(model, make(name, model))
    train(accelerator, model, optimizer, 0, 1, max_norm=1e-3)
    norm = optimizer.optimizer.diagnostics()["row_norm"]
    assert norm == pytest.approx(1e-3, rel=1e-3) if "dense" in name else 0 < norm < 1e-3


@by_name
def test_bf16_mixed_precision_trains(name, tiny_bert, token_data):
    accelerator = new_accelerator(mixed_precision="bf16")
    optimizer = make(name, tiny_bert, window_size=8)
    loader = torch.utils.data.DataLoader(token_data, batch_size=16, shuffle=True, generator=torch.Generator().manual_seed(0))
    model, optimizer, loader = accelerator.prepare(tiny_bert, optimizer, loader)
    losses = []
    for _ in range(4):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            assert accelerator.clip_grad_norm_(model.parameters(), 1.0).isfinite()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-4:]) < 0.5 * sum(losses[:4])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert set(dtypes(optimizer).values()) >= {torch.float64, torch.float32}


@by_name
def test_schedules_of_two_groups(name):
    """Each group has its own learning rate and schedule; a rate of 0 leaves the group's weights alone."""
    accelerator, model = new_accelerator(), small_model()
    groups = [{"params": model[0].parameters()}, {"params": [*model[1].parameters(), *model[3].parameters()], "lr": 1e-2}]
    optimizer = make(name, groups)
    scheduler = LambdaLR(optimizer, [lambda step: float(step < 2), lambda step: 0.5**step])
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    assert isinstance(scheduler, AcceleratedScheduler)
    train(accelerator, model, optimizer, 0, 2, scheduler)
    first, second = model[0].weight.detach().clone(), model[3].weight.detach().clone()
    assert scheduler.get_last_lr() == [0.0, 1e-2 * 0.25]
    train(accelerator, model, optimizer, 2, 4, scheduler)
    assert same(first, model[0].weight)
    assert not same(second, model[3].weight)
    assert [group["lr"] for group in optimizer.param_groups] == [0.0, 1e-2 * 0.5**4]


@by_name
def test_a_gradient_scaler(name):
    """A CPU scaler, as accelerate uses one for fp16 on a GPU: gradients arrive unscaled, an overflow skips everything."""

    def run(scaler):
        accelerator, model = new_accelerator(), small_model().eval()
        optimizer = make(name, model)
        scheduler = LambdaLR(optimizer, lambda step: 1 - step / 20)
        wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
        accelerator.scaler = scaler
        train(accelerator, model, wrapped, 0, M + 2, AcceleratedScheduler(scheduler, wrapped))
        return accelerator, model, wrapped, AcceleratedScheduler(scheduler, wrapped)

    _, plain_model, plain, _ = run(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    accelerator, model, optimizer, scheduler = run(scaler)
    assert differences(look(plain, plain_model), look(optimizer, model)) == []  # a power of 2 is exact

    before, rate, scale = look(optimizer, model), scheduler.get_last_lr(), scaler.get_scale()
    inputs, labels = batch_at(99)
    accelerator.backward(torch.nn.functional.cross_entropy(model(inputs), labels))
    next(model.parameters()).grad[0, 0] = torch.inf
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
    assert optimizer.step_was_skipped
    assert differences(before, look(optimizer, model)) == []
    assert (scheduler.get_last_lr(), scaler.get_scale()) == (rate, scale / 2)
    train(accelerator, model, optimizer, 7, 8, scheduler)
    assert not optimizer.step_was_skipped
    assert count(optimizer) == M + 3


# Processes ----------------------------------------------------------------------------------------------------------------

# Every name in turn: training, save_state, more training; then load_state and the same again.
TWO_RANKS = """
import json, sys
import torch
from accelerate import Accelerator
import hf_efcp

def model_and_optimizer(accelerator, name, seed, error_dtype):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(12, 40), torch.nn.LayerNorm(40), torch.nn.Linear(40, 3)).double()
    optimizer = hf_efcp.create_optimizer(name, model, lr=5e-3, window_size=4, update_rms=0.5, error_dtype=error_dtype,
                                         shard="auto")
    return accelerator.prepare(model, optimizer)

def train(accelerator, model, optimizer, start, stop):
    rank, world = accelerator.process_index, accelerator.num_processes
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(t)
        inputs = torch.randn(8, 12, generator=generator, dtype=torch.float64)
        labels = inputs[:, :3].argmax(-1)
        x, y = inputs.chunk(world)[rank], labels.chunk(world)[rank]
        for half in (0, 1):
            with accelerator.accumulate(model):
                loss = torch.nn.functional.cross_entropy(model(x.chunk(2)[half]), y.chunk(2)[half])
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    return torch.cat([p.detach().flatten() for p in model.parameters()])

def main(folder):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    found = {}
    for name in hf_efcp.list_optimizers():
        for error_dtype in (None, "bf16"):
            model, optimizer = model_and_optimizer(accelerator, name, accelerator.process_index, error_dtype)
            train(accelerator, model, optimizer, 0, 6)
            accelerator.save_state(f"{folder}/{name}")
            accelerator.wait_for_everyone()
            end = train(accelerator, model, optimizer, 6, 10)
            accelerator.free_memory()
            model, optimizer = model_and_optimizer(accelerator, name, 7, error_dtype)
            accelerator.load_state(f"{folder}/{name}")
            again = train(accelerator, model, optimizer, 6, 10)
            accelerator.free_memory()
            assert torch.equal(end, again), name
            found[f"{name} {error_dtype}"] = end
    found["wrapper"] = type(model).__name__
    torch.save(found, f"{folder}/rank{accelerator.process_index}.pt")
    accelerator.end_training()

main(sys.argv[1])
"""


@pytest.mark.slow
def test_two_ranks_end_with_the_weights_of_one(tmp_path, python):
    """DDP, the state shared: both ranks equal, and in fp64 within 1e-9 of one process at the same batch."""
    script = tmp_path / "script.py"
    script.write_text(TWO_RANKS)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    done = python(script, tmp_path / "one")
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(CHECKOUT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([*command, script, tmp_path / "two"], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, first, second = (torch.load(tmp_path / name) for name in ("one/rank0.pt", "two/rank0.pt", "two/rank1.pt"))
    assert (tmp_path / "two/efcp_lowrank_mfac/efcp_optim/.metadata").is_file()
    assert not (tmp_path / "one/efcp_lowrank_mfac/efcp_optim").exists()
    assert first.pop("wrapper") == second.pop("wrapper") == "DistributedDataParallel"
    assert one.pop("wrapper") == "Sequential"
    assert first.keys() == second.keys() == one.keys()
    for case, weights in first.items():
        assert same(weights, second[case]), case
        if case.endswith("None"):
            assert (weights - one[case]).norm() < 1e-9 * one[case].norm(), case
