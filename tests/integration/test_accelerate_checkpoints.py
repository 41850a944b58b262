"""Plain Accelerate loops: save_state and load_state go on bit for bit, for all six names."""

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

import hf_efcp
from tests.integration.accelerate_loop import DTYPES, by_name, look, make, new_accelerator, small_model, train
from tests.optim.helpers import M, count, differences
from tests.reference import NAMES


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


def test_new_defaults_leave_an_old_run_as_it_was(tmp_path, monkeypatch, caplog):
    name = "efcp_lowrank_mfac"

    def started():
        accelerator, model = new_accelerator(), small_model(0)
        optimizer = hf_efcp.create_optimizer(name, model, lr=5e-3, **hf_efcp.optim_defaults(name))
        return accelerator, *accelerator.prepare(model, optimizer)

    earlier = {"window_size": 32, "update_rms": 0.5, "error_dtype": torch.bfloat16}
    monkeypatch.setattr(hf_efcp.LowRankMFAC, "measured", earlier)
    accelerator, model, optimizer = started()
    train(accelerator, model, optimizer, 0, 3)
    accelerator.prepare(optimizer)  # in the middle of a run: its state goes out and in again
    assert "options" not in caplog.text
    accelerator.save_state(tmp_path)
    torch.manual_seed(1)
    losses = train(accelerator, model, optimizer, 3, 7)
    monkeypatch.setattr(hf_efcp.LowRankMFAC, "measured", {"window_size": 16, "rank": 2, "damping": 0.1})
    accelerator, model, optimizer = started()
    accelerator.load_state(tmp_path)
    torch.manual_seed(1)
    assert train(accelerator, model, optimizer, 3, 7) == losses
    taken = "window_size=32, update_rms=0.5, damping=1e-06, rank=4"
    assert [r.getMessage() for r in caplog.records if r.name == "hf_efcp"] == [
        f"LowRankMFAC: options from the checkpoint: error_dtype=bfloat16, {taken}"
    ]


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
