"""The slow references that the fast code is tested against: dense rows, fp64, brute force."""

import os

import pytest
import torch

import hf_efcp
from hf_efcp.core.cells import matrix_shape
from hf_efcp.core.codecs import BlockQuantizer, decode_float8
from hf_efcp.core.compressors import BlockTopK
from hf_efcp.registry import get_optimizer_info

NAMES = hf_efcp.list_optimizers()
# 1-D, 2-D wide, tall, twice the same (a batch of two), 4-D, too thin to compress, 0-D.
SHAPES = ((7,), (12, 30), (12, 30), (40, 11), (8, 3, 3, 3), (3, 4), ())


def info(name):
    """The registry's entry of `name`."""
    return get_optimizer_info(name)


def names(**traits):
    """The names whose entries have all these traits: names(family="mfac", compression="dense")."""
    having = [n for n in NAMES if all(getattr(info(n), trait) == value for trait, value in traits.items())]
    assert having, f"no optimizer has {traits}"
    return having


def each(chosen=NAMES):
    """Parameters for pytest: GGT on the windows that M-FAC has too is slow, as dense GGT shows what differs between both."""
    repeats = [n for n in NAMES if info(n).family == "ggt" and info(n).compression != "dense"]
    return [pytest.param(n, marks=pytest.mark.slow) if n in repeats else n for n in chosen]


def few(values, fast):
    """Parameters for pytest: those for which `fast` is true always run, the others by `-m slow`."""
    return [v if fast(v) else pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow) for v in values]


def few_names(chosen=NAMES):
    """Parameters for pytest: one method with a window and one without always run, the others by `-m slow`."""
    return few(chosen, {next(iter(names(windowed=w))) for w in (True, False)}.__contains__)


def briefly():
    """The names whose tests run by hand, but for the first variant of each: others without a window run all."""
    return [*names(windowed=False, compression="low rank")[1:], *names(windowed=False, compression="dense")]


def one_of_each_kind():
    """Low rank and sparse, each with a window and without, and dense GGT. DASH has tests of its own."""
    windowed = [names(windowed=True, compression=c)[0] for c in ("low rank", "sparse")]
    return [
        *windowed,
        *names(family="ggt", compression="dense"),
        *(names(windowed=False, compression=c)[0] for c in ("low rank", "sparse")),
    ]


# For tests that take the names in turn on several processes, where a name costs seconds.
IN_TURN = NAMES if os.environ.get("HF_EFCP_TEST_NAMES") == "all" else one_of_each_kind()


def has_error(name):
    """Whether the method feeds back what it leaves out of a gradient."""
    return "error_format" in info(name).options()


def compressed_names():
    """The names whose windows leave something of a gradient out."""
    return [n for n in names(windowed=True) if info(n).compression != "dense"]


def lossy_options(name):
    """Options under which the compressor drops something on SHAPES."""
    return dict(info(name).lossy)


def exact_options(name):
    """Options under which compression loses nothing."""
    return dict(info(name).exact)


_OF_ALL = {"process_group", "lr", "weight_decay"}


def known_to(name, options):
    """Those of the options that the method has; all of them are options of some method."""
    strangers = options.keys() - {option for n in NAMES for option in info(n).options()} - _OF_ALL
    assert not strangers, f"no optimizer has {strangers}"
    return {option: value for option, value in options.items() if option in {*info(name).options(), *_OF_ALL}}


def args_known_to(name, optim_args):
    """The same for --optim_args as text."""
    return ",".join(pair for pair in optim_args.split(",") if pair and known_to(name, {pair.partition("=")[0]: None}))


def make(name, params, **options):
    """The optimizer `name` with lossy compression, unless the options say otherwise; a method without one of them ignores it."""
    rates = known_to(name, {"adam_lr_ratio": 1.0})  # one for all tensors
    return info(name).cls(params, **{"lr": 1.0, **rates, **lossy_options(name), **known_to(name, options)})


def rate_of_adam(name, rate):
    """The rate at which a method's updates are those of AdamW at `rate` in its first steps: Muon's have 0.2 of their size."""
    return 5 * rate if "ns_schedule" in info(name).options() else rate


