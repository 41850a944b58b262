"""Bad values and names of every option of every optimizer: one OptionError that names the option, before anything is made."""

import math

from hf_efcp.options import OptionError
from tests.hostile.conftest import Record
from tests.reference import NAMES, info, parameters

BAD = [object(), "no such value", math.nan, -math.inf, [1], {"a": 1}, b"4", 1j, type]


def outcome(cls, name, given):
    """What becomes of an optimizer with these options."""
    try:
        cls(parameters(((3, 4),)), **{"lr": 0.1, **given})
    except OptionError as error:
        text = str(error)
        return "refused" if name in text and "\n" not in text and len(text) < 2000 else f"refused in other words: {text}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def test_bad_values():
    record = Record("bad options and arguments")
    for name in NAMES:
        cls = info(name).cls
        for option in {*info(name).options(), "lr", "weight_decay"}:
            for bad in BAD:
                record.add(f"{name} {option}={bad!r}", outcome(cls, option, {option: bad}))
            record.add(f"{name} {option}x", outcome(cls, f"{option}x", {f"{option}x": 1}))
    record.check(200)
