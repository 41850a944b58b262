"""What the tests of the commands share: models made of shapes, their optimizers, and how bad input ends."""

import json

import torch

from hf_efcp.cli import common, shapes
from hf_efcp.cli.main import main


def module(listed, dtype=torch.float32):
    """A model on the meta device, of shapes as they are in a file or as tuples."""
    return shapes.module({name: tuple(shape) for name, shape in listed.items()}, dtype)


def optimizer_of(name, model, optim_args="", targets=None):
    """As the commands make it."""
    (options,) = common.chosen(name, optim_args).values()
    return common.build(name, options, model, targets)


def write_shapes(folder, listed, name="shapes.json"):
    """A file of shapes."""
    file = folder / name
    file.write_text(json.dumps(listed))
    return file


def written(command, folder, *argv):
    """Run a command that works; what it writes by --json."""
    out = folder / f"{command}.json"
    assert main([command, *map(str, argv), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def assert_one_line_of_error(capsys, message, command, *argv):
    """The command ends with status 2, says nothing but one line, and `message` is in it."""
    assert main([command, *map(str, argv)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and message in said.err
