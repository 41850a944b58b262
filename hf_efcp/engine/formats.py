"""How a window's entries are made and stored: which compressor goes with which window, and where compression does not pay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..core import metric
from ..core.cells import Buffers, Layout, Spec, matrix_specs
from ..core.codecs import BlockQuantizer
from ..core.compressors import BlockTopK, Compressor, Identity, PowerIteration
from ..core.lagged import Lagged
from ..core.linalg import multiplies_bf16
from ..core.low_bit_windows import LowBitDenseWindow, LowBitLowRankWindow, LowBitSparseWindow, codec_of
from ..core.metric import Metric
from ..core.sparse_window import SparseWindow
from ..core.windows import DenseWindow, LowRankWindow, Window
from .costs import Count

if TYPE_CHECKING:
    from .stacks import Stack

# For a matrix whose shorter side is below this, `max_rank_fraction` does not limit the rank.
_THIN = 8


class EntryFormat:
    """Entries as they are: the format of tensors for which compression does not pay, and of the dense methods.

    Args:
        layout: of the parameter.
        options: WindowOptions.
    """

    takes_flat_pieces = True  # see Method

    def __init__(self, layout: Layout, options: Any):
        self.layout, self.options = layout, options
        self.low_bit = options.window_format == "low_bit"
        self.dtype = layout.dtype if self.low_bit else options.window_dtype or layout.dtype
        # Whether entries are stored exactly, so that there is no error to feed back.
        self.lossless = not self.low_bit and self.dtype.itemsize >= layout.dtype.itemsize

    def pays(self) -> bool:
        """Tell whether the compressed entry is smaller than the tensor."""
        return False

    def window_specs(self) -> tuple[Spec, ...]:
        """Declare the window's state."""
        return self._kind.specs(self.layout, self.options.window_size, self.dtype)

    def compressor_specs(self) -> tuple[Spec, ...]:
        """Declare the compressor's state."""
        return ()

    def specs(self) -> tuple[Spec, ...]:
        """Declare all state of one parameter, in the order of `optimizer.state[p]`."""
        o = self.options
        name = "residual" if o.residual == "momentum" else "error"
        error = () if self.lossless else matrix_specs(name, self.layout, o.error_dtype, o.error_format)
        momentum = matrix_specs("momentum", self.layout, None) if o.momentum else ()
        return (*error, *self.compressor_specs(), *self.window_specs(), *momentum, *metric.specs(self.layout, o.metric))

    def compressor(self, stack: Stack) -> Compressor:
        """Make the compressor of a stack."""
        return Identity()

    def window(self, buffers: Buffers) -> Window:
        """Make the window on the buffers of a stack."""
        return self._kind(self._window_buffers(buffers), self.layout.dtype, self._update_dtype(buffers))

    def metric(self, stack: Stack) -> Metric | None:
        """Make the metric of a stack; None: there is no metric."""
        kind, o = metric.kind_of(self.layout, self.options.metric), self.options
        if kind == "none":
            return None
        return self._metric_class(kind)(stack.metric_cells(), self.layout, o.metric_beta, o.metric_eps, stack.total)

    def arithmetic(self, n: int, rows: int) -> tuple[float, float, float, float]:
        """Count operations for n tensors of `rows` rows: compress, feedback and update in the compute dtype; dots in fp64."""
        products = 2.0 * self.options.window_size * n * rows * self.layout.cols
        return 0.0, 0.0, products, products

    @property
    def _kind(self) -> type[DenseWindow]:
        return LowBitDenseWindow if self.low_bit else DenseWindow

    def _metric_class(self, kind: str) -> type[Metric]:
        return metric.KINDS[kind]

    def _window_buffers(self, buffers: Buffers) -> Buffers:
        return {spec.name: buffers[spec.name] for spec in self.window_specs()}

    def _update_dtype(self, buffers: Buffers) -> torch.dtype | None:
        """Give the dtype of the product G^T c. None: the compute dtype, as for fp64 and where bf16 would be slower."""
        device = next(iter(buffers.values())).device
        if self.layout.dtype == torch.float64 or fp32_stays(self.options, self.layout, device):
            return None
        return self.options.window_update_dtype


