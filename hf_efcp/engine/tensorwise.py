"""The step of every method that couples no tensors: a tensor's update depends on its own gradient and state alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.accumulated import Accumulated
from ..core.cells import ALL, Cell, Layout, Parts, Spec, matrix_specs
from ..core.counters import Counters
from ..core.deferred import masked, readable
from ..core.values import COUNT_FP32
from .apply import apply, move_at_once
from .costs import Count
from .exchange import Exchange
from .factor_sync import FactorSync
from .intervals import Interval
from .method import Group
from .phases import PHASES, listener
from .setup import Setup, l2_of
from .stacks import Floats, Number, Numbers, Piece, Stack, times


@dataclasses.dataclass(frozen=True)
class Unformed:
    """An update u that is formed only while it is added to the parameters.

    Attributes:
        rows: gives some rows of u, (n, rows, cols); it is called once for each part of the rows.
        add_to: (p, scale, decay) -> whether a kernel has computed p <- decay * p + scale * u for n matrices p. It is called
            first. If it gives False, nothing has changed.
    """

    rows: Callable[[slice], Tensor]
    add_to: Callable[[list[Tensor], float, float], bool] = lambda params, scale, decay: False


@dataclasses.dataclass(frozen=True)
class Message:
    """The parts of an update u that are smaller than the parameter. Processes that share the state send them, not the parameters.

    Attributes:
        specs: (layout, options) -> the parts for one whole tensor.
        form: (stack, parts, options) -> u; each part is (n, ...).
    """

    specs: Callable[[Layout, Any], tuple[Spec, ...]]
    form: Callable[[TensorStack, Sequence[Tensor], Any], U]


# u, (n, rows, cols). A function alone means `Unformed(function)`.
U = Tensor | Callable[[slice], Tensor] | Unformed
# Makes an update: (stack, a, t, options) -> u, with a = e + g. t, (n, 1, 1) in the compute dtype, is the number of each tensor's
# own gradients, this one included.
Update = Callable[["TensorStack", Accumulated, Tensor, Any], "U | tuple[Tensor, ...]"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """How tensors of one kind are optimized.

    Attributes:
        specs: (layout, options) -> the state of one tensor, besides its count of steps and its error.
        update: makes the update; it reads and writes the stack's cells by name, `s.exp_avg.read()`.
        lossy: whether the rule compresses, and calls `a.keep(c)`. Then e is state, in the format that the options say. Where the
            options decide, `lossy` is a function of them.
        operations: (n, rows, cols, options) -> operations of a step in the compute dtype, for the roofline.
        vectors: whether the rule is for vectors too. The rule then gets whole vectors: under FSDP2, where each process has a part
            of a vector, the processes exchange their gradients, and each holds the whole state.
        message: the message of the rule, if it has one. `update` then gives a tuple of the message's parts in place of u.
        rate: options -> the rule's learning rate divided by that of the parameter's group.
        decomposes: whether `update` calls a decomposition that raises for numbers that are not finite, as `torch.linalg.eigh`.
    """

    specs: Callable[[Layout, Any], tuple[Spec, ...]]
    update: Update
    lossy: bool | Callable[[Any], bool] = False
    operations: Callable[[int, int, int, Any], float] = lambda n, rows, cols, options: 0.0
    vectors: bool = False
    message: Message | None = None
    rate: Callable[[Any], float] = lambda options: 1.0
    decomposes: bool = False

    def keeps_error(self, options: Any) -> bool:
        """Tell whether the error e is state."""
        return self.lossy(options) if callable(self.lossy) else self.lossy


class TensorStack(Stack):
    """n pieces of one shape, with their rule. The cells of their state are attributes.

    Args:
        pieces, specs, total: see Stack.
        rule: of the tensors.
    """

    def __init__(
        self,
        pieces: list[Piece],
        specs: Sequence[Spec],
        rule: Rule,
        total: Callable[[Tensor], Tensor] | None = None,
    ):
        super().__init__(pieces, specs, total)
        self.rule = rule
        if self.layout.vector and rule.vectors:
            self.turn.origin = 0, 0  # the state is that of the whole vector
        scales = {f"{spec.name}_scale" for spec in specs if spec.cols is not None}
        names = [name for name in self.buffers if name not in scales]
        if taken := [name for name in names if hasattr(self, name)]:
            raise ValueError(f"state entries {', '.join(taken)}: a stack has attributes of these names, choose others")
        self.cells = {name: self.cell(name) for name in names}
        self.interval = Interval()

    def __getattr__(self, name: str) -> Cell:
        """Give the cell of a state entry by its name."""
        cells = self.__dict__.get("cells", {})
        if name not in cells:
            raise AttributeError(f"no state entry {name!r}; there are {', '.join(cells)}")
        return cells[name]

    def newcomers(self, t: Tensor) -> list[int]:
        """Give the positions of the tensors whose first gradient this is. Until all have had one, the host waits for a GPU."""
        if self.begun:
            return []
        counts = t.flatten().tolist()
        self.begun = not readable(t.device) and min(counts) > 1
        return [i for i, count in enumerate(counts) if count == 1 and i not in self.turn.absent]

    def message(self, options: Any) -> tuple[Spec, ...]:
        """Declare the parts of a message; none where the rule has no message."""
        return () if self.rule.message is None else self.rule.message.specs(self.layout, options)

    def formed(self, message: Sequence[Tensor], options: Any) -> Tensor | Unformed:
        """Form u from the parts of a message, (n, ...) each."""
        assert self.rule.message is not None
        u = self.rule.message.form(self, message, options)
        return u if isinstance(u, Tensor | Unformed) else Unformed(u)

    def update(self, l2: Floats, options: Any) -> Tensor | Unformed | tuple[Tensor, ...]:
        """Make the update, or the parts of its message, and write the state of the next step."""
        t = self.cells["step"].read() + 1
        self.cells["step"].write(t)
        gradients, total = self.gradients(l2), self.total
        whole = total is not None and self.layout.vector and self.rule.vectors
        g = self._whole(gradients) if whole else gradients
        a = Accumulated(g, self.cells.get("error"), self.turn.absent, total, wide=True)
        ok = self.turn.ok
        if isinstance(ok, Tensor) and self.rule.decomposes:  # the host does not know whether the gradients are finite
            a.gradients = [masked(ok, g, 0.0) for g in a.gradients]
        u = self.rule.update(self, a, t.to(self.layout.dtype).view(-1, 1, 1), options)
        u = u if isinstance(u, Tensor | Unformed | tuple) else Unformed(u)
        return u if not whole or isinstance(u, tuple) else (u if isinstance(u, Tensor) else u.rows(ALL))[..., self.columns]

    def _whole(self, gradients: Sequence[Tensor]) -> Tensor:
        """Make whole vectors, (n, 1, cols), from the parts that the processes have."""
        assert self.total is not None
        whole = torch.zeros(len(gradients), 1, self.layout.cols, dtype=self.layout.dtype, device=self.device)
        whole[..., self.columns] = torch.stack(list(gradients))
        return self.total(whole)

    @property
    def columns(self) -> slice:
        """The part of its vectors that this process has."""
        start = self.pieces[0].origin[1]
        return slice(start, start + self.shape[1])

    def rates(self, groups: Sequence[Group], options: Any) -> tuple[Numbers, Numbers]:
        """See Stack. The rates are multiplied by the rule's own rate."""
        lr, weight_decay = super().rates(groups, options)
        if (by := self.rule.rate(options)) == 1.0:
            return lr, weight_decay
        if not isinstance(lr, list):
            return lr * by, weight_decay
        shrink = [x * by for x in weight_decay] if isinstance(weight_decay, list) else weight_decay * by
        return [x * by for x in lr], shrink

    def apply(self, u: Tensor | Unformed, groups: Sequence[Group], options: Any) -> None:
        """Compute p <- (1 - lr*wd) p - lr u, for the tensors that have a gradient."""
        ok, lr, weight_decay = self.turn.ok, *self.rates(groups, options)
        if isinstance(u, Unformed) and ok is True and move_at_once(self, u.add_to, lr, weight_decay, options.stochastic_rounding):
            return
        own, lr = (lr, 1.0) if isinstance(lr, list) else (None, lr)
        rate: Number = lr if ok is True else lr * ok.to(self.device, self.layout.dtype)  # type: ignore[union-attr]

        def update(rows: slice) -> Tensor:
            part = u[:, rows] if isinstance(u, Tensor) else u.rows(rows)
            part = part if own is None else times(part, own)
            return part if ok is True else masked(ok, part, 0.0)

        rounding = self.turn.step if options.stochastic_rounding else None
        apply(self, update, rate, weight_decay, rounding, self.turn.absent)


