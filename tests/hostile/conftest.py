"""What was tried on checkpoints, in a table at the end: how many were refused, and how many had no effect."""

import collections
import os

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Kind -> outcome -> how many.
_COUNTS = collections.defaultdict(collections.Counter)


class Record:
    """Counts cases of a kind, and remembers those that came out wrong.

    Args:
        kind: of the cases.
    """

    def __init__(self, kind):
        self.kind, self.wrong = kind, []

    def add(self, case, outcome):
        """Count a case; `outcome`: "refused", "survived" (it had no effect), or what went wrong."""
        _COUNTS[self.kind][outcome if outcome in ("refused", "survived") else "wrong"] += 1
        if outcome not in ("refused", "survived"):
            self.wrong.append(f"{case}: {outcome}")

    def check(self, least):
        """Fail, with their names, where cases came out wrong, or where there were fewer than `least`."""
        assert not self.wrong, "\n".join(self.wrong)
        assert sum(_COUNTS[self.kind].values()) >= least


@pytest.fixture(autouse=True)
def one_thread():
    """The tensors are small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter):
    """Print the table."""
    if not _COUNTS:
        return
    terminalreporter.write_line("")
    terminalreporter.write_line(f"{'':40}{'tried':>8}{'refused':>10}{'survived':>10}{'wrong':>8}")
    for kind, counts in _COUNTS.items():
        numbers = sum(counts.values()), counts["refused"], counts["survived"], counts["wrong"]
        terminalreporter.write_line("{:40}{:>8}{:>10}{:>10}{:>8}".format(kind, *numbers))
