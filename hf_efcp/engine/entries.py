"""`optimizer.state` is the state: its entries own the memory, and an entry that somebody replaces counts.

A setup's stacks and counters have buffers, and the entries are views of these buffers. A `Watch` knows the entries that were
handed out. A step and `state_dict` compare them with the entries that are there. `adopt` takes over an entry that was replaced,
moved, zeroed or removed. The watch holds the entries weakly. If most of them are gone, because somebody keeps the state elsewhere
for a while, the setup frees its buffers too, and fills new buffers from the state at the next step.

"Ours" are the entries that this optimizer handed out. Values of wrappers such as Lookahead, schedule-free or TRAC stay as they
are: any value under another name or key, even under a name that an entry of ours has for another parameter or other options.
"""

from __future__ import annotations

import operator
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Mapping, MutableMapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..distributed.fsdp2 import is_sharded, local
from ..options import OptionError

if TYPE_CHECKING:
    from .setup import Setup

State = MutableMapping[Any, Any]
# Key of a state -> names of its entries that are ours.
Ours = Callable[[Any], Container[Any]]

# Names that entries may have under some options, and prefixes of such names. A method's specs have its other names.
_NAMES = frozenset(("error", "error_scale", "residual", "residual_scale", "momentum", "momentum_scale", "warm_start"))
_NAMES |= {"gram", "step", "skipped", "exp_avg", "exp_avg_sq"}
_FAMILIES = ("window_", "metric_")


class Kinds:
    """All names that entries of ours may have under any options, for a state whose entries nobody has recorded.

    Args:
        known: names in the specs.
    """

    def __init__(self, known: Container[Any] = ()):
        self._known = known

    def __contains__(self, name: object) -> bool:
        """Tell whether an entry of ours may have the name."""
        return isinstance(name, str) and (name in self._known or name in _NAMES or name.startswith(_FAMILIES))


def own(entry: Any, names: Container[Any]) -> dict[str, Any]:
    """Give our part of what the state has under a key: the entries with these names."""
    return {name: value for name, value in entry.items() if name in names} if isinstance(entry, Mapping) else {}


def foreign(entry: Any, names: Container[Any]) -> Any:
    """Give the part that is not ours of what the state has under a key; all of it, where it is no dict."""
    return {name: value for name, value in entry.items() if name not in names} if isinstance(entry, Mapping) else entry


def keep_only(part: Callable[[Any, Container[Any]], Any], state: State, ours: Ours) -> None:
    """Keep only the entries of a state that `part` gives, which is `own` or `foreign`."""
    kept = {key: part(entry, ours(key)) for key, entry in state.items() if isinstance(key, Tensor)}
    kept = {key: entry for key, entry in kept.items() if not (isinstance(entry, dict) and not entry)}
    others = {} if part is own else {key: entry for key, entry in state.items() if not isinstance(key, Tensor)}
    state.clear()
    state.update({**kept, **others})


class Watch:
    """The entries as they were handed out, to compare with the entries that are there.

    Args:
        state: of the optimizer; the entries are in it.
        setup: the entries are views of its buffers.
        gone: is called once, when entries with more than half of all bytes are gone.
    """

    def __init__(self, state: State, setup: Setup, gone: Callable[[], None]):
        self._names = [_getter(names) for names in setup.names.values()]
        entries = self._entries(state)
        self._ids, self._places = list(map(id, entries)), list(map(Tensor.data_ptr, entries))
        self._left, self._gone = sum(t.nbytes for t in entries) // 2, gone
        me = weakref.ref(self)
        self._known = [weakref.ref(t, partial(_tell, me, t.nbytes)) for t in entries]
        self.note(setup)

    def lose(self, size: int) -> None:
        """Count the bytes of an entry that nobody holds any more."""
        before, self._left = self._left, self._left - size
        if before >= 0 > self._left:
            self._gone()

    def holds(self, state: State) -> bool:
        """Tell whether every entry is the object that was handed out, with its memory at the same place."""
        try:
            entries = self._entries(state)
            # A younger object has an entry's id only if the entry is gone, and then the memory is at another place.
            return list(map(id, entries)) == self._ids and list(map(Tensor.data_ptr, entries)) == self._places
        except (KeyError, TypeError, IndexError):  # one is missing, or something else is in its place
            return False

    def _entries(self, state: State) -> list[Tensor]:
        """Give the entries. Parameters come first in the state, in order, so no key is looked up: hashing a tensor is slow."""
        return [t for names, entry in zip(self._names, state.values(), strict=False) for t in names(entry)]

    def note(self, setup: Setup) -> None:
        """Note that only this package has written the numbers that the entries have now."""
        self._versions = _versions(setup)

    def written(self, setup: Setup) -> bool:
        """Tell whether somebody may have written into an entry since the last `note`."""
        return self._versions != _versions(setup)


