"""What each diagnostic means, in the order in which a reader looks at them: for the report and for docs/diagnostics.md."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Entry:
    """A panel of the report.

    Attributes:
        title: of the panel, with the unit.
        names: the diagnostics that it shows; one that ends in `*` stands for all that begin so.
        meaning: one sentence.
        log: whether the axis is logarithmic.
    """

    title: str
    names: tuple[str, ...]
    meaning: str
    log: bool = False


CATALOGUE = (
    Entry(
        "Angle between gradient and update, degrees",
        ("angle_update_gradient",),
        "0 is the gradient's own direction, 90 is unrelated to this gradient, more than 90 goes against it.",
    ),
    Entry(
        "Size of the update against the gradient",
        ("ratio_update_gradient",),
        "The norm of the update, before the learning rate, over the norm of the gradient.",
        log=True,
    ),
    Entry(
        "Quantiles of |u/g| by coordinate",
        ("scale_q25", "scale_q50", "scale_q75"),
        "How much single coordinates are enlarged. Quantiles far apart mean that the preconditioner treats them differently.",
        log=True,
    ),
    Entry(
        "Size of the update by kind of tensor, RMS",
        ("update_rms_*",),
        "The update's root mean square per coordinate, before the learning rate.",
        log=True,
    ),
    Entry(
        "Relative step",
        ("relative_step",),
        "The norm of what a step adds to the parameters over their own norm.",
        log=True,
    ),
    Entry(
        "Compression error",
        ("compression_error",),
        "The part of what is compressed that one compression leaves out: 0 is nothing, 1 is everything.",
    ),
    Entry(
        "Error-feedback mass, in gradients",
        ("error_mass",),
        "The norm of what compression has left out so far over the norm of one gradient.",
    ),
    Entry(
        "Condition of K",
        ("condition",),
        "The largest eigenvalue of the window's Gram matrix over the smallest.",
        log=True,
    ),
    Entry(
        "Directions in the window",
        ("directions", "rows"),
        "How many independent directions the entries span, beside the number of entries.",
    ),
    Entry(
        "Weight of entries in the update, by age in steps",
        ("weight_age_*",),
        "How far back the update looks: the shares add up to 1.",
    ),
    Entry("Cancellation kappa", ("kappa",), "How much the sum of entries cancels: 1 to 3 is usual, above 100 is not.", log=True),
    Entry("Cosine of update and newest entry", ("cosine_update_row",), "Near 1 the preconditioner turns nothing."),
    Entry("Refused steps", ("skipped_steps",), "Steps whose gradient was not finite, added up."),
)
