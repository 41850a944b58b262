"""For all tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def accelerate_environment():
    """TrainingArguments and Accelerator leave ACCELERATE_... in the environment, where the next test's would find them."""

    def ours():
        return {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}

    before = ours()
    yield
    for name in ours():
        del os.environ[name]
    os.environ.update(before)
