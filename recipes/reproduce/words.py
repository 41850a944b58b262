"""What a report says in words: how the runs were made, what the tables have, and what each contender is."""

import textwrap
from collections.abc import Mapping
from typing import Any

from .contenders import Contender
from .spec import WIDER, Results, Spec


def wrapped(text: str, **options: Any) -> list[str]:
    """Return the text in lines of at most 120 characters; a path is never broken."""
    return textwrap.wrap(text, 120, break_on_hyphens=False, break_long_words=False, **options)


def introduction(spec: Spec, results: Results, reference: str, spec_path: str) -> list[str]:
    """Return the lines of the first paragraphs of a page."""
    wanted = spec.wanted(results)
    have = sum(run.key() in results for run in wanted)
    paragraphs = (
        f"Written by `python recipes/reproduce/report.py {spec_path}`, never by hand. {have} of {len(wanted)} runs have a "
        "result. What has none is shown as `not run`.",
        f"The contenders are optimizers with their options ([list](#contenders), [spec](../../{spec_path})). All train the same "
        "models on the same batches: gradient clipping at 1.0, weight decay 0, warm-up over a tenth of the steps, then linear "
        "decay to 0. The seed decides new weights, the order of the data and dropout. The splits are fixed and share no example. "
        "Those of BBC News share no story either.",
        f"{_rates(spec)} {_seeds(spec)}",
        f"The tables have the mean loss on the test split, and its difference to that of `{reference}` on the same seeds. "
        f"`s.e.` is the standard error of a mean over seeds. **Bold: `{reference}` is better.** Other pages have other seeds or "
        "steps, and so other figures for the same contender.",
    )
    return [line for text in paragraphs for line in (*wrapped(text), "")]


def times(spec: Spec) -> str:
    """Say what a page's times are."""
    if spec.device == "cpu":
        return "Times are CPU time of the run's one thread, so that other work does not count."
    return (
        "The model computes in bf16 (autocast). Times are wall time, and runs may have shared the GPU. [Times of an optimizer "
        "that has a GPU of its own](gpu.md#measured)."
    )


def one_rate(spec: Spec) -> bool:
    """Tell whether all runs have the usual learning rate."""
    return [float(rate) for rate in spec.rates] == [1.0]


def _rates(spec: Spec) -> str:
    if one_rate(spec):
        return "All runs have AdamW's usual learning rate on the task, so the best rate is the usual one."
    rates = f"The learning rates of the grid are {_listed(spec.rates)} times AdamW's usual rate on the task."
    if not spec.widen:
        return rates
    more = f"Where the lowest or the highest rate is the best, one {WIDER} times further out is added, {_times(spec.widen)}."
    return f"{rates} {more}"


def _seeds(spec: Spec) -> str:
    several, best = len(spec.seeds) > 1, "the rate with the least loss on the validation split"
    grid = f"Seed{'s' * several} {_listed(spec.seeds)}"
    variants = "".join(
        f" `{name}` is the best of {_listed(f'`{c.name}`' for c in family)}, chosen along with the rate."
        for name, family in spec.families.items()
        if len(family) > 1
    )
    if spec.final_seeds:
        return f"{grid} choose{'s' * (not several)} {best}.{variants} Seeds {_listed(spec.final_seeds)} give the tables."
    only = f"{grid} {'are the only ones' if several else 'is the only one'}."
    return only + ("" if one_rate(spec) else f" The best rate is {best}.") + variants


def _listed(values: Any) -> str:
    *before, last = map(str, values)
    return f"{', '.join(before)} and {last}" if before else last


def _times(count: int) -> str:
    return {1: "once", 2: "at most twice"}.get(count, f"at most {count} times")


def contenders(spec: Spec) -> list[str]:
    """Return the lines of a list: each contender's optimizer and options."""
    first = (
        "An `efcp_` name starts from the [`--optim` defaults](../options.md). With `damping=1e+06` the window's matrix has no "
        "effect: the update is the mean gradient, scaled by the metric ([words](../quickstart.md#words))."
    )
    lines = [*wrapped(first), ""]
    if spec.device == "cpu" and any(c.optimizer == "torch.optim.Muon" for family in spec.families.values() for c in family):
        note = (
            "Muon multiplies in bf16. From commit 9be3648 on, a processor without instructions for bf16 forms these products in "
            "fp32 and rounds them once. Earlier runs have torch's own products."
        )
        lines += [*wrapped(note), ""]
    for family in spec.families.values():
        for contender in family:
            lines += wrapped(f"- {_described(contender)}", subsequent_indent="  ")
    return [*lines, ""]


def _described(c: Contender) -> str:
    text = f"`{c.name}`: `{c.optimizer}`{_options(c.options)}"
    if c.matrix_options:
        text += f"; for matrices{_options(c.matrix_options)}"
    return text + (f"; `{c.rest}` for all but matrices" if c.rest else "")


def _options(options: Mapping[str, Any]) -> str:
    return "".join(f"{', ' if i else ' with '}`{k}={_value(v)}`" for i, (k, v) in enumerate(options.items()))


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
