"""docs/cli.md has every command with every argument, in the words of its help.

python tests/test_cli_page.py COMMAND      # prints the table of a command for the page
"""

import argparse
import re
import sys
from pathlib import Path

import pytest

from hf_efcp.cli.main import _parser

PAGE = Path(__file__).parents[1] / "docs/cli.md"


def commands():
    (chosen,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    return chosen.choices


def table(parser):
    rows = ["| argument | meaning |", "|---|---|"]
    for action in parser._actions:
        if action.help is argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        name = ", ".join(action.option_strings) or action.metavar or action.dest
        value = "" if not action.option_strings or action.nargs == 0 else f" {action.metavar or action.dest.upper()}"
        rows.append(f"| `{name}{value}` | {action.help.replace('|', chr(92) + '|')} |")
    return "\n".join(rows)


def sections():
    return dict(re.findall(r"^## hf-efcp (\w+)\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL))


def test_every_command_has_a_section_and_no_other():
    assert set(sections()) == set(commands())


@pytest.mark.parametrize("command", sorted(commands()))
def test_a_section_has_every_argument(command):
    parser = commands()[command]
    if any(not isinstance(a, argparse._HelpAction) for a in parser._actions):
        assert table(parser) in sections()[command]
    assert f"    hf-efcp {command}" in sections()[command]  # an example


if __name__ == "__main__":
    print(table(commands()[sys.argv[1]]))
