"""Plain Accelerate loops: what prepare, accumulate and their relatives do to an optimizer, for all names."""

import copy
import gc
import weakref

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from torch.optim.lr_scheduler import LambdaLR

from tests.integration.accelerate_loop import DTYPES, batch_at, by_name, dtypes, look, make, new_accelerator, small_model, train
from tests.optim.helpers import M, count, differences, same
from tests.reference import has_error, info, rate_of_adam

# prepare -----------------------------------------------------------------------------------------------------------------


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
    assert torch.float32 in kinds.values()  # rows, or moments
    assert (torch.float64 in kinds.values()) == info(name).windowed  # K
    assert (torch.bfloat16 in kinds.values()) == (info(name).compression != "dense")  # the error
    assert (info(name).compression == "sparse") == (torch.int16 in kinds.values())

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
    assert (figures["step"], figures["skipped_steps"]) == (3, 0)
    if info(name).windowed:
        assert figures["rows"] == 3 and figures["update_rms"] == pytest.approx(0.5, rel=1e-5)
    else:
        assert (figures["error_norm"] > 0) == has_error(name)
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
    stack = optimizer.optimizer.setup().stacks[0]
    gone = [weakref.ref(it) for it in (optimizer.optimizer, model, stack, *stack.buffers.values())]
    del stack
    model, optimizer = accelerator.free_memory(model, optimizer)
    gc.collect()
    assert model is optimizer is None
    assert len(gone) > 3 and all(ref() is None for ref in gone)


# Steps -------------------------------------------------------------------------------------------------------------------


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
    norm = optimizer.optimizer.diagnostics()["row_norm" if info(name).windowed else "error_norm"]  # both are parts of it
    if not info(name).windowed and not has_error(name):
        assert norm == 0
    else:
        assert norm == pytest.approx(1e-3, rel=1e-3) if info(name).compression == "dense" else 0 < norm < 1e-3


@by_name
def test_bf16_mixed_precision_trains(name, tiny_bert, token_data):
    accelerator = new_accelerator(mixed_precision="bf16")
    at_adams = {"lr": rate_of_adam(name, 5e-3), "adjust_lr_fn": "match_rms_adamw", "adam_lr_ratio": 0.2}
    optimizer = make(name, tiny_bert, window_size=8, **at_adams)
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
    assert torch.float32 in dtypes(optimizer).values()
    assert (torch.float64 in dtypes(optimizer).values()) == info(name).windowed


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
