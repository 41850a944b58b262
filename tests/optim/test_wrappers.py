"""Wrappers and habits of training loops around the optimizers: each saves and resumes bit for bit, as around torch's AdamW."""

import pytest
import torch

from tests.optim.entry_runs import ADAMW, OPTIONS, WITH_CONTROL
from tests.optim.helpers import bits, fresh, gradients_at, same, through_a_file
from tests.reference import few, parameters

STEPS = 8


class Plain:
    """A training loop without anything around the optimizer; other loops say what they do before and after a step."""

    def __init__(self, optimizer, params):
        self.optimizer, self.params = optimizer, params

    def run(self, start, stop):
        for t in range(start, stop):
            self.before(t)
            gradients_at(t, self.params)
            self.step(t)
            self.after(t)

    def before(self, t):
        pass

    def step(self, t):
        self.optimizer.step()

    def after(self, t):
        pass


class Lookahead(Plain):
    """Every third step parameters go half of the way from the slow ones, which are in the state."""

    def after(self, t):
        state = self.optimizer.state
        state.setdefault("lookahead", {"steps": 0})["steps"] += 1
        for p in self.params:
            slow = state[p].setdefault("slow", p.detach().clone())
            if state["lookahead"]["steps"] % 3 == 0:
                slow.lerp_(p.detach(), 0.5)
                p.data.copy_(slow)


class ScheduleFree(Plain):
    """Steps are taken at z, which is in the state; gradients at y, between z and their average x."""

    def step(self, t):
        state, averages = self.optimizer.state, {}
        for p in self.params:
            z = state[p].get("z", p.detach().clone())
            averages[p] = p.detach().lerp(z, 1 - 1 / 0.9)  # y -> x
            p.data.copy_(z)
        self.optimizer.step()
        for p, x in averages.items():
            state[p]["z"] = z = p.detach().clone()
            p.data.copy_(x.lerp(z, 1 / (t + 1)).lerp(z, 0.1))


class Average(Plain):
    """A running mean of the parameters takes their place now and then, as for an evaluation, and goes again."""

    def after(self, t):
        for p in self.params:
            mean = self.optimizer.state[p].setdefault("ema", p.detach().clone())
            mean.lerp_(p.detach(), 0.1)
        for _ in range(2 * (t % 2)):  # there and back
            for p in self.params:
                mean = self.optimizer.state[p]["ema"]
                here = p.detach().clone()
                p.data.copy_(mean)
                self.optimizer.state[p]["ema"] = here


class Offload(Plain):
    """The state is elsewhere between steps: each tensor is replaced by a copy."""

    def after(self, t):
        for entry in self.optimizer.state.values():
            for name, value in entry.items():
                entry[name] = value.clone()


class OffloadInPlace(Plain):
    """The same, as an older habit has it."""

    def after(self, t):
        for entry in self.optimizer.state.values():
            for value in entry.values():
                value.data = value.data.clone()


class Reset(Plain):
    """ReLoRA's: some parameters' state is zeroed every third step, in the tensors or by new ones."""

    def after(self, t):
        if t % 3 == 2:
            for p in self.params[1:4]:
                entry = self.optimizer.state[p]
                for name, value in entry.items():
                    if t == 2:
                        value.zero_()
                    else:
                        entry[name] = torch.zeros_like(value)


class Popped(Plain):
    """Some parameters begin anew every third step."""

    def after(self, t):
        if t % 3 == 2:
            for p in self.params[t % 2 : 4]:
                self.optimizer.state.pop(p)


class Adapters(Plain):
    """Two adapters take turns."""

    def before(self, t):
        for i, p in enumerate(self.params):
            p.requires_grad_(i % 2 == t % 2)

    def step(self, t):
        for p in self.params:
            p.grad = p.grad if p.requires_grad else None
        self.optimizer.step()


LOOPS = [Plain, Lookahead, ScheduleFree, Average, Offload, OffloadInPlace, Reset, Popped, Adapters]
# After these loops the run is the plain one: they move the state and nothing else.
MOVING = [Offload, OffloadInPlace]


def begin(name, loop, params=None):
    params = params or parameters(dtype=torch.float32)
    return loop(torch.optim.AdamW(params, lr=0.01) if name == ADAMW else fresh(name, params, **OPTIONS), params)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("saved_at", few([3, 5], {5}.__contains__))
@WITH_CONTROL
def test_save_and_resume_bit_for_bit(name, loop, saved_at):
    whole, first = begin(name, loop), begin(name, loop)
    whole.run(0, STEPS)
    first.run(0, saved_at)
    saved = through_a_file(first.optimizer.state_dict())
    second = begin(name, loop, [torch.nn.Parameter(p.detach().clone()) for p in first.params])
    second.optimizer.load_state_dict(saved)
    second.run(saved_at, STEPS)
    assert all(same(p, q) for p, q in zip(whole.params, second.params, strict=True))
    for p, q in zip(whole.params, second.params, strict=True):
        one, other = whole.optimizer.state[p], second.optimizer.state[q]
        assert one.keys() == other.keys() and all(same(t, other[k]) for k, t in one.items())
    first.run(saved_at, STEPS)  # saving has changed nothing
    assert all(same(p, q) for p, q in zip(whole.params, first.params, strict=True))


@pytest.mark.parametrize("loop", LOOPS[1:])
@WITH_CONTROL
def test_what_the_loop_does_has_an_effect_where_it_should(name, loop):
    plain, other = begin(name, Plain), begin(name, loop)
    plain.run(0, STEPS)
    other.run(0, STEPS)
    alike = [torch.equal(bits(p), bits(q)) for p, q in zip(plain.params, other.params, strict=True)]
    assert all(alike) if loop in (*MOVING, Average) else not all(alike)