class Tensorwise:
    """A rule for matrices, and another rule for everything else. A `Method`.

    Args:
        rule: for matrices, and for vectors if `rule.vectors`.
        others: for other vectors, empty tensors, groups with `compress` false, and groups of the kinds `other_kinds`.
        other_kinds: kinds of parameter groups ("embedding", "head", see `parameter_groups`) that `others` is for.
    """

    takes_flat_pieces = False  # a rule for matrices needs matrices
    capturable = False  # a rule may read numbers on the host: `newcomers`

    def __init__(self, rule: Rule, others: Rule, other_kinds: Container[str] = ()):
        self.matrices, self.others, self.other_kinds = rule, others, other_kinds

    def rule(self, layout: Layout, group: Group) -> Rule:
        """Choose the rule for a tensor."""
        other = (layout.vector and not self.matrices.vectors) or not layout.numel
        plain = other or not group.get("compress", True) or group.get("kind") in self.other_kinds
        return self.others if plain else self.matrices

    def specs(self, layout: Layout, group: Group, options: Any, flat: Parts | None) -> tuple[Spec, ...]:
        """See Method."""
        rule = self.rule(layout, group)
        error = matrix_specs("error", layout, options.error_dtype, options.error_format) if rule.keeps_error(options) else ()
        specs = Spec("step", (), torch.float32, values=COUNT_FP32), *error, *rule.specs(layout, options)
        whole = layout.vector and rule.vectors
        return tuple(dataclasses.replace(spec, rows=None) for spec in specs) if whole else specs

    def shared_specs(self, number: int, options: Any) -> tuple[Spec, ...]:
        """See Method."""
        names = ("counter", "skipped") if number == 0 else ()
        return tuple(Spec(name, (), torch.int64, held="everywhere") for name in names)

    def make_stack(
        self,
        pieces: list[Piece],
        group: Group,
        options: Any,
        flat: Parts | None,
        sync: FactorSync,
        total: Callable[[Tensor], Tensor] | None,
    ) -> TensorStack:
        """See Method."""
        layout = Layout.of(pieces[0].param)
        return TensorStack(pieces, self.specs(layout, group, options, flat), self.rule(layout, group), total)

    def mend(self, setup: Setup, options: Any) -> None:
        """See Method. There is nothing to do: nothing is computed from the state."""

    def problem(self, setup: Setup, options: Any) -> str | None:
        """See Method."""
        return None

    def remarks(self, setup: Setup, options: Any, given: Container[str]) -> list[str]:
        """See Method."""
        return []

    def make_counters(self, number: int, options: Any, device: torch.device) -> Counters:
        """See Method."""
        return Counters(device)

    def exchange(self, setup: Setup, groups: Sequence[Group], options: Any) -> Exchange:
        """Give the tensors that are updated by messages: one process holds the whole tensor, and processes share the state."""
        if setup.exchange is None:
            numbers, stacks = {p: number for number, p in enumerate(setup.params)}, []
            for i, group in enumerate(groups):
                for p in group["params"]:
                    if setup.placement.publishes and len(setup.owners.get(p, ())) == 1:
                        piece = Piece(p, numbers[p], group=i)
                        stacks.append(TensorStack([piece], (), self.rule(Layout.of(p), group)))
            stacks = [s for s in stacks if s.rule.message is not None]
            setup.exchange = Exchange(stacks, setup.owners, setup.placement, options)
        return setup.exchange

    def step(self, setup: Setup, groups: Sequence[Group], o: Any) -> None:
        """Take a step."""
        counters, phase, l2 = setup.counters, listener(), [l2_of(group, o) for group in groups]
        ok = _gate(setup)
        if ok is False:
            return counters.count(ok)
        setup.writing = True
        exchange = self.exchange(setup, groups, o)
        for s in setup.stacks:
            s.open(counters.step)
            s.turn.ok = ok
            if setup.probe is not None:
                setup.probe.read_tensors(s)
            with phase("compress"):
                u = s.update(s.each(l2.__getitem__), o)
                travels = s.params[0] in exchange.params
                if isinstance(u, tuple):
                    if travels:
                        exchange.put(s, u)
                    u = s.formed(u, o)
            if setup.probe is not None:
                seen = setup.probe.seen(s, u if isinstance(u, Tensor) else u.rows, s.rule.rate(o))
                u = seen if isinstance(seen, Tensor) else Unformed(seen)
                if travels and isinstance(u, Unformed):
                    u.rows(slice(0, s.shape[0]))
            if not travels:
                with phase("update"):
                    s.apply(u, groups, o)
        with phase("update"):
            exchange.finish(groups, counters.step, ok)
        counters.count(ok)
        if setup.probe is not None:
            setup.probe.finish(ok)
        setup.finish()

    def diagnostics(self, setup: Setup) -> dict[str, float]:
        """See Method: step and skipped_steps; if one process trains, also error_norm, |e|."""
        figures = {"step": float(setup.counters.step), "skipped_steps": float(setup.counters.skipped)}
        if not any(figures.values()):
            return {}
        if setup.placement.alone and figures["step"]:
            errors = [s.cells["error"] for s in setup.stacks if "error" in s.cells]
            figures["error_norm"] = sum(e.square() for e in errors) ** 0.5
        return figures

    def costs(self, setup: Setup, options: Any) -> dict[str, Count]:
        """See Method. State is read and written once (of a ring, one slot); a gradient is read, a parameter read and written."""
        counts = {name: Count() for name in PHASES}
        for s in setup.stacks:
            n, (rows, cols) = len(s.pieces), s.shape
            parameter = n * rows * cols * s.pieces[0].param.element_size()
            state = sum(s.buffers[spec.name].nbytes * (1 + 1 / spec.slots) for spec in s.specs.values())
            operations = float(s.rule.operations(n, rows, cols, options))
            fp64 = s.layout.dtype == torch.float64
            counts["compress"] += Count(0.0 if fp64 else operations, operations if fp64 else 0.0, parameter + state)
            counts["update"] += Count(bytes=2 * parameter)
        return counts


def _gate(setup: Setup) -> bool | Tensor:
    """Tell whether all gradients on all processes are finite, and the sum of their squares too: a bool, or on a GPU a tensor.

    QR and other decompositions raise for numbers that are not finite, so a step has to know before it forms anything.
    """
    device = setup.counters.step.device
    gradients = [g for s in setup.stacks for piece in s.pieces if (g := piece.grad) is not None and g.numel()]
    square = torch.zeros((), dtype=torch.float64, device=device)
    if gradients:
        for dtype in dict.fromkeys(g.dtype for g in gradients):
            alike = [g for g in gradients if g.dtype == dtype]
            norms = torch._foreach_norm(alike, 2, torch.promote_types(dtype, torch.float32))
            square += torch.stack([norm.to(device) for norm in norms]).double().square().sum()
    finite = setup.placement.sum(square).isfinite()
    return bool(finite) if readable(device) else finite