def _getter(names: Sequence[str]) -> Callable[[Any], Sequence[Tensor]]:
    if not names:  # the parameter's state is on other processes
        return lambda entry: ()
    return operator.itemgetter(*names) if len(names) > 1 else operator.itemgetter(*names, *names)


def _tell(watch: weakref.ref[Watch], size: int, _: Any) -> None:
    if (there := watch()) is not None:
        there.lose(size)


def _versions(setup: Setup) -> list[int]:
    buffers = [t for s in setup.stacks for t in s.buffers.values()]  # others are written during backward
    return [t._version for t in (*buffers, *setup.counters.entries(0).values())]


def _buffers(setup: Setup) -> list[Tensor]:
    stacks = (*setup.stacks, *setup.factors)
    return [*(t for s in stacks for t in s.buffers.values()), *setup.counters.entries(0).values()]


def adopt(state: State, setup: Setup, of_all: set[str], built: bool, ours: Ours) -> bool:
    """Make the setup's buffers the state; they take over the state's entries, and missing entries start anew.

    The entries that the first parameter holds for all parameters start anew only if no parameter has an entry.

    Args:
        state: of the optimizer.
        setup: for the present parameters.
        of_all: names of the entries that the first parameter holds for all parameters.
        built: whether the setup has just been built, perhaps for parameters that have changed.
        ours: the names that were ours before.

    Returns:
        Whether the state had entries of ours.

    Raises:
        OptionError: an entry does not fit the parameters. The state then is as it was.
    """
    params, views = setup.params, setup.views()
    mine = {p: {*setup.specs[p], *own(state.get(p), ours(p))} for p in params}
    old = {p: own(state[p], mine[p]) for p in params if p in state}
    holder = next((entry for entry in old.values() if of_all & entry.keys()), None)
    if holder is not None:  # the first parameter may be another one now
        moved = {name: holder.pop(name) for name in sorted(of_all & holder.keys())}
        old[params[0]] = old.get(params[0], {}) | moved
    for number, p in enumerate(params):
        if not isinstance(state.get(p, {}), MutableMapping):
            raise OptionError(f"optimizer.state of parameter {number} is of type {type(state[p]).__name__}, not a dict")
        for name, value in old.get(p, {}).items():
            if problem := _problem(value, views[p].get(name)):
                known = built and name in ours(p)
                raise OptionError(_changed(p, old[p]) if known else _wrong(number, name, problem))
    inside = set() if built else {t.untyped_storage().data_ptr() for t in _buffers(setup)}
    for p, entry in old.items():
        for name, value in entry.items():
            entry[name] = value = local(value) if is_sharded(value) else value
            if _same(value, views[p][name]):
                views[p][name] = value
            elif value.untyped_storage().data_ptr() in inside:  # two entries were exchanged
                entry[name] = value.clone()
    left = _left(old, setup)
    for p in params:
        for name, view in views[p].items():
            value = old.get(p, {}).get(name)
            if value is None and (name in of_all or not built):
                if not (left and name in of_all):
                    view.fill_(setup.specs[p][name].start)
            elif value is not None and value is not view:
                view.copy_(value)
    _put(state, views, mine, ours)
    return left


