"""What a step asks of a GPU, counted without one: launches, bytes of operands, and where the host would wait.

Steps run on fake tensors, which have shapes and no numbers, and on the GPU's way through the code (`kernels.devices.pretending`).
Flags that the host reads are taken for 0. Counted is the last step; the first ones read flags that later ones need not.

- A launch is an operation of torch that is no view and no allocation, or one of our Triton kernels. Some operations of torch
  launch several kernels on a GPU (a QR decomposition: dozens); they count once.
- Bytes are those of all operands and results, each once in a launch: what would move if each launch read and wrote all of them.
- A read depends on numbers on the device, so that the host waits for all that is queued: `.item()`, a boolean index, ...
- A wait is an operation that waits though nobody asked for numbers: an eigendecomposition, a copy from the host.

Not seen: the copies of tables of addresses to the device, which most steps share with the one before; what lies inside of
torch's operations.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib.util
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cli.common import build
from ..core import dct
from ..core.deferred import NUMBERS, SIZES, WAITS
from ..engine.phases import heard_by
from ..kernels import calls
from ..kernels.devices import pretending
from .contenders import Workload
from .measuring import PHASES

# Called with a Triton function, its grid and its arguments, in place of a launch.
Launched = Callable[..., object]

# Operations without work on the device, though no schema calls their results views.
_IDLE = {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "_unsafe_view"}
# They give a tensor a size that depends on numbers where an index is a mask.
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
# Addresses begin at multiples of this, as those of torch's allocator do.
_ALIGNMENT = 512


@dataclasses.dataclass
class Tally:
    """What was counted in a phase: names -> how often, and bytes.

    Attributes:
        operations: torch's.
        kernels: ours.
        bytes: of operands and results.
        reads: operations that depend on numbers.
        waits: operations that wait for other reasons.
    """

    operations: Counter[str] = dataclasses.field(default_factory=Counter)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)
    bytes: int = 0
    reads: Counter[str] = dataclasses.field(default_factory=Counter)
    waits: Counter[str] = dataclasses.field(default_factory=Counter)

    @property
    def launches(self) -> int:
        """Count torch's operations and our kernels."""
        return self.operations.total() + self.kernels.total()

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def report(self) -> dict[str, Any]:
        """Give the figures as JSON has them."""
        counters = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "bytes"}
        named = {name: dict(counter.most_common()) for name, counter in counters.items()}
        return {"launches": self.launches, "bytes": self.bytes, **named}


@dataclasses.dataclass
class Counted:
    """What was counted in a step.

    Attributes:
        phases: names out of `PHASES`.
        missing: operations of `hf_efcp.kernels` whose kernel raises or is not there, so that torch did them.
    """

    phases: dict[str, Tally]
    missing: list[str]

    @property
    def total(self) -> Tally:
        """Add the phases up."""
        return sum(self.phases.values(), Tally())

    def report(self) -> dict[str, Any]:
        """Give the figures as JSON has them."""
        phases = {name: tally.report() for name, tally in self.phases.items()}
        return {"total": self.total.report(), "phases": phases, "missing": self.missing}


def has_triton() -> bool:
    """Tell whether Triton is installed: without, its kernels are not counted, but what torch does in their place."""
    return importlib.util.find_spec("triton") is not None


def count(
    model: nn.Module,
    name: str,
    options: dict[str, Any],
    *,
    targets: str | None = None,
    steps: int = 3,
    launched: Launched | None = None,
) -> Counted:
    """Count what a step of an optimizer asks of a GPU.

    Args:
        model: on the meta device; stays as it is.
        name, options: of the optimizer, as `cli.common.chosen` gives them.
        targets: `optim_target_modules`.
        steps: how many are taken; the last one is counted.
        launched: what is called for a Triton kernel; None: nothing. Its arguments are fake tensors, with addresses as torch's
            allocator would give them.

    Returns:
        Counts by phase.
    """
    counter = _Counter(launched)
    with FakeTensorMode(allow_non_fake_inputs=True), pretending("cuda"), _without_launches(counter), heard_by(counter.during):
        work = Workload(copy.deepcopy(model), torch.device("cpu"))
        optimizer = build(name, options, work.model, targets)
        with counter:  # also while it is built, which reads flags
            optimizer.setup().started = True  # so that the first step does not ask whether its gradients are zero
            for _ in range(steps):
                counter.tallies = {phase: Tally() for phase in PHASES}
                optimizer.step()
        missing = sorted(operation for type, operation in calls.FAILED if type == "cuda")
    return Counted(counter.tallies, missing)


