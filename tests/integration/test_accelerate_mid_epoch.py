"""A plain Accelerate loop saved in mid-epoch: what its DataLoader must be for the rest to be bit for bit the same.

docs/checkpoints.md says what these tests show: with a plain `DataLoader(..., shuffle=True)`, as transformers' `_no_trainer`
examples make it, a resumed run sees other batches and other dropout, whatever the optimizer.
"""

import pytest
import torch
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset

from tests.integration.accelerate_loop import batch_at, by_name, make, new_accelerator, small_model

BATCHES, SAVED_AFTER, STEPS = 4, 6, 12  # saved in the middle of the second of three epochs


def run(name, folder, *, resume: bool, exact: bool) -> list[tuple[list[float], int, float, torch.Tensor]]:
    """Train; return for each step its batch, the state of the generator, its rate, the parameters after it."""
    settings = {"use_seedable_sampler": True, "data_seed": 0} if exact else {}
    accelerator = new_accelerator(dataloader_config=DataLoaderConfiguration(**settings))
    set_seed(0)
    model, data = small_model(), TensorDataset(*batch_at(0, size=8 * BATCHES))
    loader = DataLoader(data, 8, shuffle=True, generator=torch.Generator() if exact else None)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3) if name is None else make(name, model)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    step = SAVED_AFTER if resume else 0
    if resume:
        accelerator.load_state(folder)
    seen = []
    while step < STEPS:
        batches = accelerator.skip_first_batches(loader, step % BATCHES) if step % BATCHES else loader
        if exact:
            batches.set_epoch(step // BATCHES)
        for inputs, labels in batches:
            drawn, rate = hash(torch.get_rng_state().numpy().tobytes()), scheduler.get_last_lr()[0]
            accelerator.backward(torch.nn.functional.cross_entropy(model(inputs), labels))
            for part in (optimizer, scheduler):
                part.step()
            optimizer.zero_grad()
            step += 1
            weights = torch.cat([p.detach().flatten() for p in model.parameters()])
            seen.append((inputs[:, 0].tolist(), drawn, rate, weights))
            if step == SAVED_AFTER and not resume:
                accelerator.save_state(folder)
    return seen[-(STEPS - SAVED_AFTER) :]


@by_name
def test_with_a_seedable_sampler_and_a_generator_the_rest_is_bit_for_bit_the_same(name, tmp_path):
    whole, resumed = (run(name, tmp_path, resume=resume, exact=True) for resume in (False, True))
    for a, b in zip(whole, resumed, strict=True):
        assert a[:3] == b[:3] and torch.equal(a[3], b[3])


@pytest.mark.parametrize("exact", [True, False])
def test_adamw_needs_the_same(exact, tmp_path):
    """Without the two settings the order of the rest and the random numbers differ; the learning rates do not."""
    whole, resumed = (run(None, tmp_path, resume=resume, exact=exact) for resume in (False, True))
    for part in (0, 1):
        assert ([s[part] for s in whole] == [s[part] for s in resumed]) == exact
    assert [s[2] for s in whole] == [s[2] for s in resumed]
    assert torch.equal(whole[-1][3], resumed[-1][3]) == exact
