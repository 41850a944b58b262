"""Limits that keep the code readable: the length of files and classes, and no place that reads an optimizer's name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE_LINES, CLASS_LINES = 350, 250

KIND = "(lowrank|low_rank|sparse|dense|mfac|ggt)"
# What a method is, its entry in the registry says: `family`, `compression`. Each way to read it from the name, with an example.
NAME_IS_READ = {
    r"""\.split\(["']_["']""": 'LOSSY[name.split("_")[1]]',
    rf"""\.(starts|ends)with\(\(?["']\w*{KIND}""": 'if name.endswith("mfac"):',
    rf"""["']\w*{KIND}\w*["'] (not )?in (\w*name|n)\b""": '[n for n in NAMES if "dense" not in n]',
    rf"""\bf["']efcp_({KIND}_)?\{{(family|kind|compression|\w*compressor)""": 'make(f"efcp_dense_{family}", params)',
}


def sources(*folders):
    files = [file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 10
    return files


def test_no_file_is_too_long():
    lines = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in sources("tests", "hf_efcp")}
    assert {file: count for file, count in lines.items() if count > FILE_LINES} == {}


def test_no_class_is_too_long():
    lines = {
        f"{file.relative_to(ROOT)}: {node.name}": node.end_lineno - node.lineno + 1
        for file in sources("hf_efcp")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    }
    assert {name: count for name, count in lines.items() if count > CLASS_LINES} == {}


def test_nobody_reads_what_a_method_is_from_its_name():
    reading = re.compile("|".join(NAME_IS_READ))
    places = [
        f"{file.relative_to(ROOT)}:{number}: {line.strip()}"
        for file in sources("tests", "recipes", "hf_efcp")
        if file != Path(__file__)
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if reading.search(line)
    ]
    assert places == []


@pytest.mark.parametrize(("pattern", "example"), NAME_IS_READ.items(), ids=["split", "ends with", "in", "put together"])
def test_the_patterns_match_their_examples(pattern, example):
    assert re.search(pattern, example)
