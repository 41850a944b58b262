"""What to change next, in plain words, each with the figure that says so."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Sequence

from .read import Run, Series, metrics

# A rule looks at one run and says what it finds.
Rule = Callable[[Run], Iterator["Advice"]]

# Above or below these a figure is told; docs/diagnostics.md has what was measured.
LOST, HEAVY, KAPPA, NEWEST, FAST, SLOW, RISEN, WAITED = 0.97, 20.0, 100.0, 0.95, 1e-2, 1e-6, 0.02, 0.8


@dataclasses.dataclass(frozen=True)
class Advice:
    """One remark.

    Attributes:
        kind: "change" (something is off), "try" (something may be better), "fine".
        run: title of the run; empty: of all.
        text: sentences, with the figure.
    """

    kind: str
    run: str
    text: str


def advise(runs: Sequence[Run]) -> list[Advice]:
    """Give the remarks on all runs, the most urgent first."""
    found = [advice for run in runs for rule in _RULES for advice in rule(run)] + list(_compared(runs))
    if not any(advice.kind == "change" for advice in found):
        looked = any(run.diagnostics for run in runs)
        text = "No figure of this report is out of its usual range." if looked else _NOTHING_LOGGED
        found.append(Advice("fine" if looked else "try", "", text))
    return sorted(found, key=lambda advice: ("change", "try", "fine").index(advice.kind))


_NOTHING_LOGGED = (
    "No diagnostics were logged. The option diagnostics_steps=100 in --optim_args logs them for an optimizer of hf_efcp, at less "
    "than 2% of the time."
)


def _refused(run: Run) -> Iterator[Advice]:
    if count := _last(run, "skipped_steps"):
        steps = count + _last(run, "step")
        yield Advice(
            "change",
            run.title,
            f"{count:.0f} of {steps:.0f} steps were refused: a gradient was not finite. Lower the learning rate, or "
            "look for a loss "
            "that overflows. fp16 needs its GradScaler; bf16 needs none.",
        )


def _loss(run: Run) -> Iterator[Advice]:
    loss = run.curves.get("loss")
    if loss is None or len(loss.values) < 4:
        return
    if any(not abs(x) < float("inf") for x in loss.values):
        yield Advice("change", run.title, "The training loss is not a number at some steps. Lower the learning rate.")
        return
    quarter = max(2, len(loss.values) // 4)
    before, after = (statistics.mean(part) for part in (loss.values[-2 * quarter : -quarter], loss.values[-quarter:]))
    first = statistics.mean(loss.values[:quarter])
    if after > first:
        yield Advice(
            "change",
            run.title,
            f"The training loss rose from {first:.3g} to {after:.3g}. Lower the learning rate{_rate(run)}.",
        )
    elif before - after > 0.05 * abs(before):
        yield Advice(
            "try",
            run.title,
            f"The training loss still falls: its mean went from {before:.3g} to {after:.3g} in the last quarter of the "
            "run. Train "
            "for more steps.",
        )


def _overfitting(run: Run) -> Iterator[Advice]:
    evaluated = run.curves.get("eval_loss")
    if evaluated is None or len(evaluated.values) < 3:
        return
    best = min(range(len(evaluated.values)), key=evaluated.values.__getitem__)
    least, last = evaluated.values[best], evaluated.last
    if best < len(evaluated.values) - 1 and last > (1 + RISEN) * least:
        yield Advice(
            "change",
            run.title,
            f"The evaluation loss was least at step {evaluated.steps[best]} ({least:.4g}) and is {last:.4g} now. Train for fewer "
            "steps, or keep the best checkpoint (load_best_model_at_end).",
        )


def _step_size(run: Run) -> Iterator[Advice]:
    size = _median(run, "relative_step")
    if size is not None and size > FAST:
        yield Advice(
            "change",
            run.title,
            f"A step changes the parameters by {size:.1%} of their norm. Lower the learning rate{_rate(run)}.",
        )
    if size is not None and 0 < size < SLOW:
        yield Advice(
            "try", run.title, f"A step changes the parameters by {size:.1e} of their norm. Raise the learning rate{_rate(run)}."
        )
    angle = _median(run, "angle_update_gradient")
    if angle is not None and angle > 90:
        yield Advice(
            "change",
            run.title,
            f"The update goes against the gradient: the angle between them is {angle:.0f} degrees in the median. The "
            "momentum or the "
            "error feedback is older than the loss surface. Lower window_momentum, or compress less.",
        )


def _compression(run: Run) -> Iterator[Advice]:
    lost, options = _median(run, "compression_error"), run.optimizer.get("options", {})
    more = next((f"Raise {name} above {options[name]}." for name in ("rank", "density") if name in options), "Compress less.")
    if lost is not None and lost > LOST:
        yield Advice("change", run.title, f"Compression leaves out {lost:.1%} of the norm of what it gets. {more}")
    mass = _median(run, "error_mass")
    if mass is not None and mass > HEAVY:
        yield Advice("change", run.title, f"The error feedback holds {mass:.1f} gradients. {more}")


def _window(run: Run) -> Iterator[Advice]:
    kappa, options = _median(run, "kappa"), run.optimizer.get("options", {})
    size = options.get("window_size", "")
    if kappa is not None and kappa > KAPPA:
        yield Advice(
            "change",
            run.title,
            f"The entries of the window cancel: kappa is {kappa:.0f} in the median, and 1 to 3 is usual. Raise damping, "
            "or make the "
            f"window shorter than {size or 'it is'}. Repeated batches have the same effect.",
        )
    newest = _median(run, "weight_newest")
    if newest is not None and newest > NEWEST and _number(size or 2) > 1:
        yield Advice(
            "try",
            run.title,
            f"The newest entry has {newest:.0%} of the weight, and the others hardly count. A window_size below {size} "
            "takes less "
            "memory. A larger window_momentum (0.9) makes use of the others.",
        )


def _clipping(run: Run) -> Iterator[Advice]:
    norms, bound = run.curves.get("grad_norm"), _number(run.arguments.get("max_grad_norm"))
    if norms is None or not bound or len(norms.values) < 4:
        return
    share = sum(x > bound for x in norms.values) / len(norms.values)
    if share > 0.9:
        ours = run.name.startswith("efcp_")
        hint = "max_grad_norm=0 leaves the size of the update to update_rms." if ours else "A larger one clips outliers only."
        yield Advice(
            "try",
            run.title,
            f"The gradient was clipped in {share:.0%} of the logged steps: its norm is "
            f"{statistics.median(norms.values):.3g} in the "
            f"median, and max_grad_norm is {bound:g}. {hint}",
        )


def _memory(run: Run) -> Iterator[Advice]:
    own, adamw = (sum(run.optimizer.get(kind, {}).values()) for kind in ("memory", "adamw"))
    count = run.model.get("trained", 0)
    if not own or not adamw or not count or not run.name.startswith("efcp_"):
        return
    figures = f"{own / count:.2f} bytes for each trained parameter, and AdamW takes {adamw / count:.2f}"
    if own > adamw:
        yield Advice("try", run.title, f"The optimizer takes {figures}. The option memory_budget chooses a smaller state.")
    else:
        yield Advice("fine", run.title, f"The optimizer takes {figures}.")


def _waiting(run: Run) -> Iterator[Advice]:
    if _waited(run):
        yield Advice(
            "try",
            run.title,
            f"The process computed in {run.share:.0%} of its time. In the rest it waited, for other programs on this machine or "
            "for data. Its seconds say little about the optimizer. To compare times, run on a quiet machine.",
        )


def _compared(runs: Sequence[Run]) -> Iterator[Advice]:
    """Compare runs: the last evaluation, and the time of a step."""
    for name in metrics(runs):
        having = [run for run in runs if name in run.curves]
        if name == "loss" or not name.endswith("_loss") or len(having) < 2:
            continue
        best = min(having, key=lambda run: run.curves[name].last)
        others = ", ".join(f"{run.curves[name].last:.4g} ({run.title})" for run in having if run is not best)
        yield Advice(
            "fine", best.title, f"Its last {name} is the least of all runs: {best.curves[name].last:.4g}, against {others}."
        )
    timed = [(run, run.times[-1][1] / run.times[-1][0]) for run in runs if run.times and run.times[-1][0]]
    if len(timed) > 1 and not any(_waited(run) for run, _ in timed):
        (fast, least), *slower = sorted(timed, key=lambda pair: pair[1])
        rest = ", ".join(f"{seconds / least:.2f} times as long ({run.title})" for run, seconds in slower)
        text = f"Its steps are the fastest: {least:.3g} s each, evaluation included. Others take {rest}."
        yield Advice("fine", fast.title, text)


_RULES: tuple[Rule, ...] = (_refused, _loss, _overfitting, _step_size, _compression, _window, _clipping, _memory, _waiting)


def _waited(run: Run) -> bool:
    return run.share is not None and run.share < WAITED


def _median(run: Run, name: str) -> float | None:
    """Give the median over the second half of the run: the beginning is another matter."""
    series: Series | None = run.diagnostics.get(name)
    return None if series is None else statistics.median(series.values[len(series.values) // 2 :])


def _last(run: Run, name: str) -> float:
    return run.diagnostics[name].last if name in run.diagnostics else 0.0


def _rate(run: Run) -> str:
    rate = _number(run.arguments.get("learning_rate"))
    return f" ({rate:g} now)" if rate else ""


def _number(text: object) -> float:
    """Read a number that a record has as text; 0 where it has none."""
    try:
        return float(str(text))
    except ValueError:
        return 0.0
