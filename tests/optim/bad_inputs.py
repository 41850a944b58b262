"""Tables of bad inputs, each of which gives one clear error: the option, the value, what is allowed or the nearest valid name."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from hf_efcp import OptionError

ANY = "efcp_lowrank_mfac"


@dataclasses.dataclass
class Bad:
    """One bad input.

    Attributes:
        id: name of the test.
        give: called without arguments, or with what the table needs.
        message: regular expression that the message must match.
        error: the exception's type.
    """

    id: str
    give: Callable
    message: str
    error: type | tuple = OptionError


def table(rows):
    return pytest.mark.parametrize("bad", rows, ids=lambda row: row.id)


def one(*shape, **kwargs):
    return Parameter(torch.ones(shape or (3,), **kwargs))