class _Counter(TorchDispatchMode):
    """Sees all operations of torch and all launches of kernels.

    Attributes:
        tallies: of the phases.
    """

    def __init__(self, launched: Launched | None):
        super().__init__()
        self.tallies = {phase: Tally() for phase in PHASES}
        self._launched = launched
        self._phase = "rest"
        self._bases: dict[tuple[int, int], int] = {}
        self._end = _ALIGNMENT
        self._bytes_at: dict[int, int] = {0: 0}
        self._tables: dict[int, tuple[Tensor, tuple[int, ...]]] = {}
        self._on_host: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Count for this phase inside: a `phases.Listener`."""
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    # torch ----------------------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "prim":  # what the host knows, such as a tensor's device
            return function(*args, **kwargs)
        name, tally = function.overloadpacket.__name__, self.tallies[self._phase]
        if name == "_local_scalar_dense" and id(args[0]) in self._on_host:
            return 0
        if name in NUMBERS | SIZES or (name in _INDEXING and any(map(_is_mask, args[1]))):
            tally.reads[name] += 1
        if name in WAITS:
            tally.waits[name] += 1
        result = 0 if name in NUMBERS else _called(function, args, kwargs)
        if name == "copy_" and _does_not_block(args, kwargs):
            self._on_host[id(args[0])] = args[0]  # only what goes to the host is copied so
        tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
        if tensors and (name in WAITS or not _is_idle(function)):
            tally.operations[name] += 1
            tally.bytes += sum({self.address(x): _bytes_of(x) for x in tensors}.values())
        return result

    # Triton ---------------------------------------------------------------------------------------------------------------

    def address(self, x: Tensor) -> int:
        """Give a fake tensor an address, a view of it one inside; remember how many bytes are there."""
        storage = x.untyped_storage()
        key = storage._cdata, storage.nbytes()
        if key not in self._bases:
            self._bases[key] = self._end
            self._end += (storage.nbytes() // _ALIGNMENT + 1) * _ALIGNMENT
        address = self._bases[key] + int(x.storage_offset()) * x.element_size()
        self._bytes_at[address] = _bytes_of(x)
        return address

    def table(self, device: torch.device, addresses: tuple[int, ...]) -> Tensor:
        """Give a table of addresses for kernels, and remember what is there: in place of `gpu_tools._on_device`."""
        made = torch.empty(len(addresses), dtype=torch.int64)
        self._tables[id(made)] = made, addresses
        return made

    def launch(self, function: Any, args: Any, kwargs: Any, grid: Any) -> None:
        """Count a kernel, with the bytes of its arguments and of the matrices that it takes by address."""
        tally, held = self.tallies[self._phase], {}
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor):
                held[self.address(x)] = _bytes_of(x)
                held |= {address: self._bytes_at.get(address, 0) for address in self._tables.get(id(x), (x, ()))[1]}
        tally.kernels[function.fn.__name__] += 1
        tally.bytes += sum(held.values())
        if self._launched is not None:
            self._launched(function, *args, grid=grid, **kwargs)


def _called(function: Any, args: Any, kwargs: Any) -> Any:
    """Give the result; where its size depends on numbers, the largest that there can be."""
    try:
        return function(*args, **kwargs)
    except DynamicOutputShapeException:
        packet = function.overloadpacket
        if packet is torch.ops.aten.nonzero:
            return args[0].new_empty(args[0].numel(), args[0].ndim, dtype=torch.int64)
        if packet is not torch.ops.aten.index:
            raise
        indices: list[Tensor | None] = []
        for x in args[1]:
            indices += [x.new_empty(x.numel(), dtype=torch.int64)] * x.ndim if _is_mask(x) else [x]
        return function(args[0], indices)


def _is_mask(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8)


def _does_not_block(args: Any, kwargs: Any) -> bool:
    return kwargs.get("non_blocking", args[2] if len(args) > 2 else False)


def _is_idle(function: Any) -> bool:
    """Tell whether an operation launches nothing: it allocates, or all its results are views that it does not write."""
    if function.overloadpacket.__name__ in _IDLE:
        return True
    aliases = [result.alias_info for result in function._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _bytes_of(x: Tensor) -> int:
    """Count the bytes of a tensor; of one that is expanded, those that there are."""
    numbers = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        numbers *= size if stride or not size else 1
    return numbers


@contextlib.contextmanager
def _without_launches(counter: _Counter) -> Iterator[None]:
    """Let `counter` hear of Triton launches inside, in place of a GPU; what failed inside is forgotten afterwards."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_replaced(calls, "FAILED", set()))
        stack.enter_context(_replaced(dct, "MADE", {}))  # a fake basis serves no real step
        stack.enter_context(_replaced(FakeTensor, "data_ptr", lambda x: counter.address(x)))
        if has_triton():
            from triton.runtime.interpreter import InterpretedFunction
            from triton.runtime.jit import JITFunction

            from ..kernels import gpu_tools

            def run(function: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
                counter.launch(function, args, kwargs, grid)

            def at(function: Any, grid: Any) -> Callable[..., None]:
                return functools.partial(run, function, grid=grid)

            stack.enter_context(_replaced(JITFunction, "run", run))
            stack.enter_context(_replaced(InterpretedFunction, "__getitem__", at))
            stack.enter_context(_replaced(gpu_tools, "_on_device", counter.table))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    inherited, before = name not in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
