"""LDAdamW under Trainer: what it keeps for the next gradient is its own, not in p.grad, which Trainer zeroes and clips."""

import copy

import torch
from transformers import Trainer, TrainerCallback

from tests.optim.helpers import differences, snapshot

SAVED, STEPS, CLIP = 3, 6, 0.05


class Watch(TrainerCallback):
    """Notes all errors after each step, when gradients are zeroed, and before the next, after all of its backward passes."""

    def __init__(self):
        self.after, self.before, self.norms = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        self.before.append(errors(optimizer))
        self.norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())

    def on_step_end(self, args, state, control, model, optimizer, **kwargs):
        assert all(p.grad is None or not p.grad.any() for p in model.parameters())
        self.after.append(errors(optimizer))


def errors(optimizer):
    return [entry["error"].clone() for entry in optimizer.state.values() if "error" in entry]


def trained(make_args, model, data, folder, watch=None, **resume):
    args = make_args(
        output_dir=str(folder),
        optim="efcp_ldadamw",
        optim_args="rank=4",
        learning_rate=3e-3,
        weight_decay=0.01,
        max_steps=STEPS,
        save_steps=SAVED,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=CLIP,
        disable_tqdm=True,
    )
    trainer = Trainer(copy.deepcopy(model), args, train_dataset=data, callbacks=[watch] if watch else None)
    trainer.train(**resume)
    return trainer


def test_the_error_survives_zero_grad_with_accumulation_and_clipping_and_a_resumed_run_goes_on(
    make_args, tiny_bert, token_data, tmp_path
):
    watch = Watch()
    trainer = trained(make_args, tiny_bert, token_data, tmp_path / "out", watch)
    assert len(watch.after) == len(watch.before) == STEPS
    for after, before in zip(watch.after[:-1], watch.before[1:], strict=True):
        assert len(after) == 14 and all(e.any() for e in after if min(e.shape) > 4)  # of 2 layers, pooler, classifier
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert all(0 < norm <= CLIP * 1.001 for norm in watch.norms)  # clipped without e
    again = trained(
        make_args, tiny_bert, token_data, tmp_path / "again", resume_from_checkpoint=str(tmp_path / f"out/checkpoint-{SAVED}")
    )
    ends = [snapshot(t.optimizer.optimizer, list(t.model.parameters())) for t in (trainer, again)]
    assert differences(*ends) == []