class SparseFormat(EntryFormat):
    """Block top-k entries, unless indices and values take as much as the tensor."""

    def __init__(self, layout: Layout, options: Any):
        super().__init__(layout, options)
        self.lossless = False
        self.grid = BlockTopK(layout.cols, options.density, options.block_size) if layout.numel else None

    def pays(self) -> bool:
        """See EntryFormat."""
        if self.grid is None:
            return False
        cols = self.layout.cols
        if self.low_bit:
            scales = BlockQuantizer(8).shapes(cols)[1][0] * self.layout.dtype.itemsize
            compressed, dense = 2 * self.grid.per_row + codec_of(self.grid).blocks, cols + scales
        else:
            itemsize = self.dtype.itemsize
            compressed, dense = self.grid.per_row * (itemsize + torch.int16.itemsize), cols * itemsize
        return compressed < dense

    def window_specs(self) -> tuple[Spec, ...]:
        """See EntryFormat."""
        kind = LowBitSparseWindow if self.low_bit else SparseWindow
        return kind.specs(self.layout, self.options.window_size, self._grid, self.dtype)

    def compressor(self, stack: Stack) -> Compressor:
        """See EntryFormat."""
        return self._grid

    def window(self, buffers: Buffers) -> Window:
        """See EntryFormat."""
        kind = LowBitSparseWindow if self.low_bit else SparseWindow
        return kind(self._window_buffers(buffers), self.layout.dtype, self._grid)

    def arithmetic(self, n: int, rows: int) -> tuple[float, float, float, float]:
        """See EntryFormat."""
        kept, m = n * rows * self._grid.per_row, self.options.window_size
        return 0.0, kept, 2 * m * kept, 2 * m * kept

    @property
    def _grid(self) -> BlockTopK:
        assert self.grid is not None, "an empty tensor is stored as it is"
        return self.grid


class LowRankFormat(EntryFormat):
    """Entries P Q^T of rank r, unless both factors take as much as the tensor: r (rows + cols) >= rows cols.

    r is `rank`, but at most the fraction `max_rank_fraction` of the shorter side, if the shorter side is at least 8. The limit is
    not for shorter sides: a quarter of a classification head's 5 rows would be rank 1, which trains worse
    (docs/benchmarks/softmax.md).
    """

    takes_flat_pieces = False

    def __init__(self, layout: Layout, options: Any):
        super().__init__(layout, options)
        self.lossless = False
        shorter = min(layout.rows, layout.cols)
        fraction = options.max_rank_fraction if shorter >= _THIN else 1.0
        self.rank = min(options.rank, shorter, max(1, int(fraction * shorter)))

    def pays(self) -> bool:
        """See EntryFormat."""
        return self.rank * (self.layout.rows + self.layout.cols) < self.layout.numel

    def window_specs(self) -> tuple[Spec, ...]:
        """See EntryFormat."""
        kind = LowBitLowRankWindow if self.low_bit else LowRankWindow
        return kind.specs(self.layout, self.options.window_size, self.rank, self.dtype)

    def compressor_specs(self) -> tuple[Spec, ...]:
        """See EntryFormat."""
        return (Spec("warm_start", (self.layout.cols, self.rank), self.layout.dtype),)

    def compressor(self, stack: Stack) -> Compressor:
        """See EntryFormat."""
        return PowerIteration(stack.cell("warm_start"), self.options.power_iterations)

    def window(self, buffers: Buffers) -> Window:
        """See EntryFormat."""
        kind = LowBitLowRankWindow if self.low_bit else LowRankWindow
        return kind(self._window_buffers(buffers), self.layout.dtype, self._update_dtype(buffers))

    def arithmetic(self, n: int, rows: int) -> tuple[float, float, float, float]:
        """See EntryFormat."""
        m, r, cols = self.options.window_size, self.rank, self.layout.cols
        numel, dots = n * rows * cols, 2 * m * r * r * n * (rows + cols)
        return 4 * numel * r * self.options.power_iterations, 2 * numel * r, 2 * numel * m * r, dots

    def _metric_class(self, kind: str) -> type[Metric]:
        return Lagged if self.options.comm == "factors" else super()._metric_class(kind)


def fp32_stays(options: Any, layout: Layout, device: torch.device) -> bool:
    """Tell whether `window_update_dtype` has no effect on a device because bf16 would be slower there."""
    return options.window_update_dtype is not None and layout.dtype != torch.float64 and not multiplies_bf16(device)


def costs_of(stack: Any) -> dict[str, Count]:
    """Count what a step of a window method must do for a stack, by phase: operations, and bytes that must move.

    The counts are lower bounds for the method, not for this code (docs/benchmarks/roofline.md): an input is read once for each
    pass that the data flow forces.
    """
    n, (rows, cols) = len(stack.pieces), stack.shape
    format, size = stack.format, stack.pieces[0].param.element_size()
    m, numel = format.options.window_size, n * rows * cols

    def held(names: set[str]) -> int:
        return sum(buffer.nbytes for name, buffer in stack.buffers.items() if name in names)

    window = held({spec.name for spec in format.window_specs()})
    entry, error, warm = window / m, held({"error", "residual"}), held({"warm_start"})
    gradient = numel * size
    compress = Count(bytes=gradient + error + warm + (gradient if format.options.weight_decay_mode == "l2" else 0))
    dots = Count(bytes=window - entry)  # slot j is replaced; the new entry is at hand
    feedback = Count(bytes=error + entry + warm)
    update = Count(bytes=window + 2 * gradient + 2 * held({"momentum"}) + held({"residual"}))
    precision = "fp64" if stack.layout.dtype == torch.float64 else "fp32"
    *arithmetic, dots.fp64 = format.arithmetic(n, rows)
    for part, operations in zip((compress, feedback, update), arithmetic, strict=True):
        setattr(part, precision, float(operations))
    return {"compress": compress, "dots": dots, "feedback": feedback, "update": update}