def keep_count(setup: Setup) -> None:
    """Restore a number of steps that was zeroed with the first parameter's entries, if another entry is not zero."""
    counters = setup.counters
    if counters.zeroed() and any(bool(t.any()) for s in (*setup.stacks, *setup.factors) for t in s.buffers.values()):
        counters.restore()


def fill(state: State, setup: Setup, of_all: set[str]) -> None:
    """Put missing entries into the state of a setup that has freed its buffers; `of_all`: as in `adopt`."""
    left = _left({p: own(state[p], setup.specs[p]) for p in setup.params if p in state}, setup)
    counts = {name: t for name, t in setup.counters.entries(0).items() if left and name in of_all}
    for number, p in enumerate(setup.params):
        entry = state.setdefault(p, {})
        for name in setup.names[p]:
            spec = setup.specs[p][name]
            shape = spec.part(p, setup.owners[p].get(setup.placement.rank))
            if name not in entry:
                fresh = torch.full(shape, spec.start, dtype=spec.dtype, device=p.device)
                entry[name] = fresh.copy_(counts[name]) if name in counts else fresh
            elif problem := _problem(entry[name], torch.empty(shape, dtype=spec.dtype, device="meta")):
                raise OptionError(_wrong(number, name, problem))


def unstacked(state: State, ours: Ours) -> defaultdict[Any, Any]:
    """Give a state in which our entries are copies: a view would keep its whole stack."""
    copied: defaultdict[Any, Any] = defaultdict(dict)
    for key, entry in state.items():
        mine = {name: t.clone() for name, t in own(entry, ours(key)).items() if isinstance(t, Tensor)}
        copied[key] = {**entry, **mine} if mine else entry
    return copied


def move(state: State, setup: Setup, device: torch.device) -> None:
    """Replace a setup's entries in the state by copies on another device."""
    for p, names in setup.names.items():
        for name in names:
            if name in state.get(p, {}):
                state[p][name] = state[p][name].to(device)


def _left(entries: Mapping[Tensor, Mapping[str, Any]], setup: Setup) -> bool:
    """Tell whether any parameter has entries of ours, perhaps on another process."""
    return any(bool(entry) or not setup.names[p] for p, entry in entries.items())


def _put(state: State, views: Mapping[Tensor, dict[str, Tensor]], mine: Mapping[Tensor, Collection[str]], ours: Ours) -> None:
    """Put the views into the state. Its dicts stay the same objects, and keep what is not ours."""
    entries = {p: state.get(p, {}) for p in views}
    for p, entry in entries.items():
        others = foreign(entry, mine[p])
        entry.clear()
        entry.update({**views[p], **others})
        state.pop(p, None)
    keep_only(foreign, state, ours)
    others = dict(state)
    state.clear()
    state.update({**entries, **others})


def _problem(value: Any, view: Tensor | None) -> str | None:
    """Say why a value cannot be an entry; None if it can."""
    if view is None:
        return "is unexpected under the present options"
    if not isinstance(value, Tensor):
        return f"is of type {type(value).__name__}, not a tensor"
    there = local(value)
    alike = there.dtype == view.dtype or (there.is_floating_point() and view.is_floating_point())
    if there.shape != view.shape or not alike:
        return f"is {tuple(there.shape)} {there.dtype}, and has to be {tuple(view.shape)} {view.dtype}"
    return None


def _wrong(number: int, name: str, problem: str) -> str:
    return f"optimizer.state of parameter {number}: {name} {problem}; it is an entry of this optimizer's own"


def _changed(p: Tensor, entry: Mapping[str, Any]) -> str:
    return (
        f"a parameter is now {tuple(p.shape)} {p.dtype}, and its state of {sorted(entry)} does not fit it any more: "
        "make a new optimizer"
    )


def _same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.stride(), a.dtype, a.device) == (b.data_ptr(), b.stride(), b.dtype, b.device)