def parameters(shapes=SHAPES, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def set_gradients(params, generator, norm=1.0):
    """Random gradients whose norm over all parameters is `norm`; returns clones."""
    total = sum(p.numel() for p in params) ** 0.5
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * (norm / total)).to(p.dtype)
    return [p.grad.clone() for p in params]


def stack_of(optimizer, p):
    return next(s for s in optimizer.setup().stacks if any(q is p for q in s.params))


def row(optimizer, p, slot):
    """Row `slot` of p's window as a flat fp64 vector, from the public state."""
    state = {name: value.double() if value.is_floating_point() else value for name, value in optimizer.state[p].items()}
    if "window_q_scale" in state:
        q = BlockQuantizer(8).decode(state["window_q"][slot], state["window_q_scale"][slot], state["window_q"].shape[2])
        return (decode_float8(state["window_p"][slot], torch.float64).mT @ q).flatten()
    if "window_p" in state:
        return (state["window_p"][slot].mT @ state["window_q"][slot]).flatten()
    if "window_indices" in state:
        indices, values = state["window_indices"][:, slot].long(), state["window_values"][:, slot]
        rows, cols = matrix_shape(p)
        grid = BlockTopK(cols, optimizer.options.density, optimizer.options.block_size)
        return torch.zeros(rows, cols, dtype=torch.float64).scatter(1, grid.columns(indices), values).flatten()
    if "window_entries" in state:
        w = stack_of(optimizer, p).window
        indices, values = w.codec.decode(
            optimizer.state[p]["window_entries"][:, slot], state["window_scale"][:, slot], torch.float64
        )
        dense = torch.zeros(p.shape[0], p[0].numel(), dtype=torch.float64)
        return dense.scatter(1, indices + w.grid.offsets(torch.device("cpu")), values).flatten()
    if "window_rows_scale" in state:
        scale = state["window_rows_scale"][slot]
        return BlockQuantizer(8).decode(state["window_rows"][slot].view(len(scale), -1), scale, p.numel() // len(scale)).flatten()
    return state["window_rows"][slot].flatten()


def window(optimizer, params):
    """G, (m, d) fp64: all parameters' rows side by side."""
    m = optimizer.options.window_size
    return torch.stack([torch.cat([row(optimizer, p, i) for p in params]) for i in range(m)])


def error(optimizer, p):
    """e as a flat fp64 vector (zeros where rows are exact)."""
    e, scale = optimizer.state[p].get("error"), optimizer.state[p].get("error_scale")
    if scale is not None:
        cols = p.numel() // len(scale)
        return BlockQuantizer(8 if e.dtype == torch.int8 else 4).decode(e, scale.double(), cols).flatten()
    return torch.zeros(p.numel(), dtype=torch.float64) if e is None else e.double().flatten()


def update_of(optimizer, params):
    """Take a step at lr 1 without weight decay; returns u, the flat fp64 update, and puts the parameters back."""
    before = [p.detach().clone() for p in params]
    for p in params:
        p.data.zero_()
    optimizer.step()
    u = torch.cat([-p.detach().double().flatten() for p in params])
    for p, b in zip(params, before, strict=True):
        p.data.copy_(b)
    return u


def mfac_oracle(g, x, damping, divisor, row_dtype):
    """(damping I + G^T G / N)^-1 x for x in the span of the rows, by a thin SVD of G (m, d)."""
    u, s, _ = torch.linalg.svd(g.T, full_matrices=False)
    u, s = (t[..., s > s.max() * (1e-9 if row_dtype == torch.float64 else 1e-7)] for t in (u, s))
    return u @ ((u.T @ x) / (damping + s**2 / divisor))


def ggt_oracle(rows, x, eps, row_dtype):
    """((A^T A)^1/2 + eps I)^-1 x for x in the span of A's rows (m, d), by a thin SVD of A."""
    u, s, _ = torch.linalg.svd(rows.T, full_matrices=False)
    u, s = (t[..., s > s.max() * (3e-7 if row_dtype == torch.float64 else 1e-5)] for t in (u, s))
    return u @ ((u.T @ x) / (s + eps))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()
