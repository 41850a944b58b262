"""`hf-efcp completion`: what a shell completes, and what is said where it cannot be."""

import shlex
import shutil
import subprocess
import sys

import pytest

from hf_efcp.cli import completion
from hf_efcp.cli.main import _parser, main
from hf_efcp.registry import list_optimizers
from tests.test_cli_page import commands


@pytest.fixture
def script(capsys):
    pytest.importorskip("shtab")

    def printed(shell):
        assert main(["completion", shell]) == 0
        return capsys.readouterr().out

    return printed


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_commands_options_and_names(script, tmp_path):
    (tmp_path / "completion.bash").write_text(script("bash"))
    typed = [("", set(commands())), ("est", {"estimate"}), ("list --op", {"--options"}), ("advise --task s", {"sft"})]
    typed += [("estimate --optim ", set(list_optimizers())), ("estimate bert-b", {"bert-base"})]
    lines = ["source completion.bash"]
    for words, _ in typed:
        parts = ["hf-efcp", *words.split(" ")]
        lines.append(f"COMP_WORDS=({shlex.join(parts)}); COMP_CWORD={len(parts) - 1}; COMPREPLY=()")
        lines.append("$(complete -p hf-efcp | sed 's/.*-F \\([^ ]*\\).*/\\1/'); echo \"${COMPREPLY[@]}\"")
    run = subprocess.run(["bash", "--norc", "-c", "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True)
    for (words, expected), line in zip(typed, run.stdout.splitlines(), strict=True):
        assert {word for word in line.split() if not word.startswith("-") or "-" in words} == expected, words


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_every_shell_learns_every_command_and_name(script, shell):
    text = script(shell)
    for name in (*commands(), *list_optimizers()):
        assert name in text


def test_the_parser_that_checks_arguments_is_left_alone(script):
    script("bash")
    assert _parser().parse_args(["estimate", "my_model", "--gpu", "24GiB"]).model == "my_model"


def test_mistakes_are_one_line(monkeypatch, capsys):
    assert main(["completion", "bsh"]) == 2
    assert capsys.readouterr().err == "error: unknown shell 'bsh': did you mean 'bash'? valid: bash, zsh, fish\n"
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert main(["completion", "bash"]) == 2
    assert 'needs shtab, which is not installed: pip install "hf_efcp[completion]"' in capsys.readouterr().err
